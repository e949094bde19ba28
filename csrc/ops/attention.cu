// `attention` on Hopper: softmax over a band, in bf16 and fp16. See attention.md.
#include <cstdint>

#include "fastattn/fastattn.hpp"
#include "fastattn/operand/element.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/score/softmax.hpp"
#include "ops/validate.hpp"
#include "sm90/backward.cuh"
#include "sm90/config.hpp"
#include "sm90/forward.cuh"
#include "sm90/launch.cuh"
#include "sm90/output.cuh"

namespace fastattn {
namespace {

template <class Element_>
struct SoftmaxBand {
  using Schedule = Band;
  using Score = Softmax;
  using Element = Element_;
  using Epilogue = sm90::OutputAndLse<Element>;
  // By head_dim, ascending; the reasons and the times of the alternatives are in attention.md.
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = {192, 128}, .stages = 2, .warpgroups = 3},
                                              {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2}};
  static constexpr sm90::Config kBackward[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2}};
};

// What only the GPU restricts; for a problem that is valid.
Status check_gpu(const char* op, const Attention& problem) {
  if (problem.q.dtype == DType::kFloat32) {
    return failure("%s: dtype must be float16 or bfloat16 on the GPU, got float32", op);
  }
  return sm90::check_device();
}

// Calls run.operator()<Variant>() for the problem's element type.
template <class Run>
auto with_variant(DType dtype, Run&& run) {
  return dtype == DType::kBFloat16 ? run.template operator()<SoftmaxBand<BFloat16>>()
                                   : run.template operator()<SoftmaxBand<Float16>>();
}

int heads_per_kv_head(const Attention& problem) {
  return static_cast<int>(problem.q.heads() / max_of<std::int64_t>(problem.k.heads(), 1));
}

template <class Kernel>
Status launch_forward(const Attention& problem, Stream stream, void (*kernel)(typename Kernel::Params)) {
  typename Kernel::Params params{};
  params.schedule = band_of(problem);
  params.score = {problem.scale * kLog2E};
  params.epilogue.lse = problem.lse;
  params.heads = static_cast<int>(problem.q.heads());
  params.heads_per_kv_head = heads_per_kv_head(problem);
  params.q_tiles = ceil_div(params.schedule.num_q, Kernel::kTile.q);
  Status status;
  const auto encode = [&](const TensorView& view, int rows, sm90::TensorMap& map) {
    status = status.ok() ? sm90::encode(view, rows, map) : status;
  };
  encode(problem.q, Kernel::kTile.q, params.q);
  encode(problem.k, Kernel::kTile.k, params.k);
  encode(problem.v, Kernel::kTile.k, params.v);
  encode(problem.out, sm90::kWarpgroupRows, params.epilogue.out);
  if (!status.ok()) {
    return status;
  }
  return sm90::launch(kernel, problem.q.batch() * params.heads * params.q_tiles,
                      (Kernel::kWarpgroups + 1) * sm90::kWarpgroupThreads, sizeof(typename Kernel::Shared), stream,
                      params);
}

// The parts of the backward's workspace, and its size in bytes.
template <class Kernel>
std::size_t plan_workspace(const Attention& problem, void* base, sm90::BackwardWorkspace& workspace) {
  const std::int64_t tiles =
      problem.q.batch() * problem.q.heads() * ceil_div<std::int64_t>(problem.q.seq(), Kernel::kTile.q);
  const std::int64_t rows = tiles * Kernel::kTile.q;
  workspace.dq = static_cast<float*>(base);
  workspace.lse2 = workspace.dq + rows * Kernel::kHeadDim;
  workspace.delta = workspace.lse2 + rows;
  return (rows * Kernel::kHeadDim + 2 * rows) * sizeof(float);
}

template <class Kernel>
Status launch_backward(const AttentionBackward& problem, Stream stream, void (*kernel)(typename Kernel::Params)) {
  using Element = typename Kernel::Element;
  const Attention& forward = problem.forward;
  typename Kernel::Params params{};
  params.schedule = band_of(forward);
  params.score = {forward.scale * kLog2E};
  params.scale = forward.scale;
  params.heads = static_cast<int>(forward.q.heads());
  params.kv_heads = static_cast<int>(forward.k.heads());
  params.heads_per_kv_head = heads_per_kv_head(forward);
  params.q_tiles = ceil_div(params.schedule.num_q, Kernel::kTile.q);
  params.k_tiles = ceil_div(params.schedule.num_k, Kernel::kTile.k);
  plan_workspace<Kernel>(forward, problem.workspace, params.workspace);
  Status status;
  const auto encode = [&](const TensorView& view, int rows, sm90::TensorMap& map) {
    status = status.ok() ? sm90::encode(view, rows, map) : status;
  };
  encode(forward.q, Kernel::kTile.q, params.q);
  encode(problem.dout, Kernel::kTile.q, params.dout);
  encode(forward.k, Kernel::kTile.k, params.k);
  encode(forward.v, Kernel::kTile.k, params.v);
  encode(problem.dk, sm90::kWarpgroupRows, params.dk);
  encode(problem.dv, sm90::kWarpgroupRows, params.dv);

  const std::int64_t tiles = forward.q.batch() * params.heads * params.q_tiles;
  const std::int64_t rows = tiles * Kernel::kTile.q;
  if (status.ok()) {
    const sm90::PrepareParams prepare{forward.out,  problem.dout,     forward.lse,
                                      problem.dlse, params.workspace, params.q_tiles * Kernel::kTile.q};
    status = sm90::launch(sm90::prepare_kernel<Element>,
                          ceil_div<std::int64_t>(rows * sm90::kRowLanes, sm90::kHelperThreads), sm90::kHelperThreads, 0,
                          stream, prepare);
  }
  if (status.ok()) {
    status = sm90::check(cudaMemsetAsync(params.workspace.dq, 0, rows * Kernel::kHeadDim * sizeof(float),
                                         static_cast<cudaStream_t>(stream.handle)),
                         "cudaMemsetAsync");
  }
  if (status.ok()) {
    status = sm90::launch(kernel, forward.k.batch() * forward.k.heads() * params.k_tiles,
                          (Kernel::kWarpgroups + 1) * sm90::kWarpgroupThreads, sizeof(typename Kernel::Shared), stream,
                          params);
  }
  if (status.ok()) {
    const sm90::FinishParams finish{problem.dq, params.workspace.dq, forward.scale, params.q_tiles};
    status = sm90::launch(sm90::finish_kernel<Element, Kernel>, tiles * Kernel::kWarpgroups, sm90::kWarpgroupThreads, 0,
                          stream, finish);
  }
  return status;
}

}  // namespace

Status attention(const Attention& problem, Stream stream) {
  if (const Status status = validate(problem); !status.ok()) {
    return status;
  }
  if (const Status status = check_gpu("attention", problem); !status.ok()) {
    return status;
  }
  return with_variant(problem.q.dtype, [&]<class Variant>() {
    return sm90::dispatch<Variant::kForward>("attention", problem.q.head_dim(), [&]<int kIndex>() {
      return launch_forward<sm90::ForwardKernel<Variant, kIndex>>(problem, stream,
                                                                  sm90::forward_kernel<Variant, kIndex>);
    });
  });
}

Status attention_backward(const AttentionBackward& problem, Stream stream) {
  if (const Status status = validate(problem); !status.ok()) {
    return status;
  }
  if (const Status status = check_gpu("attention_backward", problem.forward); !status.ok()) {
    return status;
  }
  return with_variant(problem.forward.q.dtype, [&]<class Variant>() {
    return sm90::dispatch<Variant::kBackward>("attention_backward", problem.forward.q.head_dim(), [&]<int kIndex>() {
      return launch_backward<sm90::BackwardKernel<Variant, kIndex>>(problem, stream,
                                                                    sm90::backward_kernel<Variant, kIndex>);
    });
  });
}

std::size_t attention_backward_workspace(const AttentionBackward& problem, Stream) {
  std::size_t bytes = 0;
  with_variant(problem.forward.q.dtype, [&]<class Variant>() {
    return sm90::dispatch<Variant::kBackward>("attention_backward", problem.forward.q.head_dim(), [&]<int kIndex>() {
      sm90::BackwardWorkspace workspace;
      bytes = plan_workspace<sm90::BackwardKernel<Variant, kIndex>>(problem.forward, nullptr, workspace);
      return Status{};
    });
  });
  return bytes;
}

}  // namespace fastattn

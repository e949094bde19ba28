// Host side: a problem, described to the kernels and launched. One function each way, for every op.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "fastattn/fastattn.hpp"
#include "ops/validate.hpp"
#include "sm90/backward.cuh"
#include "sm90/forward.cuh"
#include "sm90/launch.cuh"
#include "sm90/work_order.hpp"

namespace fastattn::sm90 {

template <class Variant>
struct ForwardProblem {
  TensorView q, k, v;
  typename Variant::Schedule schedule;
  typename Variant::Score score;
  typename Variant::Epilogue epilogue;
  void* workspace;
  typename Variant::Operands::Scales scales = {};
};

template <class Variant>
struct BackwardProblem {
  TensorView q, k, v, dout, dq, dk, dv;
  TensorView out = {};  // these three only for a score with row statistics
  const float *lse = nullptr, *dlse = nullptr;
  typename Variant::Schedule schedule;
  typename Variant::Score score;
  float scale;
  float* dbias = nullptr;
  void* workspace;
};

// What only the GPU restricts; for a problem that is valid.
inline Status check_gpu(const char* op, DType dtype) {
  if (dtype == DType::kFloat32) {
    return failure("%s: dtype must be float16 or bfloat16 on the GPU, got float32", op);
  }
  return check_device();
}

inline int heads_per_kv_head(const TensorView& q, const TensorView& k) {
  return static_cast<int>(q.heads() / max_of<std::int64_t>(k.heads(), 1));
}

// Encodes one tensor map after the other; the first failure stays.
struct MapEncoder {
  Status status;

  template <class Box, class Map>
  void operator()(const TensorView& view, const Box& box, Map& map, int row_bytes) {
    status = status.ok() ? encode(view, box, row_bytes, map) : status;
  }
};

// A block for each SM, which takes work after work; or one for each work, if these are fewer.
template <class Kernel, class Variant>
Status launch_forward(const char* op, const ForwardProblem<Variant>& problem, Stream stream,
                      void (*kernel)(typename Kernel::Params)) {
  static_assert(sizeof(*WorkQueue::taken) == kForwardWorkspace);
  constexpr std::int64_t kMostWorks = 1 << 30;
  const auto schedule = problem.schedule.slots();  // of any head: it tells the shape of a tile
  typename Kernel::Params params{};
  params.schedule = problem.schedule;
  params.score = problem.score;
  params.heads = num_heads(problem.schedule, static_cast<int>(problem.q.heads()));
  params.heads_per_kv_head = params.heads / max_of(static_cast<int>(problem.k.heads()), 1);
  const int q_tiles = num_q_tiles(problem.schedule, Kernel::kTile);
  params.epilogue = problem.epilogue;
  params.scales = problem.scales;
  MapEncoder encode;
  encode(problem.q, schedule.query_box(Kernel::kTile), params.q, Kernel::QueryTile::kRowBytes);
  encode(problem.k, schedule.key_box(Kernel::kTile), params.k, Kernel::KeyTile::kRowBytes);
  if constexpr (std::is_same_v<decltype(params.v), TransposedMap>) {
    encode(problem.v, Kernel::kValueDim, params.v, Kernel::ValueTile::kRowBytes);
  } else {
    encode(problem.v, schedule.key_box(Kernel::kTile), params.v, Kernel::ValueTile::kRowBytes);
  }
  if (!encode.status.ok()) {
    return encode.status;
  }
  const std::int64_t heads = problem.q.batch() * params.heads, works = heads * q_tiles;
  const std::int64_t blocks = min_of(works, std::int64_t{num_multiprocessors()});
  if (works > kMostWorks) {
    return failure("%s: q has %lld tiles of %d tokens, allowed are %lld", op, static_cast<long long>(works),
                   Kernel::kTile.q, static_cast<long long>(kMostWorks));
  }
  if (works > 0 && problem.workspace == nullptr) {
    return failure("%s: workspace has no data", op);
  }
  const std::int64_t bytes_of_key =
      problem.k.head_dim() * size_of(problem.k.dtype) + Kernel::kValueDim * size_of(problem.v.dtype);
  params.order = work_order(heads, q_tiles, blocks, problem.k.seq() * bytes_of_key, params.heads_per_kv_head);
  params.works = {params.order.count(), works > blocks ? static_cast<int*>(problem.workspace) : nullptr};
  if (params.works.taken != nullptr) {
    if (const Status status = clear(params.works.taken, kForwardWorkspace, stream); !status.ok()) {
      return status;
    }
  }
  return launch(kernel, blocks, (Kernel::kWarpgroups + 1) * kWarpgroupThreads, sizeof(typename Kernel::Shared), stream,
                params);
}

// The parts of the backward's workspace, and its size in bytes.
template <class Kernel>
std::size_t plan_workspace(const TensorView& q, int num_q, void* base, BackwardWorkspace& workspace) {
  const std::int64_t tiles = q.batch() * q.heads() * ceil_div(num_q, Kernel::kTile.q);
  const std::int64_t rows = tiles * Kernel::kTile.q, statistics = Kernel::Score::kRowStatistics ? rows : 0;
  workspace.dq = static_cast<float*>(base);
  workspace.lse2 = workspace.dq + rows * Kernel::kHeadDim;
  workspace.delta = workspace.lse2 + statistics;
  return (rows * Kernel::kHeadDim + 2 * statistics) * sizeof(float);
}

template <class Kernel, class Variant>
Status launch_backward(const BackwardProblem<Variant>& problem, Stream stream,
                       void (*kernel)(typename Kernel::Params)) {
  using Element = typename Kernel::Element;
  using Schedules = typename Variant::Schedule;
  const auto schedule = problem.schedule.slots();
  typename Kernel::Params params{};
  params.schedule = problem.schedule;
  params.score = problem.score;
  params.scale = problem.scale;
  params.dbias = problem.dbias;
  params.heads = static_cast<int>(problem.q.heads());
  params.kv_heads = static_cast<int>(problem.k.heads());
  params.heads_per_kv_head = heads_per_kv_head(problem.q, problem.k);
  params.q_tiles = ceil_div(schedule.num_q, Kernel::kTile.q);
  params.k_tiles = ceil_div(schedule.num_k, Kernel::kTile.k);
  params.dk = problem.dk;
  params.dv = problem.dv;
  plan_workspace<Kernel>(problem.q, schedule.num_q, problem.workspace, params.workspace);
  MapEncoder encode;
  encode(problem.q, schedule.query_box(Kernel::kTile), params.q, Kernel::QueryTile::kRowBytes);
  encode(problem.dout, schedule.query_box(Kernel::kTile), params.dout, Kernel::QueryTile::kRowBytes);
  encode(problem.k, schedule.key_box(Kernel::kTile), params.k, Kernel::KeyTile::kRowBytes);
  encode(problem.v, schedule.key_box(Kernel::kTile), params.v, Kernel::KeyTile::kRowBytes);

  Status status = encode.status;
  const std::int64_t tiles = problem.q.batch() * params.heads * params.q_tiles;
  const std::int64_t rows = tiles * Kernel::kTile.q;
  if constexpr (Kernel::Score::kRowStatistics) {
    if (status.ok()) {
      const PrepareParams<Schedules> prepare{problem.out,
                                             problem.dout,
                                             problem.lse,
                                             problem.dlse,
                                             params.workspace,
                                             problem.schedule,
                                             params.q_tiles * Kernel::kTile.q};
      status = launch(prepare_kernel<Element, Schedules>, ceil_div<std::int64_t>(rows * kRowLanes, kHelperThreads),
                      kHelperThreads, 0, stream, prepare);
    }
  }
  if (status.ok() && problem.dbias != nullptr) {
    status = clear(problem.dbias, params.heads * sizeof(float), stream);
  }
  if (status.ok()) {
    status = clear(params.workspace.dq, rows * Kernel::kHeadDim * sizeof(float), stream);
  }
  if (status.ok()) {
    status = launch(kernel, problem.k.batch() * problem.k.heads() * params.k_tiles,
                    (Kernel::kWarpgroups + 1) * kWarpgroupThreads, sizeof(typename Kernel::Shared), stream, params);
  }
  if (status.ok()) {
    const FinishParams<Schedules> finish{problem.dq, params.workspace.dq, problem.schedule, problem.scale,
                                         params.q_tiles};
    status = launch(finish_kernel<Element, Kernel, Schedules>, tiles * Kernel::kWarpgroups, kWarpgroupThreads, 0,
                    stream, finish);
  }
  return status;
}

template <class Variant>
Status run_forward(const char* op, const ForwardProblem<Variant>& problem, Stream stream) {
  const std::int64_t head_dim = problem.q.head_dim(), value_dim = problem.epilogue.out.head_dim();
  const auto has_room = [&](const Config& config) {
    return head_dim <= config.head_dim && value_dim <= config.value_dim;
  };
  const auto suits = [&](const Config& config) { return problem.schedule.suits(config.tile); };
  return dispatch<Variant::kForward>(op, head_dim, has_room, suits, [&]<int kIndex>() {
    return launch_forward<ForwardKernel<Variant, kIndex>>(op, problem, stream, forward_kernel<Variant, kIndex>);
  });
}

template <class Variant>
Status run_backward(const char* op, const BackwardProblem<Variant>& problem, Stream stream) {
  return dispatch<Variant::kBackward>(op, problem.q.head_dim(), [&]<int kIndex>() {
    return launch_backward<BackwardKernel<Variant, kIndex>>(problem, stream, backward_kernel<Variant, kIndex>);
  });
}

// Bytes of workspace for a backward over `q`; 0 if there is no kernel for it.
template <class Variant>
std::size_t backward_workspace(const TensorView& q, const typename Variant::Schedule& schedule) {
  std::size_t bytes = 0;
  dispatch<Variant::kBackward>("", q.head_dim(), [&]<int kIndex>() {
    BackwardWorkspace workspace;
    bytes = plan_workspace<BackwardKernel<Variant, kIndex>>(q, schedule.slots().num_q, nullptr, workspace);
    return Status{};
  });
  return bytes;
}

// Calls run.operator()<Element>() for a 16-bit element type.
template <class Run>
auto with_element(DType dtype, Run&& run) {
  return dtype == DType::kBFloat16 ? run.template operator()<BFloat16>() : run.template operator()<Float16>();
}

// Judges a problem over elements of `dtype`.
template <class Problem>
Status check_problem(const char* op, const Problem& problem, DType dtype) {
  const Status status = validate(problem);
  return status.ok() ? check_gpu(op, dtype) : status;
}

// Judges a problem, then calls run.operator()<Element>().
template <class Problem, class Run>
Status run_if_valid(const char* op, const Problem& problem, DType dtype, Run&& run) {
  const Status status = check_problem(op, problem, dtype);
  return status.ok() ? with_element(dtype, run) : status;
}

}  // namespace fastattn::sm90

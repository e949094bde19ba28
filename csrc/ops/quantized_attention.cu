// `quantized_attention` on Hopper: softmax over a band or over listed blocks, on 8-bit operands. See
// quantized_attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/schedule/block_list.hpp"
#include "fastattn/score/softmax.hpp"
#include "fastattn/score/tile_softmax.hpp"
#include "ops/validate.hpp"
#include "sm90/config.hpp"
#include "sm90/operands.cuh"
#include "sm90/output.cuh"
#include "sm90/run_forward.cuh"

namespace fastattn {
namespace {

template <int kStages64, int kStages128>
struct Tiles {
  using Epilogue = sm90::QuantizedOutput;
  static constexpr sm90::Config kForward[] = {
      {.head_dim = 64, .tile = {128, 128}, .stages = kStages64, .warpgroups = 2},
      {.head_dim = 128, .tile = {128, 128}, .stages = kStages128, .warpgroups = 2}};
};

template <class Key, class Schedule_>
struct Int8Values : Tiles<4, 4> {
  using Schedule = Schedule_;
  using Score = TileSoftmax;
  using Operands = sm90::QuantizedOperands<Key, std::int8_t, UInt8>;
  static constexpr Score kScore{UInt8::kLargestLog2};
};

template <class Key, class Schedule_>
struct Float8Values : Tiles<4, 4> {
  using Schedule = Schedule_;
  using Score = SoftmaxBy<One, Float8Weights>;
  using Operands = sm90::QuantizedOperands<Key, Float8E4M3, Float8E4M3>;
  static constexpr Score kScore{};
};

// Tiles of a list lie in its blocks, where these are as long; those of a band may be attention's.
struct BandTiles : Tiles<3, 3> {
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = {192, 128}, .stages = 3, .warpgroups = 3},
                                              Tiles<3, 3>::kForward[1]};
};

struct ListTiles : Tiles<4, 3> {
  static constexpr sm90::Config kForward[] = {BandTiles::kForward[0], Tiles<4, 3>::kForward[0],
                                              Tiles<4, 3>::kForward[1]};
};

// Values as they are.
template <class Key, class Value, class Schedule_>
struct WideValues : std::conditional_t<std::is_same_v<Schedule_, Band>, BandTiles, ListTiles> {
  using Schedule = Schedule_;
  using Score = SoftmaxBy<One, WeightsOf<Value>>;
  using Operands = sm90::QuantizedOperands<Key, Value, Value>;
  static constexpr Score kScore{};
};

template <class Variant>
Status run(const QuantizedAttention& p, const typename Variant::Schedule& schedule, Stream stream) {
  const int seq_q = static_cast<int>(p.q.seq()), seq_k = static_cast<int>(p.k.seq());
  const sm90::QuantizedScales scales{p.q_scales, p.k_scales, {{p.key_term, p.q.batch(), p.q.heads()}, seq_k},
                                     seq_q,      seq_k,      p.scale * kLog2E};
  const sm90::QuantizedOutput epilogue{p.out, p.lse, p.v_scales, p.v_mean, sm90::heads_per_kv_head(p.q, p.k), p.order};
  return sm90::run_forward<Variant>("quantized_attention",
                                    {p.q, p.k, p.v, schedule, Variant::kScore, epilogue, p.workspace, scales}, stream);
}

// Tokens of the result that no entry of the order names get zeros. Clearing the whole result before took 65 of 5,300 µs
// at CogVideoX's shape.
struct UnnamedTokens {
  Permutation order;
  TensorView out;
  float* lse;
  bool* named;  // like the order: whether an entry names the token

  static std::int64_t size(const QuantizedAttention& p) {
    return p.order.order == nullptr ? 0 : p.order.batch * p.order.heads * p.out.seq();
  }
};

constexpr int kHelperThreads = 256;

__global__ void __launch_bounds__(kHelperThreads) name_kernel(const __grid_constant__ UnnamedTokens p) {
  const std::int64_t seq = p.out.seq(), entry = std::int64_t{blockIdx.x} * kHelperThreads + threadIdx.x;
  if (entry < p.order.batch * p.order.heads * seq) {
    const int token = p.order.order[entry];
    if (0 <= token && token < seq) {
      p.named[entry / seq * seq + token] = true;
    }
  }
}

// A thread for each row of the result.
__global__ void __launch_bounds__(kHelperThreads) clear_kernel(const __grid_constant__ UnnamedTokens p) {
  const std::int64_t seq = p.out.seq(), row = std::int64_t{blockIdx.x} * kHelperThreads + threadIdx.x;
  const std::int64_t head = row / seq, token = row % seq, b = head / p.out.heads(), h = head % p.out.heads();
  if (b >= p.out.batch() || p.named[p.order.index(b, h) * seq + token]) {
    return;
  }
  auto* const values = p.out.row<std::uint16_t>(b, token, h);
  for (std::int64_t i = 0; i < p.out.head_dim(); ++i) {
    values[i] = 0;  // of either type
  }
  if (p.lse != nullptr) {
    p.lse[row] = 0.f;
  }
}

Status clear_unnamed(const QuantizedAttention& p, Stream stream) {
  const std::int64_t entries = UnnamedTokens::size(p), rows = p.out.batch() * p.out.heads() * p.out.seq();
  if (entries == 0) {
    return {};
  }
  if (p.workspace == nullptr) {
    return failure("quantized_attention: workspace has no data");
  }
  const UnnamedTokens tokens{p.order, p.out, p.lse, static_cast<bool*>(p.workspace) + kForwardWorkspace};
  Status status = sm90::clear(tokens.named, entries, stream);
  if (status.ok()) {
    status =
        sm90::launch(name_kernel, ceil_div<std::int64_t>(entries, kHelperThreads), kHelperThreads, 0, stream, tokens);
  }
  return status.ok() ? sm90::launch(clear_kernel, ceil_div<std::int64_t>(rows, kHelperThreads), kHelperThreads, 0,
                                    stream, tokens)
                     : status;
}

// What is compiled: integers with any values, and e4m3 throughout.
template <class Schedule>
Status run_on(const QuantizedAttention& p, const Schedule& schedule, Stream stream) {
  if (p.q.dtype == DType::kInt8) {
    switch (p.v.dtype) {
      case DType::kInt8:
        return run<Int8Values<std::int8_t, Schedule>>(p, schedule, stream);
      case DType::kFloat8:
        return run<Float8Values<std::int8_t, Schedule>>(p, schedule, stream);
      case DType::kBFloat16:
        return run<WideValues<std::int8_t, BFloat16, Schedule>>(p, schedule, stream);
      case DType::kFloat16:
        return run<WideValues<std::int8_t, Float16, Schedule>>(p, schedule, stream);
      case DType::kFloat32:
        break;
    }
  } else if (p.v.dtype == DType::kFloat8) {
    return run<Float8Values<Float8E4M3, Schedule>>(p, schedule, stream);
  }
  return failure(
      "quantized_attention: on the GPU int8 q and k go with v of int8, float8_e4m3fn, float16 or bfloat16, "
      "float8_e4m3fn ones with float8_e4m3fn");
}

}  // namespace

Status quantized_attention(const QuantizedAttention& p, Stream stream) {
  constexpr const char* kOp = "quantized_attention";
  if (const Status status = sm90::check_problem(kOp, p, p.out.dtype); !status.ok()) {
    return status;
  }
  if (p.q.head_dim() % 16 != 0) {
    return failure("%s: head_dim must be a multiple of 16 on the GPU, got %lld", kOp,
                   static_cast<long long>(p.q.head_dim()));
  }
  if (const Status status = clear_unnamed(p, stream); !status.ok()) {
    return status;
  }
  return p.blocks ? run_on(p, *p.blocks, stream) : run_on(p, band_of(p), stream);
}

std::size_t quantized_attention_workspace(const QuantizedAttention& p, Stream) {
  return kForwardWorkspace + UnnamedTokens::size(p) * sizeof(bool);
}

}  // namespace fastattn

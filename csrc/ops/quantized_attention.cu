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
#include "sm90/run.cuh"

namespace fastattn {
namespace {

// Values of 8 bits, whose weights are relative to their tile's own maximum.
template <class Key, class Value, class Weight, class Schedule_>
struct LowBitValues {
  using Schedule = Schedule_;
  using Score = TileSoftmax;
  using Operands = sm90::QuantizedOperands<Key, Value, Weight>;
  using Epilogue = sm90::QuantizedOutput;
  static constexpr Score kScore{Weight::kLargestLog2};
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 4, .warpgroups = 2},
                                              {.head_dim = 128, .tile = {128, 128}, .stages = 4, .warpgroups = 2}};
};

// Values as they are.
template <class Key, class Value, class Schedule_>
struct WideValues {
  using Schedule = Schedule_;
  using Score = SoftmaxBy<One>;
  using Operands = sm90::QuantizedOperands<Key, Value, Value>;
  using Epilogue = sm90::QuantizedOutput;
  static constexpr Score kScore{};
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 3, .warpgroups = 2},
                                              {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2}};
};

template <class Variant>
Status run(const QuantizedAttention& p, const typename Variant::Schedule& schedule, Stream stream) {
  const sm90::QuantizedScales scales{
      p.q_scales, p.k_scales, p.key_term, static_cast<int>(p.q.seq()), static_cast<int>(p.k.seq()), p.scale * kLog2E};
  const sm90::QuantizedOutput epilogue{p.out, p.lse, p.v_scales, p.v_mean, sm90::heads_per_kv_head(p.q, p.k), p.order};
  return sm90::run_forward<Variant>("quantized_attention",
                                    {p.q, p.k, p.v, schedule, Variant::kScore, epilogue, p.workspace, scales}, stream);
}

// What is compiled: integers with any values, and e4m3 throughout.
template <class Schedule>
Status run_on(const QuantizedAttention& p, const Schedule& schedule, Stream stream) {
  if (p.q.dtype == DType::kInt8) {
    switch (p.v.dtype) {
      case DType::kInt8:
        return run<LowBitValues<std::int8_t, std::int8_t, UInt8, Schedule>>(p, schedule, stream);
      case DType::kFloat8:
        return run<LowBitValues<std::int8_t, Float8E4M3, Float8E4M3, Schedule>>(p, schedule, stream);
      case DType::kBFloat16:
        return run<WideValues<std::int8_t, BFloat16, Schedule>>(p, schedule, stream);
      case DType::kFloat16:
        return run<WideValues<std::int8_t, Float16, Schedule>>(p, schedule, stream);
      case DType::kFloat32:
        break;
    }
  } else if (p.v.dtype == DType::kFloat8) {
    return run<LowBitValues<Float8E4M3, Float8E4M3, Float8E4M3, Schedule>>(p, schedule, stream);
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
  return p.blocks ? run_on(p, *p.blocks, stream) : run_on(p, band_of(p), stream);
}

}  // namespace fastattn

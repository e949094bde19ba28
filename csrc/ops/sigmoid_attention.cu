// `sigmoid_attention` on Hopper: sigmoid over a band, in bf16 and fp16. See sigmoid_attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/score/sigmoid.hpp"
#include "ops/validate.hpp"
#include "sm90/config.hpp"
#include "sm90/output.cuh"
#include "sm90/run_backward.cuh"
#include "sm90/run_forward.cuh"

namespace fastattn {
namespace {

template <class Element_>
struct SigmoidBand : sm90::GradientTiles {
  using Schedule = Band;
  using Score = Sigmoid;
  using Element = Element_;
  using Operands = sm90::PlainOperands<Element>;
  using Epilogue = sm90::Output<Element, false>;
  using Modifier = sm90::NoModifier;
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = {192, 128}, .stages = 2, .warpgroups = 3},
                                              {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2}};
  // With long rows, or a gradient of the bias, there are no registers for dQ of the tile before (C7512).
  static constexpr sm90::Config kGradients[] = {
      {.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2, .tile_behind = false}};
  static constexpr sm90::Config kGradientsWithBias[] = {
      {.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2, .tile_behind = false}, kGradients[1]};
  // Weights of 128 queries, tanh and all, spill in the kernel without dQ.
  static constexpr sm90::Config kKeyGradients[] = {{.head_dim = 64, .tile = {64, 128}, .stages = 2, .warpgroups = 2},
                                                   {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2}};
};

Sigmoid score_of(const SigmoidAttention& p) { return {p.scale * kLog2E, p.bias * kLog2E, p.head_bias}; }

}  // namespace

Status sigmoid_attention(const SigmoidAttention& p, Stream stream) {
  return sm90::run_if_valid("sigmoid_attention", p, p.q.dtype, [&]<class Element>() {
    return sm90::run_forward<SigmoidBand<Element>>(
        "sigmoid_attention", {p.q, p.k, p.v, band_of(p), score_of(p), {p.out, nullptr}, p.workspace}, stream);
  });
}

Status sigmoid_attention_backward(const SigmoidAttentionBackward& problem, Stream stream) {
  const SigmoidAttention& p = problem.forward;
  return sm90::run_if_valid("sigmoid_attention_backward", problem, p.q.dtype, [&]<class Element>() {
    return sm90::run_backward<SigmoidBand<Element>>("sigmoid_attention_backward",
                                                    {.q = p.q,
                                                     .k = p.k,
                                                     .v = p.v,
                                                     .dout = problem.dout,
                                                     .dq = problem.dq,
                                                     .dk = problem.dk,
                                                     .dv = problem.dv,
                                                     .schedule = band_of(p),
                                                     .score = score_of(p),
                                                     .scale = p.scale,
                                                     .dbias = problem.dbias,
                                                     .deterministic = problem.deterministic,
                                                     .workspace = problem.workspace},
                                                    stream);
  });
}

std::size_t sigmoid_attention_backward_workspace(const SigmoidAttentionBackward& problem, Stream) {
  return sm90::with_element(problem.forward.q.dtype, [&]<class Element>() {
    return sm90::backward_workspace<SigmoidBand<Element>>(problem, band_of(problem.forward));
  });
}

}  // namespace fastattn

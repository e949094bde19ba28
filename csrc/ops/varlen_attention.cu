// `varlen_attention` on Hopper: softmax over a band in each of many sequences, in bf16 and fp16. See
// varlen_attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/sequences.hpp"
#include "ops/softmax.cuh"
#include "ops/validate.hpp"
#include "sm90/config.hpp"

namespace fastattn {
namespace {

constexpr const char* kOp = "varlen_attention";

template <class Element>
struct Forward : SoftmaxOver<Element, SequenceBands> {
  using Score = WithSinks<SoftmaxBy<float, WeightsOf<Element>>>;
  static constexpr sm90::Config kForward[] = {
      {.head_dim = 64, .tile = {192, 128}, .stages = 2, .warpgroups = 3},
      {.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},  // for short sequences
      {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 192, .value_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2, .query_stages = 1},
      {.head_dim = 256, .tile = {128, 64}, .stages = 2, .warpgroups = 2, .query_stages = 1}};
};

// Of scores with a softcap.
template <class Element>
struct CappedForward : Forward<Element> {
  using Score = WithSinks<SoftmaxBy<One, WeightsOf<Element>>>;
  using Operands = sm90::ModifiedOperands<Element, true>;
  static constexpr sm90::Config kForward[] = {
      {.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 256, .tile = {128, 64}, .stages = 2, .warpgroups = 2, .query_stages = 1}};
};

template <class Variant>
Status run(const VarlenAttention& problem, const typename Variant::Score& score,
           const typename Variant::Operands::Scales& scales, Stream stream) {
  const Attention& p = problem.attention;
  return sm90::run_forward<Variant>(kOp, {p.q, p.k, p.v, bands_of(problem), score, {p.out, p.lse}, p.workspace, scales},
                                    stream);
}

}  // namespace

Status varlen_attention(const VarlenAttention& problem, Stream stream) {
  const Attention& p = problem.attention;
  return sm90::run_if_valid(kOp, problem, p.q.dtype, [&]<class Element>() {
    return p.softcap != 0.f ? run<CappedForward<Element>>(problem, {{}, p.sinks}, {{}, p.modifier().cap()}, stream)
                            : run<Forward<Element>>(problem, {{p.scale * kLog2E}, p.sinks}, {}, stream);
  });
}

}  // namespace fastattn

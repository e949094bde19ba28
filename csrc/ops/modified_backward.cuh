// The backward of a softmax whose scores have a softcap or a term for each key, over any family of schedules.
#pragma once

#include "ops/softmax.cuh"

namespace fastattn {

template <class Element, class Schedules, bool kCapped>
struct ModifiedBackward : SoftmaxOver<Element, Schedules>, sm90::NarrowGradientTiles {
  using Score = SoftmaxBy<One, WeightsOf<Element>>;
  using Modifier = sm90::Modifier<kCapped>;
};

// `problem` is one like AttentionBackward of `p`, judged before.
template <class Element, class Problem, class Schedules>
Status run_modified_backward(const char* op, const Problem& problem, const Attention& p, const Schedules& schedules,
                             Stream stream, float* dkey_bias) {
  const ScoreModifier modifier = p.modifier();
  const auto run = [&]<bool kCapped>(const auto& to_log2) {
    using Variant = ModifiedBackward<Element, Schedules, kCapped>;
    sm90::BackwardProblem<Variant> gradients = softmax_gradients<Variant>(problem, p, schedules);
    gradients.modifier = {to_log2, p.key_bias, static_cast<int>(padded_tokens(p.k.seq()))};
    gradients.dkey_bias = dkey_bias;
    return sm90::run_backward(op, gradients, stream);
  };
  return p.softcap != 0.f ? run.template operator()<true>(modifier.cap())
                          : run.template operator()<false>(modifier.scale_log2());
}

template <class Element, class Problem, class Schedules>
std::size_t modified_backward_workspace(const Problem& problem, const Schedules& schedules) {
  return sm90::backward_workspace<ModifiedBackward<Element, Schedules, true>>(problem, schedules);
}

}  // namespace fastattn

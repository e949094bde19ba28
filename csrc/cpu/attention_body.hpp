// The body of attention_<instruction set>.cpp.
#pragma once

#include "softmax_body.hpp"

namespace fastattn::cpu {

template <class Isa, class Schedules>
void attention_forward(const Attention& p, const Schedules& schedules, const Threads& threads) {
  with_element(p.q.dtype, [&]<class Element>() {
    const PlainOperands<Element> plain{p.q, p.k, p.v, p.out, p.lse};
    if (const ScoreModifier modifier = p.modifier(); modifier.exists()) {
      const ModifiedOperands<Element> operands{plain, modifier};
      forward<Isa>(operands, schedules, WithSinks<SoftmaxBy<One>>{{}, p.sinks}, threads);
    } else {
      forward<Isa>(plain, schedules, WithSinks<Softmax>{{p.scale * kLog2E}, p.sinks}, threads);
    }
  });
}

// Of the problem p.
template <class Isa, class Schedules>
void attention_backward(BackwardTensors tensors, const Attention& p, const Schedules& schedules,
                        const Threads& threads) {
  tensors.modifier = p.modifier();
  with_element(p.q.dtype, [&]<class Element>() {
    if constexpr (!std::is_same_v<Schedules, Regions>) {
      if (tensors.modifier.exists()) {
        backward<Isa, Element, kBackwardTile, true>(tensors, schedules, SoftmaxBy<One>{}, p.scale, threads);
        return;
      }
    }
    const Softmax score{p.scale * kLog2E};
    if constexpr (std::is_same_v<Schedules, Bands>) {
      if (suits_wide_tiles(p.q, p.k)) {
        backward<Isa, Element, kWideBackwardTile>(tensors, schedules, score, p.scale, threads);
        return;
      }
    }
    backward<Isa, Element>(tensors, schedules, score, p.scale, threads);
  });
}

template <class Isa, class Schedules>
void attention_backward(const AttentionBackward& problem, const Schedules& schedules, const Threads& threads) {
  BackwardTensors tensors = softmax_tensors(problem, problem.forward);
  tensors.dkey_bias = problem.dkey_bias;
  attention_backward<Isa>(tensors, problem.forward, schedules, threads);
}

template <class Isa>
constexpr AttentionKernels attention_kernels() {
  return {{attention_forward<Isa, Bands>, attention_backward<Isa, Bands>},
          {attention_forward<Isa, Regions>, attention_backward<Isa, Regions>}};
}

}  // namespace fastattn::cpu

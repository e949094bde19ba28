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

template <class Isa>
constexpr AttentionKernels attention_kernels() {
  return {attention_forward<Isa, Bands>, softmax_backward<Isa, kBackwardTile, AttentionBackward, Bands>,
          attention_forward<Isa, Regions>};
}

}  // namespace fastattn::cpu

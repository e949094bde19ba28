// The body of varlen_attention_<instruction set>.cpp.
#pragma once

#include "attention_body.hpp"

namespace fastattn::cpu {

template <class Isa>
constexpr VarlenAttentionKernels varlen_attention_kernels() {
  return {
      [](const VarlenAttention& problem, const SequenceBands& schedules, const Threads& threads) {
        attention_forward<Isa>(problem.attention, schedules, threads);
      },
      [](const VarlenAttentionBackward& problem, const SequenceBands& schedules, const Threads& threads) {
        const Attention& p = problem.forward.attention;
        attention_backward<Isa>(softmax_tensors(problem, p), p, schedules, threads);
      },
  };
}

}  // namespace fastattn::cpu

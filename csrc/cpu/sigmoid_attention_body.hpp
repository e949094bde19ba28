// The body of sigmoid_attention_<instruction set>.cpp.
#pragma once

#include "fastattn/cpu/backward.hpp"
#include "fastattn/score/sigmoid.hpp"
#include "kernels.hpp"

namespace fastattn::cpu {

template <class Isa>
constexpr SigmoidAttentionKernels sigmoid_attention_kernels() {
  return {
      [](const SigmoidAttention& p, const Band& band, const Threads& threads) {
        const Sigmoid score{p.scale * kLog2E, p.bias * kLog2E, p.head_bias};
        with_element(p.q.dtype, [&]<class Element>() {
          forward<Isa>(PlainOperands<Element>{p.q, p.k, p.v, p.out}, band, score, threads);
        });
      },
      [](const SigmoidAttentionBackward& problem, const Band& band, const Threads& threads) {
        const SigmoidAttention& p = problem.forward;
        const Sigmoid score{p.scale * kLog2E, p.bias * kLog2E, p.head_bias};
        const BackwardTensors tensors{.q = p.q,
                                      .k = p.k,
                                      .v = p.v,
                                      .out = {},
                                      .dout = problem.dout,
                                      .dq = problem.dq,
                                      .dk = problem.dk,
                                      .dv = problem.dv,
                                      .dbias = problem.dbias,
                                      .row_terms = static_cast<float*>(problem.workspace)};
        with_element(p.q.dtype,
                     [&]<class Element>() { backward<Isa, Element>(tensors, band, score, p.scale, threads); });
      },
  };
}

}  // namespace fastattn::cpu

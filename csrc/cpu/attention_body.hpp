// The body of attention_<instruction set>.cpp.
#pragma once

#include "fastattn/cpu/backward.hpp"
#include "fastattn/score/softmax.hpp"
#include "kernels.hpp"

namespace fastattn::cpu {

template <class Isa>
constexpr AttentionKernels attention_kernels() {
  return {
      [](const Attention& p, const Band& band, const Threads& threads) {
        with_element(p.q.dtype, [&]<class Element>() {
          forward<Isa, Element>({p.q, p.k, p.v, p.out, p.lse}, band, Softmax{p.scale * kLog2E}, threads);
        });
      },
      [](const AttentionBackward& problem, const Band& band, const Threads& threads) {
        const Attention& p = problem.forward;
        const BackwardTensors tensors{.q = p.q,
                                      .k = p.k,
                                      .v = p.v,
                                      .out = p.out,
                                      .dout = problem.dout,
                                      .dq = problem.dq,
                                      .dk = problem.dk,
                                      .dv = problem.dv,
                                      .lse = p.lse,
                                      .dlse = problem.dlse,
                                      .dbias = nullptr,
                                      .row_terms = static_cast<float*>(problem.workspace)};
        with_element(p.q.dtype, [&]<class Element>() {
          backward<Isa, Element>(tensors, band, Softmax{p.scale * kLog2E}, p.scale, threads);
        });
      },
  };
}

}  // namespace fastattn::cpu

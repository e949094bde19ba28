// The body of attention_<instruction set>.cpp.
#pragma once

#include "attention_kernels.hpp"
#include "fastattn/cpu/backward.hpp"
#include "fastattn/score/softmax.hpp"

namespace fastattn::cpu {

template <class Isa, class Element>
void attention_forward(const Attention& p, const Band& band, const Threads& threads) {
  const auto schedule_of = [&](std::int64_t, std::int64_t) { return band; };
  forward<Isa, Element>({p.q, p.k, p.v, p.out, p.lse}, schedule_of, Softmax{p.scale * kLog2E}, threads);
}

template <class Isa, class Element>
void attention_backward(const AttentionBackward& problem, const Band& band, const Threads& threads) {
  const Attention& p = problem.forward;
  const auto schedule_of = [&](std::int64_t, std::int64_t) { return band; };
  const BackwardTensors tensors{p.q,
                                p.k,
                                p.v,
                                p.out,
                                problem.dout,
                                problem.dq,
                                problem.dk,
                                problem.dv,
                                p.lse,
                                problem.dlse,
                                static_cast<float*>(problem.workspace)};
  backward<Isa, Element>(tensors, schedule_of, Softmax{p.scale * kLog2E}, p.scale, threads);
}

template <class Isa>
constexpr AttentionKernels attention_kernels() {
  return {
      [](const Attention& problem, const Band& band, const Threads& threads) {
        switch (problem.q.dtype) {
          case DType::kFloat32:
            return attention_forward<Isa, float>(problem, band, threads);
          case DType::kFloat16:
            return attention_forward<Isa, Float16>(problem, band, threads);
          case DType::kBFloat16:
            return attention_forward<Isa, BFloat16>(problem, band, threads);
        }
      },
      [](const AttentionBackward& problem, const Band& band, const Threads& threads) {
        switch (problem.forward.q.dtype) {
          case DType::kFloat32:
            return attention_backward<Isa, float>(problem, band, threads);
          case DType::kFloat16:
            return attention_backward<Isa, Float16>(problem, band, threads);
          case DType::kBFloat16:
            return attention_backward<Isa, BFloat16>(problem, band, threads);
        }
      },
  };
}

}  // namespace fastattn::cpu

// The body of <op>_<instruction set>.cpp for ops whose score is the softmax: they differ in their schedules and tiles.
#pragma once

#include "fastattn/cpu/backward.hpp"
#include "fastattn/score/softmax.hpp"
#include "kernels.hpp"

namespace fastattn::cpu {

struct Tiles {
  TileShape forward, backward;
};

// `problem` is one like AttentionBackward, of `p`.
template <class Problem, class Forward>
FASTATTN_HD BackwardTensors softmax_tensors(const Problem& problem, const Forward& p) {
  return {.q = p.q,
          .k = p.k,
          .v = p.v,
          .out = p.out,
          .dout = problem.dout,
          .dq = problem.dq,
          .dk = problem.dk,
          .dv = problem.dv,
          .lse = p.lse,
          .dlse = problem.dlse,
          .row_terms = static_cast<float*>(problem.workspace)};
}

template <class Isa, TileShape kTile, class Problem, class Schedules>
void softmax_backward(const Problem& problem, const Schedules& schedules, const Threads& threads) {
  const auto& p = problem.forward;
  const BackwardTensors tensors = softmax_tensors(problem, p);
  with_element(p.q.dtype, [&]<class Element>() {
    backward<Isa, Element, kTile>(tensors, schedules, Softmax{p.scale * kLog2E}, p.scale, threads);
  });
}

template <class Isa, class Table, Tiles kTiles = Tiles{kForwardTile, kBackwardTile}>
constexpr Table softmax_kernels() {
  using Schedules = typename Table::Schedules;
  return {
      [](const typename Table::Forward& p, const Schedules& schedules, const Threads& threads) {
        with_element(p.q.dtype, [&]<class Element>() {
          const PlainOperands<Element> operands{p.q, p.k, p.v, p.out, p.lse};
          forward<Isa, kTiles.forward>(operands, schedules, Softmax{p.scale * kLog2E}, threads);
        });
      },
      softmax_backward<Isa, kTiles.backward, typename Table::Backward, Schedules>,
  };
}

}  // namespace fastattn::cpu

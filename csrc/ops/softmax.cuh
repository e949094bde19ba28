// What the ops that take a softmax over some schedule share on Hopper.
#pragma once

#include "fastattn/score/softmax.hpp"
#include "sm90/output.cuh"
#include "sm90/run_backward.cuh"
#include "sm90/run_forward.cuh"

namespace fastattn {

// A variant of the kernels but for its configurations.
template <class Element_, class Schedule_>
struct SoftmaxOver {
  using Schedule = Schedule_;
  using Element = Element_;
  using Score = SoftmaxBy<float, WeightsOf<Element>>;
  using Operands = sm90::PlainOperands<Element>;
  using Epilogue = sm90::Output<Element, true>;
  using Modifier = sm90::NoModifier;
};

// `p` is a problem like Attention, judged before.
template <class Variant, class Problem>
Status softmax_forward(const char* op, const Problem& p, const typename Variant::Schedule& schedule, Stream stream) {
  return sm90::run_forward<Variant>(op, {p.q, p.k, p.v, schedule, {p.scale * kLog2E}, {p.out, p.lse}, p.workspace},
                                    stream);
}

// The score policy of products with this scale; modified ones come with it in them.
template <class Variant>
typename Variant::Score score_by(float scale) {
  if constexpr (Variant::Modifier::kExists) {
    return {};
  } else {
    return {scale * kLog2E};
  }
}

// `problem` is one like AttentionBackward, of `p`, judged before.
template <class Variant, class Problem, class Forward>
sm90::BackwardProblem<Variant> softmax_gradients(const Problem& problem, const Forward& p,
                                                 const typename Variant::Schedule& schedule) {
  return {.q = p.q,
          .k = p.k,
          .v = p.v,
          .dout = problem.dout,
          .dq = problem.dq,
          .dk = problem.dk,
          .dv = problem.dv,
          .out = p.out,
          .lse = p.lse,
          .dlse = problem.dlse,
          .schedule = schedule,
          .score = score_by<Variant>(p.scale),
          .scale = p.scale,
          .deterministic = problem.deterministic,
          .workspace = problem.workspace};
}

template <class Variant, class Problem>
Status softmax_backward(const char* op, const Problem& problem, const typename Variant::Schedule& schedule,
                        Stream stream) {
  return sm90::run_backward(op, softmax_gradients<Variant>(problem, problem.forward, schedule), stream);
}

}  // namespace fastattn

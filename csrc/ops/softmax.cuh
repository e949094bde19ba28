// What the ops that take a softmax over some schedule share on Hopper.
#pragma once

#include "fastattn/score/softmax.hpp"
#include "sm90/output.cuh"
#include "sm90/run.cuh"

namespace fastattn {

// A variant of the kernels but for its configurations.
template <class Element_, class Schedule_>
struct SoftmaxOver {
  using Schedule = Schedule_;
  using Element = Element_;
  using Score = SoftmaxBy<float, WeightsOf<Element>>;
  using Operands = sm90::PlainOperands<Element>;
  using Epilogue = sm90::Output<Element, true>;
};

// `p` is a problem like Attention, judged before.
template <class Variant, class Problem>
Status softmax_forward(const char* op, const Problem& p, const typename Variant::Schedule& schedule, Stream stream) {
  return sm90::run_forward<Variant>(op, {p.q, p.k, p.v, schedule, {p.scale * kLog2E}, {p.out, p.lse}, p.workspace},
                                    stream);
}

// `problem` is one like AttentionBackward, judged before.
template <class Variant, class Problem>
Status softmax_backward(const char* op, const Problem& problem, const typename Variant::Schedule& schedule,
                        Stream stream) {
  const auto& p = problem.forward;
  return sm90::run_backward<Variant>(op,
                                     {.q = p.q,
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
                                      .score = {p.scale * kLog2E},
                                      .scale = p.scale,
                                      .deterministic = problem.deterministic,
                                      .workspace = problem.workspace},
                                     stream);
}

}  // namespace fastattn

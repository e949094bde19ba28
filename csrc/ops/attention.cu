// `attention` on Hopper: softmax over a band, in bf16 and fp16. See attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/score/softmax.hpp"
#include "ops/validate.hpp"
#include "sm90/config.hpp"
#include "sm90/output.cuh"
#include "sm90/run.cuh"

namespace fastattn {
namespace {

template <class Element_>
struct SoftmaxBand {
  using Schedule = Band;
  using Score = Softmax;
  using Element = Element_;
  using Epilogue = sm90::Output<Element, true>;
  // By head_dim, ascending; the reasons and the times of the alternatives are in attention.md.
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = {192, 128}, .stages = 2, .warpgroups = 3},
                                              {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2}};
  static constexpr sm90::Config kBackward[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2}};
};

}  // namespace

Status attention(const Attention& p, Stream stream) {
  return sm90::run_if_valid("attention", p, p.q.dtype, [&]<class Element>() {
    return sm90::run_forward<SoftmaxBand<Element>>(
        "attention", {p.q, p.k, p.v, p.out, band_of(p), {p.scale * kLog2E}, p.lse}, stream);
  });
}

Status attention_backward(const AttentionBackward& problem, Stream stream) {
  const Attention& p = problem.forward;
  return sm90::run_if_valid("attention_backward", problem, p.q.dtype, [&]<class Element>() {
    return sm90::run_backward<SoftmaxBand<Element>>("attention_backward",
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
                                                     .schedule = band_of(p),
                                                     .score = {p.scale * kLog2E},
                                                     .scale = p.scale,
                                                     .workspace = problem.workspace},
                                                    stream);
  });
}

std::size_t attention_backward_workspace(const AttentionBackward& problem, Stream) {
  const TensorView& q = problem.forward.q;
  return sm90::with_element(q.dtype, [&]<class Element>() {
    return sm90::backward_workspace<SoftmaxBand<Element>>(q, band_of(problem.forward));
  });
}

}  // namespace fastattn

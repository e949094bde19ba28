// `attention` on Hopper: softmax over a band, in bf16 and fp16. See attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "ops/softmax.cuh"
#include "ops/validate.hpp"
#include "sm90/config.hpp"

namespace fastattn {
namespace {

template <class Element>
struct SoftmaxBand : SoftmaxOver<Element, Band> {
  // By head_dim, ascending; the reasons are in attention.md.
  static constexpr sm90::Config kForward[] = {
      {.head_dim = 32, .tile = {256, 64}, .stages = 2, .warpgroups = 4},
      {.head_dim = 64, .tile = {192, 128}, .stages = 2, .warpgroups = 3},
      {.head_dim = 96, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 192, .tile = {128, 64}, .stages = 2, .warpgroups = 2},
      {.head_dim = 256, .tile = {128, 64}, .stages = 2, .warpgroups = 2, .query_stages = 1}};
  static constexpr sm90::Config kBackward[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2}};
};

}  // namespace

Status attention(const Attention& p, Stream stream) {
  constexpr const char* kOp = "attention";
  return sm90::run_if_valid(kOp, p, p.q.dtype, [&]<class Element>() {
    return softmax_forward<SoftmaxBand<Element>>(kOp, p, band_of(p), stream);
  });
}

Status attention_backward(const AttentionBackward& problem, Stream stream) {
  constexpr const char* kOp = "attention_backward";
  return sm90::run_if_valid(kOp, problem, problem.forward.q.dtype, [&]<class Element>() {
    return softmax_backward<SoftmaxBand<Element>>(kOp, problem, band_of(problem.forward), stream);
  });
}

std::size_t attention_backward_workspace(const AttentionBackward& problem, Stream) {
  const TensorView& q = problem.forward.q;
  return sm90::with_element(q.dtype, [&]<class Element>() {
    return sm90::backward_workspace<SoftmaxBand<Element>>(q, band_of(problem.forward));
  });
}

}  // namespace fastattn

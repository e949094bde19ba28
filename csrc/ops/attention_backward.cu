// The backward of `attention` on Hopper: softmax over a band, in bf16 and fp16. See attention.md.
#include <cstddef>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "ops/softmax.cuh"
#include "ops/validate.hpp"

namespace fastattn {
namespace {

constexpr const char* kOp = "attention_backward";

template <class Element, class Schedule>
struct Backward : SoftmaxOver<Element, Schedule>, sm90::SeparateGradientTiles {};

// Calls run.operator()<Variant>(schedule): windows of each head's own cost partial tiles instructions.
template <class Element, class Run>
auto with_schedule(const Attention& p, Run&& run) {
  return p.head_left == nullptr && p.head_right == nullptr
             ? run.template operator()<Backward<Element, Band>>(band_of(p))
             : run.template operator()<Backward<Element, Bands>>(bands_of(p));
}

Status check_features(const Attention& p) {
  if (p.modifier().exists()) {
    return failure("%s: gradients with softcap or key_bias are not available on the GPU yet", kOp);
  }
  if (p.has_regions()) {
    return failure("%s: gradients with rectangles or segments are not available on the GPU yet", kOp);
  }
  if (p.v.head_dim() != p.q.head_dim()) {
    return failure("%s: gradients where v has another head_dim than q are not available on the GPU yet", kOp);
  }
  return {};
}

}  // namespace

Status attention_backward(const AttentionBackward& problem, Stream stream) {
  const Attention& p = problem.forward;
  return sm90::run_if_valid(kOp, problem, p.q.dtype, [&]<class Element>() {
    if (const Status status = check_features(p); !status.ok()) {
      return status;
    }
    if (num_rows(p) > 0 && problem.workspace == nullptr) {
      return failure("%s: workspace has no data", kOp);
    }
    return with_schedule<Element>(p, [&]<class Variant>(const auto& schedule) {
      return softmax_backward<Variant>(kOp, problem, schedule, stream);
    });
  });
}

std::size_t attention_backward_workspace(const AttentionBackward& problem, Stream) {
  const Attention& p = problem.forward;
  return sm90::with_element(p.q.dtype, [&]<class Element>() {
    return with_schedule<Element>(
        p, [&]<class Variant>(const auto& schedule) { return sm90::backward_workspace<Variant>(problem, schedule); });
  });
}

}  // namespace fastattn

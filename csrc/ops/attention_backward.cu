// The backward of `attention` on Hopper: softmax over a band or regions, in bf16 and fp16. See attention.md.
#include <cstddef>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/schedule/regions.hpp"
#include "ops/modified_backward.cuh"
#include "ops/softmax.cuh"
#include "ops/validate.hpp"
#include "sm90/survey.hpp"

namespace fastattn {
namespace {

constexpr const char* kOp = "attention_backward";

template <class Element, class Schedule>
struct Backward : SoftmaxOver<Element, Schedule>, sm90::WideGradientTiles {};

template <class Element>
struct RegionBackward : SoftmaxOver<Element, Regions>, sm90::NarrowGradientTiles {};

// After the kernels' part of the workspace.
template <class Element>
std::size_t survey_offset(const AttentionBackward& problem) {
  constexpr std::size_t kAlignment = 256;
  const std::size_t bytes =
      sm90::backward_workspace<RegionBackward<Element>>(problem, regions_of(problem.forward, nullptr));
  return ceil_div(bytes, kAlignment) * kAlignment;
}

template <class Element>
Status run_in_regions(const AttentionBackward& problem, Stream stream) {
  std::byte* const survey = static_cast<std::byte*>(problem.workspace) + survey_offset<Element>(problem);
  const Regions regions = regions_of(problem.forward, survey);
  if (regions.segments.exist()) {
    if (const Status status = sm90::survey_segments(regions, stream); !status.ok()) {
      return status;
    }
  }
  return softmax_backward<RegionBackward<Element>>(kOp, problem, regions, stream);
}

// Calls run.operator()<Variant>(schedule) for scores that are not modified: windows of each head's own cost partial
// tiles instructions.
template <class Element, class Run>
auto with_schedule(const Attention& p, Run&& run) {
  return p.head_left == nullptr && p.head_right == nullptr
             ? run.template operator()<Backward<Element, Band>>(band_of(p))
             : run.template operator()<Backward<Element, Bands>>(bands_of(p));
}

}  // namespace

Status attention_backward(const AttentionBackward& problem, Stream stream) {
  const Attention& p = problem.forward;
  return sm90::run_if_valid(kOp, problem, p.q.dtype, [&]<class Element>() {
    if (num_rows(p) > 0 && problem.workspace == nullptr) {
      return failure("%s: workspace has no data", kOp);
    }
    if (p.modifier().exists()) {
      return run_modified_backward<Element>(kOp, problem, p, bands_of(p), stream, problem.dkey_bias);
    }
    if (p.has_regions()) {
      return run_in_regions<Element>(problem, stream);
    }
    return with_schedule<Element>(p, [&]<class Variant>(const auto& schedule) {
      return softmax_backward<Variant>(kOp, problem, schedule, stream);
    });
  });
}

std::size_t attention_backward_workspace(const AttentionBackward& problem, Stream) {
  const Attention& p = problem.forward;
  return sm90::with_element(p.q.dtype, [&]<class Element>() {
    if (p.modifier().exists()) {
      return modified_backward_workspace<Element>(problem, bands_of(p));
    }
    if (p.has_regions()) {
      return survey_offset<Element>(problem) + survey_bytes(p);
    }
    return with_schedule<Element>(
        p, [&]<class Variant>(const auto& schedule) { return sm90::backward_workspace<Variant>(problem, schedule); });
  });
}

}  // namespace fastattn

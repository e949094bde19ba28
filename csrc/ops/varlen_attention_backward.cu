// The backward of `varlen_attention` on Hopper, in bf16 and fp16. See varlen_attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/sequences.hpp"
#include "ops/modified_backward.cuh"
#include "ops/softmax.cuh"
#include "ops/validate.hpp"

namespace fastattn {
namespace {

constexpr const char* kOp = "varlen_attention_backward";

template <class Element>
struct Backward : SoftmaxOver<Element, SequenceBands>, sm90::WideGradientTiles {};

}  // namespace

Status varlen_attention_backward(const VarlenAttentionBackward& problem, Stream stream) {
  const Attention& p = problem.forward.attention;
  return sm90::run_if_valid(kOp, problem, p.q.dtype, [&]<class Element>() {
    if (num_rows(p) > 0 && problem.workspace == nullptr) {
      return failure("%s: workspace has no data", kOp);
    }
    const SequenceBands schedules = bands_of(problem.forward);
    return p.softcap != 0.f
               ? run_modified_backward<Element>(kOp, problem, p, schedules, stream, nullptr)
               : sm90::run_backward(kOp, softmax_gradients<Backward<Element>>(problem, p, schedules), stream);
  });
}

std::size_t varlen_attention_backward_workspace(const VarlenAttentionBackward& problem, Stream) {
  return sm90::with_element(problem.forward.attention.q.dtype, [&]<class Element>() {
    const SequenceBands schedules = bands_of(problem.forward);
    return problem.forward.attention.softcap != 0.f ? modified_backward_workspace<Element>(problem, schedules)
                                                    : sm90::backward_workspace<Backward<Element>>(problem, schedules);
  });
}

}  // namespace fastattn

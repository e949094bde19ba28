// attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/cpu/parallel.hpp"
#include "fastattn/cpu/survey.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

static_assert(kMaxHeadDim <= cpu::kMaxHeadDim);

const cpu::AttentionKernels* kernels() { return cpu::best_of(cpu::kAttentionAvx2, cpu::kAttentionAvx512); }

}  // namespace

Status attention(const Attention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("attention");
  }
  if (!problem.has_regions()) {
    kernels()->forward(problem, bands_of(problem), threads);
    return {};
  }
  const Regions regions = regions_of(problem, problem.workspace);
  if (regions.segments.exist()) {
    if (problem.workspace == nullptr) {
      return failure("attention: workspace has no data");
    }
    cpu::survey_segments(regions, threads);
  }
  kernels()->forward_in_regions(problem, regions, threads);
  return {};
}

std::size_t attention_workspace(const Attention& problem, const Threads&) { return survey_bytes(problem); }

// The log-sum-exp in base 2 and delta of every row.
std::size_t attention_backward_workspace(const AttentionBackward& problem, const Threads&) {
  return 2 * sizeof(float) * static_cast<std::size_t>(num_rows(problem.forward));
}

Status attention_backward(const AttentionBackward& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  if (num_rows(problem.forward) > 0 && problem.workspace == nullptr) {
    return failure("attention_backward: workspace has no data");
  }
  if (const Attention& forward = problem.forward;
      forward.modifier().exists() || forward.has_regions() || forward.v.head_dim() != forward.q.head_dim()) {
    return failure(
        "attention_backward: gradients of modified scores, in regions or with values of their own width are "
        "not available on a CPU yet");
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("attention_backward");
  }
  kernels()->backward(problem, bands_of(problem.forward), threads);
  return {};
}

#if !FASTATTN_WITH_CUDA

Status attention(const Attention&, Stream) { return built_without_cuda("attention"); }

std::size_t attention_workspace(const Attention&, Stream) { return 0; }

std::size_t attention_backward_workspace(const AttentionBackward&, Stream) { return 0; }

Status attention_backward(const AttentionBackward&, Stream) { return built_without_cuda("attention_backward"); }

#endif

}  // namespace fastattn

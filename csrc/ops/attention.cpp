// attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include <cstddef>

#include "cpu/kernels.hpp"
#include "fastattn/cpu/parallel.hpp"
#include "fastattn/cpu/survey.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

static_assert(kMaxHeadDim <= cpu::kMaxHeadDim);

const cpu::AttentionKernels* kernels() { return cpu::best_of(cpu::kAttentionAvx2, cpu::kAttentionAvx512); }

std::size_t row_terms_bytes(const Attention& problem) {
  return 2 * sizeof(float) * static_cast<std::size_t>(num_rows(problem));
}

// `survey`: as regions_of() has it.
Regions surveyed_regions(const Attention& problem, void* survey, const Threads& threads) {
  const Regions regions = regions_of(problem, survey);
  if (regions.segments.exist()) {
    cpu::survey_segments(regions, threads);
  }
  return regions;
}

}  // namespace

Status attention(const Attention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("attention");
  }
  if (problem.segments.exist() && problem.workspace == nullptr) {
    return failure("attention: workspace has no data");
  }
  if (!problem.has_regions()) {
    kernels()->in_bands.forward(problem, bands_of(problem), threads);
  } else {
    kernels()->in_regions.forward(problem, surveyed_regions(problem, problem.workspace, threads), threads);
  }
  return {};
}

std::size_t attention_workspace(const Attention& problem, const Threads&) { return survey_bytes(problem); }

// The log-sum-exp in base 2 and delta of every row, then the survey of segments.
std::size_t attention_backward_workspace(const AttentionBackward& problem, const Threads&) {
  return row_terms_bytes(problem.forward) + survey_bytes(problem.forward);
}

Status attention_backward(const AttentionBackward& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  const Attention& forward = problem.forward;
  if (num_rows(forward) > 0 && problem.workspace == nullptr) {
    return failure("attention_backward: workspace has no data");
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("attention_backward");
  }
  // Without queries there are no scores, of which a region could hold some.
  if (!forward.has_regions() || num_rows(forward) == 0) {
    kernels()->in_bands.backward(problem, bands_of(forward), threads);
  } else {
    void* const survey = static_cast<std::byte*>(problem.workspace) + row_terms_bytes(forward);
    kernels()->in_regions.backward(problem, surveyed_regions(forward, survey, threads), threads);
  }
  return {};
}

#if !FASTATTN_WITH_CUDA

Status attention(const Attention&, Stream) { return built_without_cuda("attention"); }

std::size_t attention_workspace(const Attention&, Stream) { return 0; }

std::size_t attention_backward_workspace(const AttentionBackward&, Stream) { return 0; }

Status attention_backward(const AttentionBackward&, Stream) { return built_without_cuda("attention_backward"); }

#endif

}  // namespace fastattn

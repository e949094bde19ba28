// attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/attention_kernels.hpp"
#include "cpu/instruction_set.hpp"
#include "fastattn/cpu/parallel.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

static_assert(kMaxHeadDim <= cpu::kMaxHeadDim);

// Null where this machine lacks AVX2.
const cpu::AttentionKernels* kernels() {
  switch (cpu::instruction_set()) {
    case cpu::InstructionSet::kAvx512:
      return &cpu::kAttentionAvx512;
    case cpu::InstructionSet::kAvx2:
      return &cpu::kAttentionAvx2;
    case cpu::InstructionSet::kNone:
      break;
  }
  return nullptr;
}

Status no_kernels(const char* op) {
  return failure("%s: the CPU kernels need a processor with AVX2, FMA and F16C", op);
}

}  // namespace

Status attention(const Attention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  if (kernels() == nullptr) {
    return no_kernels("attention");
  }
  kernels()->forward(problem, band_of(problem), threads);
  return {};
}

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
  if (kernels() == nullptr) {
    return no_kernels("attention_backward");
  }
  kernels()->backward(problem, band_of(problem.forward), threads);
  return {};
}

#if FASTATTN_WITH_CUDA

bool built_with_cuda() { return true; }

#else

bool built_with_cuda() { return false; }

Status attention(const Attention&, Stream) {
  return failure("attention: this fastattn is built without CUDA; its tensors must be on the CPU");
}

std::size_t attention_backward_workspace(const AttentionBackward&, Stream) { return 0; }

Status attention_backward(const AttentionBackward&, Stream) {
  return failure("attention_backward: this fastattn is built without CUDA; its tensors must be on the CPU");
}

#endif

}  // namespace fastattn

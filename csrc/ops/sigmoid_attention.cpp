// sigmoid_attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

const cpu::SigmoidAttentionKernels* kernels() {
  return cpu::best_of(cpu::kSigmoidAttentionAvx2, cpu::kSigmoidAttentionAvx512);
}

}  // namespace

Status sigmoid_attention(const SigmoidAttention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("sigmoid_attention");
  }
  kernels()->forward(problem, band_of(problem), threads);
  return {};
}

// Two floats a row, of which the bias gradient uses one.
std::size_t sigmoid_attention_backward_workspace(const SigmoidAttentionBackward& problem, const Threads&) {
  return 2 * sizeof(float) * static_cast<std::size_t>(num_rows(problem.forward));
}

Status sigmoid_attention_backward(const SigmoidAttentionBackward& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  if (num_rows(problem.forward) > 0 && problem.workspace == nullptr) {
    return failure("sigmoid_attention_backward: workspace has no data");
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("sigmoid_attention_backward");
  }
  kernels()->backward(problem, band_of(problem.forward), threads);
  return {};
}

#if !FASTATTN_WITH_CUDA

Status sigmoid_attention(const SigmoidAttention&, Stream) { return built_without_cuda("sigmoid_attention"); }

std::size_t sigmoid_attention_backward_workspace(const SigmoidAttentionBackward&, Stream) { return 0; }

Status sigmoid_attention_backward(const SigmoidAttentionBackward&, Stream) {
  return built_without_cuda("sigmoid_attention_backward");
}

#endif

}  // namespace fastattn

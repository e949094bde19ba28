// quantized_attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

Status quantized_attention(const QuantizedAttention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  const auto* kernels = cpu::best_of(cpu::kQuantizedAttentionAvx2, cpu::kQuantizedAttentionAvx512);
  if (kernels == nullptr) {
    return no_cpu_kernels("quantized_attention");
  }
  if (problem.blocks) {
    kernels->of_blocks(problem, *problem.blocks, threads);
  } else {
    kernels->of_band(problem, band_of(problem), threads);
  }
  return {};
}

#if !FASTATTN_WITH_CUDA

Status quantized_attention(const QuantizedAttention&, Stream) { return built_without_cuda("quantized_attention"); }

#endif

}  // namespace fastattn

// quantize_tokens on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

Status quantize_tokens(const QuantizeTokens& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  const auto* kernels = cpu::best_of(cpu::kQuantizeTokensAvx2, cpu::kQuantizeTokensAvx512);
  if (kernels == nullptr) {
    return no_cpu_kernels("quantize_tokens");
  }
  kernels->run(problem, threads);
  return {};
}

std::size_t quantize_tokens_workspace(const QuantizeTokens&, const Threads&) { return 0; }

#if !FASTATTN_WITH_CUDA

Status quantize_tokens(const QuantizeTokens&, Stream) { return built_without_cuda("quantize_tokens"); }

std::size_t quantize_tokens_workspace(const QuantizeTokens&, Stream) { return 0; }

#endif

}  // namespace fastattn

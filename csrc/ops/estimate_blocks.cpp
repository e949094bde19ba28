// estimate_blocks on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

Status estimate_blocks(const EstimateBlocks& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  const auto* kernels = cpu::best_of(cpu::kEstimateBlocksAvx2, cpu::kEstimateBlocksAvx512);
  if (kernels == nullptr) {
    return no_cpu_kernels("estimate_blocks");
  }
  kernels->run(problem, threads);
  return {};
}

std::size_t estimate_blocks_workspace(const EstimateBlocks&, const Threads&) { return 0; }

#if !FASTATTN_WITH_CUDA

Status estimate_blocks(const EstimateBlocks&, Stream) { return built_without_cuda("estimate_blocks"); }

std::size_t estimate_blocks_workspace(const EstimateBlocks&, Stream) { return 0; }

#endif

}  // namespace fastattn

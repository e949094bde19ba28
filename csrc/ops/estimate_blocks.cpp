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

Status estimate_blocks(const EstimateBlocks&, Stream) {
  return failure("estimate_blocks: q must be on the CPU: there is no GPU kernel of this op yet");
}

}  // namespace fastattn

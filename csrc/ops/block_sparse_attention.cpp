// block_sparse_attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

const cpu::BlockSparseAttentionKernels* kernels() {
  return cpu::best_of(cpu::kBlockSparseAttentionAvx2, cpu::kBlockSparseAttentionAvx512);
}

}  // namespace

Status block_sparse_attention(const BlockSparseAttention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("block_sparse_attention");
  }
  kernels()->forward(problem, problem.blocks, threads);
  return {};
}

// The log-sum-exp in base 2 and delta of every row.
std::size_t block_sparse_attention_backward_workspace(const BlockSparseAttentionBackward& problem, const Threads&) {
  return 2 * sizeof(float) * static_cast<std::size_t>(num_rows(problem.forward));
}

Status block_sparse_attention_backward(const BlockSparseAttentionBackward& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  if (num_rows(problem.forward) > 0 && problem.workspace == nullptr) {
    return failure("block_sparse_attention_backward: workspace has no data");
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("block_sparse_attention_backward");
  }
  kernels()->backward(problem, problem.forward.blocks, threads);
  return {};
}

#if !FASTATTN_WITH_CUDA

Status block_sparse_attention(const BlockSparseAttention&, Stream) {
  return built_without_cuda("block_sparse_attention");
}

std::size_t block_sparse_attention_backward_workspace(const BlockSparseAttentionBackward&, Stream) { return 0; }

Status block_sparse_attention_backward(const BlockSparseAttentionBackward&, Stream) {
  return built_without_cuda("block_sparse_attention_backward");
}

#endif

}  // namespace fastattn

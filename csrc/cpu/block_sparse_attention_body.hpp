// The body of block_sparse_attention_<instruction set>.cpp.
#pragma once

#include "softmax_body.hpp"

namespace fastattn::cpu {

// A tile lies in one block, of either size: nothing of a block that is not listed is read.
template <class Isa>
constexpr BlockSparseAttentionKernels block_sparse_attention_kernels() {
  return softmax_kernels<Isa, BlockSparseAttentionKernels, Tiles{{64, 64}, {64, 64}}>();
}

}  // namespace fastattn::cpu

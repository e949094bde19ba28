// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "block_sparse_attention_body.hpp"

namespace fastattn::cpu {

constinit const BlockSparseAttentionKernels kBlockSparseAttentionAvx2 = block_sparse_attention_kernels<Avx2>();

}  // namespace fastattn::cpu

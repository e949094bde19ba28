// Compiled with -O3 -mavx2 -mfma -mf16c -mavx512f -mavx512dq -ffp-contract=fast, whatever the build type.
#include "estimate_blocks_body.hpp"

namespace fastattn::cpu {

constinit const EstimateBlocksKernels kEstimateBlocksAvx512 = estimate_blocks_kernels<Avx512>();

}  // namespace fastattn::cpu

// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "estimate_blocks_body.hpp"

namespace fastattn::cpu {

constinit const EstimateBlocksKernels kEstimateBlocksAvx2 = estimate_blocks_kernels<Avx2>();

}  // namespace fastattn::cpu

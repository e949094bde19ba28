// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "neighborhood_attention_body.hpp"

namespace fastattn::cpu {

constinit const NeighborhoodAttentionKernels kNeighborhoodAttentionAvx2 = neighborhood_attention_kernels<Avx2>();

}  // namespace fastattn::cpu

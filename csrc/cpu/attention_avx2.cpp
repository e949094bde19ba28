// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "softmax_body.hpp"

namespace fastattn::cpu {

constinit const AttentionKernels kAttentionAvx2 = softmax_kernels<Avx2, AttentionKernels>();

}  // namespace fastattn::cpu

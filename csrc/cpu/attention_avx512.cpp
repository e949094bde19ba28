// Compiled with -O3 -mavx2 -mfma -mf16c -mavx512f -mavx512dq -ffp-contract=fast, whatever the build type.
#include "softmax_body.hpp"

namespace fastattn::cpu {

constinit const AttentionKernels kAttentionAvx512 = softmax_kernels<Avx512, AttentionKernels>();

}  // namespace fastattn::cpu

// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "attention_body.hpp"

namespace fastattn::cpu {

constinit const AttentionKernels kAttentionAvx2 = attention_kernels<Avx2>();

}  // namespace fastattn::cpu

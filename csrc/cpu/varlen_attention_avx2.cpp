// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "varlen_attention_body.hpp"

namespace fastattn::cpu {

constinit const VarlenAttentionKernels kVarlenAttentionAvx2 = varlen_attention_kernels<Avx2>();

}  // namespace fastattn::cpu

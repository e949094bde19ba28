// Compiled with -O3 -mavx2 -mfma -mf16c -mavx512f -mavx512dq -ffp-contract=fast, whatever the build type.
#include "varlen_attention_body.hpp"

namespace fastattn::cpu {

constinit const VarlenAttentionKernels kVarlenAttentionAvx512 = varlen_attention_kernels<Avx512>();

}  // namespace fastattn::cpu

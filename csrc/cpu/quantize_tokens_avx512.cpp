// Compiled with -O3 -mavx2 -mfma -mf16c -mavx512f -mavx512dq -ffp-contract=fast, whatever the build type.
#include "quantize_tokens_body.hpp"

namespace fastattn::cpu {

constinit const QuantizeTokensKernels kQuantizeTokensAvx512 = quantize_tokens_kernels<Avx512>();

}  // namespace fastattn::cpu

// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "quantize_tokens_body.hpp"

namespace fastattn::cpu {

constinit const QuantizeTokensKernels kQuantizeTokensAvx2 = quantize_tokens_kernels<Avx2>();

}  // namespace fastattn::cpu

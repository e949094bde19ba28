// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "quantized_attention_body.hpp"

namespace fastattn::cpu {

constinit const QuantizedAttentionKernels kQuantizedAttentionAvx2 = quantized_attention_kernels<Avx2>();

}  // namespace fastattn::cpu

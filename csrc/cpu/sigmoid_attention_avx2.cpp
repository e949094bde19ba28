// Compiled with -O3 -mavx2 -mfma -mf16c -ffp-contract=fast, whatever the build type.
#include "sigmoid_attention_body.hpp"

namespace fastattn::cpu {

constinit const SigmoidAttentionKernels kSigmoidAttentionAvx2 = sigmoid_attention_kernels<Avx2>();

}  // namespace fastattn::cpu

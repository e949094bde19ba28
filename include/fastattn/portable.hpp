// What lets one text compile for the host, for the device and inside static_assert.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define FASTATTN_HD __host__ __device__ __forceinline__
#else
// Always inlined on the host too: no copy of these functions that was compiled for AVX-512 is left for the linker to
// hand to a translation unit that runs on older machines.
#define FASTATTN_HD [[gnu::always_inline]] inline
#endif

namespace fastattn {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

template <class T>
FASTATTN_HD constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FASTATTN_HD constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
template <class T>
FASTATTN_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Scalar forms of what score policies ask of a value; the CPU kernels overload them for vectors.
FASTATTN_HD float exp2(float x) { return ::exp2f(x); }
FASTATTN_HD float log2(float x) { return ::log2f(x); }
FASTATTN_HD float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
// Not less than the exact product or difference on a GPU, where that is free; elsewhere to nearest.
FASTATTN_HD float multiply_up(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_ru(a, b);
#else
  return a * b;
#endif
}
FASTATTN_HD float subtract_up(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_ru(a, b);
#else
  return a - b;
#endif
}
FASTATTN_HD float minus_magnitude(float x) {
#if defined(__CUDA_ARCH__)
  // Part of the instruction that takes it. With fast math fabsf and the minus flush denormals, in an instruction each.
  asm("{ .reg .f32 magnitude; abs.f32 magnitude, %0; neg.f32 %0, magnitude; }" : "+f"(x));
  return x;
#else
  return -::fabsf(x);
#endif
}
// 1 / (1 + e) for e in [0, 1] by multiplications: a quartic, exact at 0 and at most 3.5e-4 off, for tensor-core
// precision. (A reciprocal would be a second visit to the exponential unit, which bounds head_dim 64.) CPU vectors
// divide.
FASTATTN_HD float inverse_of_one_plus(float e) {
  float p = fused_multiply_add(0x1.4893f8p-3f, e, -0x1.1a5ab8p-1f);
  p = fused_multiply_add(p, e, 0x1.c2915cp-1f);
  p = fused_multiply_add(p, e, -0x1.fa4464p-1f);
  return fused_multiply_add(p, e, 1.f);
}
// A step of Newton's further: at most 2.2e-7 off.
FASTATTN_HD float precise_inverse_of_one_plus(float e) {
  const float inverse = inverse_of_one_plus(e);
  return fused_multiply_add(inverse, fused_multiply_add(-1.f - e, inverse, 1.f), inverse);
}
FASTATTN_HD float where_negative(float x, float negative, float otherwise) { return x < 0.f ? negative : otherwise; }

}  // namespace fastattn

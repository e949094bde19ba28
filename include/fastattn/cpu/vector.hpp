// One SIMD register of floats, for each instruction set, behind one interface.
//
// Everything that is compiled for an instruction set is a template over its tag or always inlined, so that no two
// instruction sets ever share a symbol: the linker keeps one copy of a symbol, and it must not be the AVX-512 one.
#pragma once

// GCC 12 warns of the deliberately undefined operands inside its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "fastattn/operand/low_bit.hpp"

namespace fastattn::cpu {

// kRows × kVectors is the register block of the matrix product: its accumulators, one row of B and one broadcast of A
// fill the register file (24 + 4 + 1 of 32 registers, 12 + 2 + 1 of 16).
struct Avx2 {
  static constexpr int kRows = 6, kVectors = 2;
};
struct Avx512 {
  static constexpr int kRows = 6, kVectors = 4;
};

template <class Isa>
struct Vector;

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

template <>
struct Vector<Avx2> {
  static constexpr int kWidth = 8;
  __m256 lanes;

  Vector() = default;
  Vector(__m256 x) : lanes(x) {}
  Vector(float x) : lanes(_mm256_set1_ps(x)) {}

  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Vector load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vector load(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Vector load(const Float8E4M3* p) {  // as to_float()
    const __m256i bits = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x80000000u)));
    const __m256i nan = _mm256_slli_epi32(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)), 20);
    const __m256 scaled = _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(magnitude, 20), sign));
    return _mm256_or_ps(_mm256_mul_ps(scaled, _mm256_set1_ps(0x1p120f)), _mm256_castsi256_ps(nan));
  }
  void store(float* p) const { _mm256_storeu_ps(p, lanes); }

  friend Vector operator+(Vector a, Vector b) { return _mm256_add_ps(a.lanes, b.lanes); }
  friend Vector operator-(Vector a, Vector b) { return _mm256_sub_ps(a.lanes, b.lanes); }
  friend Vector operator*(Vector a, Vector b) { return _mm256_mul_ps(a.lanes, b.lanes); }
  friend Vector fused_multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a.lanes, b.lanes, c.lanes); }
  // Where one of the two is NaN, the second is returned.
  friend Vector max_of(Vector a, Vector b) { return _mm256_max_ps(a.lanes, b.lanes); }
  friend Vector min_of(Vector a, Vector b) { return _mm256_min_ps(a.lanes, b.lanes); }
  friend Vector floor(Vector a) { return _mm256_floor_ps(a.lanes); }
  friend Vector inverse_of_one_plus(Vector a) {
    const __m256 one = _mm256_set1_ps(1.f);
    return _mm256_div_ps(one, _mm256_add_ps(one, a.lanes));
  }
  friend Vector precise_inverse_of_one_plus(Vector a) { return inverse_of_one_plus(a); }
  friend Vector minus_magnitude(Vector a) { return _mm256_or_ps(a.lanes, _mm256_set1_ps(-0.f)); }
  // The power of two that |a| begins with; 0 for denormals, +∞ for what is not finite.
  friend Vector leading_power(Vector a) { return _mm256_and_ps(a.lanes, _mm256_set1_ps(kInfinity)); }
  friend Vector where_negative(Vector x, Vector negative, Vector otherwise) {  // by the sign bit
    return _mm256_blendv_ps(otherwise.lanes, negative.lanes, x.lanes);
  }
  friend Vector where_zero(Vector x, Vector zero, Vector otherwise) {
    return _mm256_blendv_ps(otherwise.lanes, zero.lanes, _mm256_cmp_ps(x.lanes, _mm256_setzero_ps(), _CMP_EQ_OQ));
  }

  // Within the range of exponents, so that ±∞ and what overflows have a fraction; NaN passes (it comes second).
  friend Vector held_exponent(Vector a) { return min_of(Vector(128.f), max_of(Vector(-127.f), a)); }
  // How far a is above the whole number below it, up to 128; 0 of ±∞.
  friend Vector fraction_of(Vector a) {
    const Vector held = held_exponent(a);
    return held - floor(held);
  }
  // significand · 2^⌊exponent⌋; 0 where the exponent is below −126.
  friend Vector scale_by_power(Vector significand, Vector exponent) {
    const __m256i whole = _mm256_cvtps_epi32(floor(held_exponent(exponent)).lanes);
    const __m256i biased = _mm256_add_epi32(whole, _mm256_set1_epi32(127));
    return significand * Vector(_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  }

  friend float sum_of(Vector a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.lanes), _mm256_extractf128_ps(a.lanes, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  friend float largest_of(Vector a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.lanes), _mm256_extractf128_ps(a.lanes, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  // rows[i][j] becomes rows[j][i].
  friend void transpose(Vector (&rows)[8]) {
    __m256 pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i].lanes, rows[i + 1].lanes);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i].lanes, rows[i + 1].lanes);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }
};

#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)

template <>
struct Vector<Avx512> {
  static constexpr int kWidth = 16;
  __m512 lanes;

  Vector() = default;
  Vector(__m512 x) : lanes(x) {}
  Vector(float x) : lanes(_mm512_set1_ps(x)) {}

  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static Vector load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Vector load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vector load(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Vector load(const Float8E4M3* p) {  // as to_float()
    const __m512i bits = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0x80000000u)));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
    const __m512 scaled = _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(magnitude, 20), sign));
    return _mm512_mask_blend_ps(nan, _mm512_mul_ps(scaled, _mm512_set1_ps(0x1p120f)),
                                _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
  }
  void store(float* p) const { _mm512_storeu_ps(p, lanes); }

  friend Vector operator+(Vector a, Vector b) { return _mm512_add_ps(a.lanes, b.lanes); }
  friend Vector operator-(Vector a, Vector b) { return _mm512_sub_ps(a.lanes, b.lanes); }
  friend Vector operator*(Vector a, Vector b) { return _mm512_mul_ps(a.lanes, b.lanes); }
  friend Vector fused_multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a.lanes, b.lanes, c.lanes); }
  friend Vector max_of(Vector a, Vector b) { return _mm512_max_ps(a.lanes, b.lanes); }
  friend Vector min_of(Vector a, Vector b) { return _mm512_min_ps(a.lanes, b.lanes); }
  friend Vector inverse_of_one_plus(Vector a) {
    const __m512 one = _mm512_set1_ps(1.f);
    return _mm512_div_ps(one, _mm512_add_ps(one, a.lanes));
  }
  friend Vector precise_inverse_of_one_plus(Vector a) { return inverse_of_one_plus(a); }
  friend Vector minus_magnitude(Vector a) { return _mm512_or_ps(a.lanes, _mm512_set1_ps(-0.f)); }
  friend Vector leading_power(Vector a) { return _mm512_and_ps(a.lanes, _mm512_set1_ps(kInfinity)); }
  friend Vector where_negative(Vector x, Vector negative, Vector otherwise) {  // by the sign bit
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.lanes)), otherwise.lanes, negative.lanes);
  }
  friend Vector where_zero(Vector x, Vector zero, Vector otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.lanes, _mm512_setzero_ps(), _CMP_EQ_OQ), otherwise.lanes,
                                zero.lanes);
  }
  friend Vector fraction_of(Vector a) { return _mm512_reduce_ps(a.lanes, _MM_FROUND_TO_NEG_INF); }
  friend Vector scale_by_power(Vector significand, Vector exponent) {
    return _mm512_scalef_ps(significand.lanes, exponent.lanes);
  }

  friend float sum_of(Vector a) { return _mm512_reduce_add_ps(a.lanes); }
  friend float largest_of(Vector a) { return _mm512_reduce_max_ps(a.lanes); }

  // rows[i][j] becomes rows[j][i]: 4 × 4 blocks within the 128-bit lanes, then the blocks themselves.
  friend void transpose(Vector (&rows)[16]) {
    __m512 pairs[16], quads[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i].lanes, rows[i + 1].lanes);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i].lanes, rows[i + 1].lanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 even_low = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
      const __m512 odd_low = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
      const __m512 even_high = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
      const __m512 odd_high = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
      rows[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      rows[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      rows[i + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      rows[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }
};

#endif

// What Float8E4M3 holds of x ≥ 0, as from_float() rounds: three bits after the leading one, and nothing below 2^−9.
template <class Isa>
Vector<Isa> rounded_to_float8(Vector<Isa> x) {
  using V = Vector<Isa>;
  const V shift = max_of(V(0x1p-6f), leading_power(x)) * V(0x1.8p20f);  // floats of its size are the multiples
  return min_of(V(Float8E4M3::kLargest), x + shift - shift);
}

// 2^x with a relative error below 2e-7; 0 at −∞, +∞ at +∞, NaN at NaN. The polynomial is the minimax fit of 2^f over
// [0, 1) with p(0) = 1: 8.2e-8 off by itself.
template <class Isa>
Vector<Isa> exp2(Vector<Isa> x) {
  using V = Vector<Isa>;
  const V fraction = fraction_of(x);
  V p = fused_multiply_add(V(0x1.e974fcp-10f), fraction, V(0x1.277854p-7f));
  p = fused_multiply_add(p, fraction, V(0x1.c91ce6p-5f));
  p = fused_multiply_add(p, fraction, V(0x1.ebdb56p-3f));
  p = fused_multiply_add(p, fraction, V(0x1.62e4bap-1f));
  p = fused_multiply_add(p, fraction, V(1.f));
  return scale_by_power(p, x);
}

}  // namespace fastattn::cpu

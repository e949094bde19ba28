// What becomes of the product of a query and a key before the mask and the softmax see it.
#pragma once

#include <cstdint>
#include <limits>

#include "fastattn/score/score.hpp"

namespace fastattn {

// A term for each key, [batch or 1, heads or 1, seq_k padded to a multiple of 32], contiguous; what is past seq_k is
// not looked at. Null: 0.
struct KeyBias {
  const float* bias = nullptr;
  std::int64_t batch = 1, heads = 1;

  // Which row is that of head (b, h).
  FASTATTN_HD std::int64_t index(std::int64_t b, std::int64_t h) const {
    return (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
  }
};

// cap · tanh(scale · score / cap), for scores that may not exceed the cap (Gemma 2, arXiv 2408.00118), in units of
// log 2. Its argument is t = 2 · scale · score / cap.
struct Softcap {
  // Below |t| = 2 the highest bit of the exponent is 0, and tanh(t / 2) is t · P(t²): at most 6e-7 off, in relative
  // terms, before rounding, and without a visit to the exponential unit.
  static constexpr ArgumentBit kShortcut{30, false};
  static constexpr int kTerms = 6;

  float to_argument, cap_log2;
  float terms[kTerms];  // cap · log2(e) · P's

  Softcap() = default;
  FASTATTN_HD Softcap(float scale, float cap)
      // An infinite factor would make NaN of scores that are 0.
      : to_argument(min_of(2.f * scale / cap, std::numeric_limits<float>::max())),
        cap_log2(cap * kLog2E),
        terms{0x1.ffffecp-2f * cap_log2,   -0x1.554a16p-5f * cap_log2, 0x1.1000f6p-8f * cap_log2,
              -0x1.a6c0f2p-12f * cap_log2, 0x1.1251b8p-15f * cap_log2, -0x1.920178p-20f * cap_log2} {}

  template <class T>
  FASTATTN_HD T operator()(T score) const {
    return general(argument(score));
  }

  template <class T>
  FASTATTN_HD T argument(T score) const {
    return score * to_argument;
  }

  // (1 − e) / (1 + e) with e = exp(−|t|).
  template <class T>
  FASTATTN_HD T general(T t) const {
    const T e = exp2(minus_magnitude(t) * kLog2E);
    const T magnitude = (T(1.f) - e) * cap_log2 * precise_inverse_of_one_plus(e);
    return where_negative(t, T(0.f) - magnitude, magnitude);
  }

  // What the cap leaves of a score's gradient, from what it has made of the score: 1 − tanh².
  template <class T>
  FASTATTN_HD T slope(T capped) const {
    const T tanh = capped * (1.f / cap_log2);
    return T(1.f) - tanh * tanh;
  }

  FASTATTN_HD float shortcut(float t) const {
    const float square = t * t;
    float sum = terms[kTerms - 1];
    for (int i = kTerms - 2; i >= 0; --i) {
      sum = fused_multiply_add(sum, square, terms[i]);
    }
    return sum * t;
  }
};

// softcap(scale · product) + bias of the key, in units of log 2.
struct ScoreModifier {
  float scale, softcap;  // softcap 0: none
  KeyBias key_bias;

  FASTATTN_HD bool exists() const { return softcap != 0.f || key_bias.bias != nullptr; }
  FASTATTN_HD float scale_log2() const { return scale * kLog2E; }
  FASTATTN_HD Softcap cap() const { return {scale, softcap}; }
};

}  // namespace fastattn

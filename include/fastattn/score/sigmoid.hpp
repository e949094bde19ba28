// Sigmoid attention's score: each weight by itself, without a sum over the row (FlashSigmoid, arXiv 2409.04431).
#pragma once

#include "fastattn/score/score.hpp"

namespace fastattn {

// 1 / (1 + e) for e in [0, 1] by multiplications: a quartic, exact at 0 and at most 3.5e-4 off, for tensor-core
// precision. (A reciprocal would be a second visit to the exponential unit, which bounds head_dim 64.) CPU vectors
// divide.
FASTATTN_HD float inverse_of_one_plus(float e) {
  float p = fused_multiply_add(0x1.4893f8p-3f, e, -0x1.1a5ab8p-1f);
  p = fused_multiply_add(p, e, 0x1.c2915cp-1f);
  p = fused_multiply_add(p, e, -0x1.fa4464p-1f);
  return fused_multiply_add(p, e, 1.f);
}

// 1 / (1 + 2^−x). With the usual bias, −ln of the number of keys, weights are near 1 / keys and must be right in
// relative terms; forms that subtract from 1, or tanh, are not. The exponential of −|x| keeps small weights small: with
// the quartic their relative error is 0.0113 · weight.
template <class T>
FASTATTN_HD T logistic2(T x) {
  const T e = exp2(minus_magnitude(x));
  const T p = e * inverse_of_one_plus(e);
  return where_negative(x, p, T(1.f) - p);
}

struct Sigmoid {
  struct State {};
  static constexpr bool kRescales = false;
  static constexpr bool kRowStatistics = false;
  static constexpr bool kBiasGradient = true;

  float scale_log2, bias_log2;       // both in units of log 2
  const float* head_bias = nullptr;  // added to the bias, one for each head (natural units); may be null

  FASTATTN_HD Sigmoid at(int head) const {
    return {scale_log2, bias_log2 + (head_bias == nullptr ? 0.f : head_bias[head] * kLog2E)};
  }

  FASTATTN_HD float absorb(State&, ScoreRow auto row) const {
    const float scale = scale_log2, bias = bias_log2;
    row.apply([scale, bias](auto score) { return logistic2(score * scale + bias); });
    return 1.f;
  }

  template <class Reduce>
  FASTATTN_HD RowResult finish(State, Reduce&&) const {
    return {1.f, 0.f};
  }

  template <class T>
  FASTATTN_HD T weight(T score, T) const {
    return logistic2(score * scale_log2 + bias_log2);
  }

  template <class T>
  FASTATTN_HD T score_gradient(T weight, T weight_gradient, T) const {
    return (weight - weight * weight) * weight_gradient;
  }
};

}  // namespace fastattn

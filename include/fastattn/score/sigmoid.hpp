// Sigmoid attention's score: each weight by itself, without a sum over the row (FlashSigmoid, arXiv 2409.04431).
#pragma once

#include "fastattn/score/score.hpp"

namespace fastattn {

// 1 / (1 + 2^−x). With the usual bias, −ln of the number of keys, weights are near 1 / keys and must be right in
// relative terms; forms that subtract from 1, or tanh, are not. The exponential of −|x| keeps small weights small: with
// the quartic their relative error is 0.0113 · weight.
template <class T>
FASTATTN_HD T logistic2(T x) {
  const T e = exp2(minus_magnitude(x));
  const T p = e * inverse_of_one_plus(e);
  return where_negative(x, p, T(1.f) - p);
}

// The weight of a score: 1 / (1 + 2^−x) with x = scale · score + bias. Below x = −4, where most are, e = 2^x is below
// 1/16 and the weight e · (1 − 0.95077 · e): at most 6.4e-4 off, exact at 0, and half the instructions.
struct Logistic {
  static constexpr float kShift = 4.f, kUnit = 1.f / 16.f;  // kUnit = 2^−kShift
  static constexpr ArgumentBit kShortcut{31, true};         // the sign
  float scale, bias;

  template <class T>
  FASTATTN_HD T operator()(T score) const {
    return logistic2(score * scale + bias);
  }

  // The argument is x + 4: its sign tells whether the shortcut holds, and 2^argument is 16 · e.
  FASTATTN_HD float argument(float score) const { return score * scale + (bias + kShift); }
  FASTATTN_HD float general(float argument) const { return logistic2(argument - kShift); }
  FASTATTN_HD float shortcut(float argument) const {
    const float e = exp2(argument);
    return e * fused_multiply_add(-0.95077f * kUnit * kUnit, e, kUnit);
  }
};

// The forward's weights are kUnit times as large, and its output is divided by that: with E = kUnit · e the shortcut
// e (1 − kUnit · e) is then E − E², one multiply-add. It holds for small scores.
struct ForwardLogistic {
  static constexpr float kUnit = 0.95077f, kUnitLog2 = -0.0728317f, kLargest = kUnit / 16.f;
  float scale, bias;

  template <class T>
  FASTATTN_HD T operator()(T score) const {
    return logistic2(score * scale + bias) * kUnit;
  }
  FASTATTN_HD float exponential(float score) const { return exp2(score * scale + (bias + kUnitLog2)); }
  FASTATTN_HD float shortcut(float e) const { return fused_multiply_add(-e, e, e); }
  FASTATTN_HD bool is_small(float score) const { return score * scale + bias < -4.f; }  // E < kLargest; NaN is not
};

struct Sigmoid {
  struct State {};
  static constexpr bool kRescales = false;
  static constexpr bool kElementwise = true;
  static constexpr bool kOptimistic = false;
  static constexpr bool kRowStatistics = false;
  static constexpr bool kBiasGradient = true;

  float scale_log2, bias_log2;       // both in units of log 2
  const float* head_bias = nullptr;  // added to the bias, one for each head (natural units); may be null

  FASTATTN_HD Sigmoid at(int head) const {
    return {scale_log2, bias_log2 + (head_bias == nullptr ? 0.f : head_bias[head] * kLog2E)};
  }

  FASTATTN_HD float absorb(State&, ScoreRow auto row) const {
    row.apply(ForwardLogistic{scale_log2, bias_log2});
    return 1.f;
  }

  FASTATTN_HD void weigh(auto row) const { row.apply(ForwardLogistic{scale_log2, bias_log2}); }

  template <class Reduce>
  FASTATTN_HD RowResult finish(State, Reduce&&) const {
    return {1.f / ForwardLogistic::kUnit, 0.f};
  }

  template <class T>
  FASTATTN_HD Logistic weight(T) const {
    return {scale_log2, bias_log2};
  }

  template <class T>
  FASTATTN_HD T score_gradient(T weight, T weight_gradient, T) const {
    return (weight - weight * weight) * weight_gradient;
  }
};

}  // namespace fastattn

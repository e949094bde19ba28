// Online softmax in base 2 (Online normalizer calculation for softmax, arXiv 1805.02867; FlashAttention, 2205.14135).
#pragma once

#include <limits>
#include <type_traits>

#include "fastattn/operand/low_bit.hpp"
#include "fastattn/score/score.hpp"

namespace fastattn {

// The factor of scores that come in units of log 2 already: a constant, which costs no instruction.
struct One {
  constexpr operator float() const { return 1.f; }
};

// How far a row's largest score may rise above its base before that follows, and what was summed is rescaled. Weights
// above 1 are as precise as those below (FlashAttention-4 rescales as seldom).
struct WideWeights {
  static constexpr float kSlack = 4.f;
  static constexpr float kBaseWeightLog2 = 0.f;  // of a score that equals the base
  static constexpr bool kOptimistic = true;
  // Of a lane's weights in a tile without a look at its largest score. If the sum of up to 64 is larger, one of them
  // exceeds 2^kSlack, and the base follows. With the range of float32 and bfloat16 that is seldom, however far the
  // largest scores lie above the others.
  static constexpr float kLargestSum = 0x1p32f;
};

// Those that are rounded to float16, which holds no more than 65,504.
struct Float16Weights : WideWeights {
  static constexpr float kLargestSum = 0x1p15f;
};
template <class Element>
using WeightsOf = std::conditional_t<std::is_same_v<Element, Float16>, Float16Weights, WideWeights>;

// Those that are rounded to e4m3: close behind the row, they keep three bits down to 2^-14 of its largest weight.
struct Float8Weights {
  static constexpr float kSlack = 2.f;
  static constexpr float kBaseWeightLog2 = Float8E4M3::kLargestLog2 - kSlack;
  static constexpr bool kOptimistic = false;
};

template <class Scale, class Weights = WideWeights>
struct SoftmaxBy {
  // The row so far: a score near its largest in units of log 2, and this lane's share of the sum of weights relative to
  // that. The product is kept, not the score: rounded anew for each tile, a base that stays would decay the row by an
  // error of its own, and a thousand tiles by a thousand times that.
  struct State {
    // Of an empty row lower than any score but finite: masked scores minus it are −∞, all others far above 0.
    float base_log2 = -std::numeric_limits<float>::max(), sum = 0.f;
  };
  static constexpr float kSlack = Weights::kSlack, kBaseWeightLog2 = Weights::kBaseWeightLog2;
  static constexpr bool kRescales = true;
  static constexpr bool kElementwise = false;
  static constexpr bool kOptimistic = Weights::kOptimistic;
  static constexpr bool kRowStatistics = true;
  static constexpr bool kBiasGradient = false;

  Scale scale_log2;  // scale · log2(e): one multiply-add and one ex2 per score

  FASTATTN_HD SoftmaxBy at(int) const { return *this; }

  FASTATTN_HD float absorb(State& state, ScoreRow auto row) const {
    const float max_log2 = row.max() * scale_log2;
    const float base_log2 = max_log2 > state.base_log2 + kSlack ? max_log2 : state.base_log2;
    const float decay = exp2(state.base_log2 - base_log2);
    const float sum = weigh({base_log2}, row);
    state = {base_log2, state.sum * decay + sum};
    return decay;
  }

  FASTATTN_HD float weigh(const State& state, ScoreRow auto row) const {
    return row.apply(weight(state.base_log2 - kBaseWeightLog2));
  }
  FASTATTN_HD bool is_near(float sum) const { return sum <= Weights::kLargestSum; }  // NaN is not
  FASTATTN_HD void add(State& state, float sum) const { state.sum += sum; }

  template <class Reduce>
  FASTATTN_HD RowResult finish(State state, Reduce&& reduce) const {
    const float sum = reduce(state.sum);
    if (sum == 0.f) {
      return {0.f, -kInfinity};
    }
    return {1.f / sum, (state.base_log2 - kBaseWeightLog2 + log2(sum)) * kLn2};
  }

  template <class T>
  FASTATTN_HD auto weight(T lse2) const {
    return [scale = scale_log2, lse2](auto score) { return exp2(score * float{scale} - lse2); };
  }

  template <class T>
  FASTATTN_HD T score_gradient(T weight, T weight_gradient, T delta) const {
    return weight * (weight_gradient - delta);
  }
};

using Softmax = SoftmaxBy<float>;

// With a logit of each head's own in the sum, which has no value (Efficient Streaming Language Models with Attention
// Sinks, arXiv 2309.17453; learnt in gpt-oss, arXiv 2508.10925). A row that keeps nothing has it alone.
template <class Base>
struct WithSinks : Base {
  const float* sinks = nullptr;  // [heads], in memory of the device; null: none
  int head = 0;

  FASTATTN_HD WithSinks at(int head) const { return {Base::at(head), sinks, head}; }

  template <class Reduce>
  FASTATTN_HD RowResult finish(typename Base::State state, Reduce&& reduce) const {
    const float sink_log2 = sinks == nullptr ? -kInfinity : sinks[head] * kLog2E;
    if (sink_log2 == -kInfinity) {
      return Base::finish(state, reduce);
    }
    const float sum = reduce(state.sum), base = sum == 0.f ? -kInfinity : state.base_log2 - Base::kBaseWeightLog2;
    const float most = max_of(base, sink_log2), unit = exp2(base - most);
    const float all = sum * unit + exp2(sink_log2 - most);
    return {sum == 0.f ? 0.f : unit / all, (most + log2(all)) * kLn2};
  }
};

}  // namespace fastattn

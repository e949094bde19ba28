// Online softmax for weights of 8 bits, which have no room for a base that lags behind the row's maximum: every tile's
// are relative to its own maximum, and its products are brought to the row's base as they are added to the output.
#pragma once

#include "fastattn/score/score.hpp"

namespace fastattn {

// Scores come in units of log 2, and weights go up to 2^top_log2: the largest value of their format. Forward only.
struct TileSoftmax {
  struct State {
    float base_log2 = -kInfinity, sum = 0.f;  // as in Softmax: the sum is relative to the base
    float factor = 0.f;                       // what the weights of the tile last absorbed are to be multiplied by
  };
  // How far a tile may rise above the base before that follows. Of no consequence to the weights, only to how often the
  // output is rescaled.
  static constexpr float kSlack = 8.f;
  static constexpr bool kRescales = true;
  static constexpr bool kElementwise = false;
  static constexpr bool kOptimistic = false;

  float top_log2;

  FASTATTN_HD TileSoftmax at(int) const { return *this; }

  FASTATTN_HD float absorb(State& state, ScoreRow auto row) const {
    const float max_log2 = row.max();
    const float base_log2 = max_log2 > state.base_log2 + kSlack ? max_log2 : state.base_log2;
    const float base = base_log2 == -kInfinity ? 0.f : base_log2;  // as in Softmax
    const float decay = exp2(state.base_log2 - base);
    // Rounded up, as max() is: no weight exceeds the largest one, which in some formats would come out as the smallest.
    const float of_one = subtract_up(max_log2 == -kInfinity ? 0.f : max_log2, top_log2);
    const float sum = row.apply([of_one](auto score) { return exp2(score - of_one); });
    const float factor = exp2((max_log2 == -kInfinity ? max_log2 : of_one) - base);
    state = {base_log2, state.sum * decay + sum * factor, factor};
    return decay;
  }

  template <class Reduce>
  FASTATTN_HD RowResult finish(State state, Reduce&& reduce) const {
    const float sum = reduce(state.sum);
    if (sum == 0.f) {
      return {0.f, -kInfinity};
    }
    return {1.f / sum, (state.base_log2 + log2(sum)) * kLn2};
  }
};

}  // namespace fastattn

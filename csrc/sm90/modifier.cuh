// What becomes of a product before the softmax, as the backward's kernels need it: forth and back.
#pragma once

#include <cstdint>
#include <type_traits>

#include "fastattn/portable.hpp"
#include "fastattn/score/modifier.hpp"

namespace fastattn::sm90 {

// Products are scores.
struct NoModifier {
  static constexpr bool kExists = false;

  __device__ float operator()(float product, float) const { return product; }
};

// A softcap or none, then a term for each key; scores in units of log 2.
template <bool kCapped>
struct Modifier {
  static constexpr bool kExists = true;
  std::conditional_t<kCapped, Softcap, float> to_log2;
  KeyBias key_bias;
  int keys;  // in a row of the biases

  __device__ float bias_log2(int batch, int head, int key) const {
    return key_bias.bias == nullptr ? 0.f : key_bias.bias[key_bias.index(batch, head) * keys + key] * kLog2E;
  }
  __device__ float operator()(float product, float bias_log2) const {
    if constexpr (kCapped) {
      return to_log2(product) + bias_log2;
    } else {
      return product * to_log2 + bias_log2;
    }
  }
  // What the cap leaves of the gradient of a score that has a weight, which tells the score: as long as it is not 0.
  __device__ float slope(float weight, float lse2, float bias_log2) const {
    if constexpr (kCapped) {
      return to_log2.slope(__log2f(weight) + lse2 - bias_log2);
    } else {
      return 1.f;
    }
  }
};

}  // namespace fastattn::sm90

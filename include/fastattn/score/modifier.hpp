// What becomes of the product of a query and a key before the mask and the softmax see it.
#pragma once

#include <cstdint>

#include "fastattn/portable.hpp"

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
// log 2.
struct Softcap {
  float argument;  // 2 · log2(e) · scale / cap
  float cap_log2;  // cap · log2(e)

  template <class T>
  FASTATTN_HD T operator()(T score) const {
    const T x = score * argument, e = exp2(minus_magnitude(x)), one(1.f);
    const T magnitude = (one - e) * cap_log2 * reciprocal(one + e);
    return where_negative(x, T(0.f) - magnitude, magnitude);
  }
};

// softcap(scale · product) + bias of the key, in units of log 2.
struct ScoreModifier {
  float scale, softcap;  // softcap 0: none
  KeyBias key_bias;

  FASTATTN_HD bool exists() const { return softcap != 0.f || key_bias.bias != nullptr; }
  FASTATTN_HD float scale_log2() const { return scale * kLog2E; }
  FASTATTN_HD Softcap cap() const { return {2.f * kLog2E * scale / softcap, softcap * kLog2E}; }
};

}  // namespace fastattn

// Element types of 8 and 4 bits: what they hold, how a float is rounded to them (to nearest, ties to even), and the
// scale of floats that are rounded together.
#pragma once

#include "fastattn/operand/element.hpp"

namespace fastattn {

enum class TokenFormat : std::uint8_t { kInt8, kInt4, kInt4InByte, kFloat8 };

// Integers leave out their most negative value: what can be held is symmetric.
struct Int8 {
  static constexpr float kLargest = 127.f;
  static constexpr int kBits = 8;
};

struct Int4 {
  static constexpr float kLargest = 7.f;
  static constexpr int kBits = 4;
};

// Weights of a softmax, which are not negative.
struct UInt8 {
  static constexpr float kLargest = 255.f;
  static constexpr float kLargestLog2 = 7.99435343685886f;
};

// The values of Int4, each in a byte of its own, where 8-bit matrix products read them.
struct Int4InByte {
  static constexpr float kLargest = Int4::kLargest;
  static constexpr int kBits = 8;
};

// OCP's E4M3, torch's float8_e4m3fn: no infinities; 0x7f and 0xff are NaN. What is too large becomes the largest value,
// as a GPU's conversion has it.
struct Float8E4M3 {
  static constexpr float kLargest = 448.f;
  static constexpr float kLargestLog2 = 8.80735492205760f;
  static constexpr int kBits = 8;
  std::uint8_t bits;
};

FASTATTN_HD constexpr float to_float(std::int8_t x) { return x; }

// A smaller scale would have a reciprocal past float's range. With this one all denormals are far below half a step:
// they become 0 whether or not the machine flushes them.
inline constexpr float kSmallestScale = 0x1p-100f;

// A shade below the largest float: with the scale of this magnitude no value times the scale overflows.
inline constexpr float kLargestMagnitude = 0x1.fffff8p127f;

constexpr int bits_of(TokenFormat format) { return format == TokenFormat::kInt4 ? Int4::kBits : Int8::kBits; }

FASTATTN_HD constexpr float to_float(Float8E4M3 x) {
  const std::uint32_t sign = (x.bits & 0x80u) << 24, magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) {
    return std::bit_cast<float>(sign | 0x7fc00000u);
  }
  // As of Float16: off by 2^120 with the exponent field in place, subnormals included.
  const float scaled = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(scaled));
}

template <>
FASTATTN_HD constexpr Float8E4M3 from_float<Float8E4M3>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 24) & 0x80u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Both roundings are computed, so that a loop over elements has no branch. Subnormal: adding 2^14 leaves the rounded
  // value in the low bits. Normal: the last bit kept breaks the tie.
  const float shifted = std::bit_cast<float>(min_of(magnitude, 0x3f800000u)) + 0x1p14f;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(shifted) - 0x46800000u;
  const std::uint32_t held = magnitude > 0x7f800000u ? 0x43f00000u : min_of(magnitude, 0x43e00000u);  // NaN, 448
  const std::uint32_t normal = (held + 0x7ffffu + ((held >> 20) & 1u) - 0x3c000000u) >> 20;
  return {static_cast<std::uint8_t>(sign | (magnitude < 0x3c800000u ? subnormal : normal))};
}

// The integer nearest to x · y, ties to even, rounded once; for results within ±2^22.
FASTATTN_HD int round_product(float x, float y) {
  constexpr float kShift = 0x1.8p23f;  // floats of its size are the integers
  return std::bit_cast<int>(fused_multiply_add(x, y, kShift)) - std::bit_cast<int>(kShift);
}

// The scale of floats of which `largest` is the largest magnitude. Where that is not finite the scale says so.
template <class Format>
FASTATTN_HD float scale_of(float largest) {
  if (!(largest < kInfinity)) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  return largest == 0.f ? 0.f : max_of(min_of(largest, kLargestMagnitude) / Format::kLargest, kSmallestScale);
}

// What values are multiplied by; 0 for a group of zeros and for one that is not finite.
FASTATTN_HD float inverse_of(float scale) { return scale > 0.f ? 1.f / scale : 0.f; }

// The largest magnitude of x − centre where x lies between two extremes: rounding is monotonic. `mean` is that of x,
// and not finite if not all of it is: mean − mean is 0 or NaN.
FASTATTN_HD float largest_between(float least, float most, float mean, float centre) {
  return max_of(most - centre, centre - least) + (mean - mean);
}

}  // namespace fastattn

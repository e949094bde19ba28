// 16-bit element types as the host sees them: storage and exact conversions (round to nearest even).
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "fastattn/portable.hpp"
#include "fastattn/tensor_view.hpp"

namespace fastattn {

struct BFloat16 {
  static constexpr DType kDType = DType::kBFloat16;
  std::uint16_t bits;
};

struct Float16 {
  static constexpr DType kDType = DType::kFloat16;
  std::uint16_t bits;
};

FASTATTN_HD constexpr float to_float(float x) { return x; }

FASTATTN_HD constexpr float to_float(BFloat16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

FASTATTN_HD constexpr float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  if (!std::is_constant_evaluated()) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
  }
#endif
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Reinterpreted with the exponent field in place, the value is off by 2^112: subnormals come out right as well.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(scaled));
}

template <class Element>
FASTATTN_HD constexpr Element from_float(float x);

template <>
FASTATTN_HD constexpr float from_float<float>(float x) {
  return x;
}

template <>
FASTATTN_HD constexpr BFloat16 from_float<BFloat16>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (x != x) {
    return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  }
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
FASTATTN_HD constexpr Float16 from_float<Float16>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<std::uint16_t>(sign | 0x7e00u)};  // NaN
  }
  if (magnitude >= 0x477ff000u) {
    return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65,520 and above round to infinity
  }
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u))};
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u) >> 13))};
}

}  // namespace fastattn

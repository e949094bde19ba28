// Conversions of the 16-bit types, exhaustively: every value, every midpoint and both neighbours of every midpoint.
#include "fastattn/operand/element.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <string>

#include "check.hpp"

using namespace fastattn;

namespace {

// Value of a binary float with `mantissa` mantissa bits and an 8- or 5-bit exponent, from its definition.
double decode(std::uint32_t bits, int mantissa, int bias) {
  const std::uint32_t exponent_mask = (1u << (15 - mantissa)) - 1;
  const double sign = (bits & 0x8000u) != 0 ? -1. : 1.;
  const std::uint32_t exponent = (bits >> mantissa) & exponent_mask, fraction = bits & ((1u << mantissa) - 1);
  if (exponent == exponent_mask) {
    return fraction == 0 ? sign * HUGE_VAL : NAN;
  }
  const double significand = exponent == 0 ? fraction : fraction + std::ldexp(1., mantissa);
  return sign * std::ldexp(significand, static_cast<int>(exponent == 0 ? 1 : exponent) - bias - mantissa);
}

template <class Element>
void check_all(int mantissa, int bias) {
  const std::uint32_t infinity = ((1u << (15 - mantissa)) - 1) << mantissa;
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const double value = decode(bits, mantissa, bias);
    const float x = to_float(Element{static_cast<std::uint16_t>(bits)});
    if (std::isnan(value)) {
      check(std::isnan(x) && std::isnan(to_float(from_float<Element>(x))), "NaN stays NaN");
      continue;
    }
    check(x == value && std::signbit(x) == std::signbit(value), "to_float of " + std::to_string(bits));
    check(from_float<Element>(x).bits == bits, "round trip of " + std::to_string(bits));
    if ((bits & 0x7fffu) >= infinity) {
      continue;
    }
    // Between this value and the next one up in magnitude (for the largest one: what would follow it).
    const double step = (bits & 0x7fffu) + 1 == infinity ? std::abs(value - decode(bits - 1, mantissa, bias))
                                                         : std::abs(decode(bits + 1, mantissa, bias) - value);
    const float middle = static_cast<float>(value + std::copysign(step / 2, value));
    const std::uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    check(from_float<Element>(middle).bits == even, "ties go to even after " + std::to_string(bits));
    check(from_float<Element>(std::nextafter(middle, 0.f)).bits == bits,
          "below the middle after " + std::to_string(bits));
    check(from_float<Element>(std::nextafter(middle, std::copysign(HUGE_VALF, middle))).bits == bits + 1,
          "above the middle after " + std::to_string(bits));
  }
}

const Test bfloat16("element: bfloat16 converts exactly and rounds to nearest even",
                    [] { check_all<BFloat16>(7, 127); });
const Test float16("element: float16 converts exactly and rounds to nearest even", [] { check_all<Float16>(10, 15); });

}  // namespace

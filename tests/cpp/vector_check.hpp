// What every instruction set's vector class owes, run by vector_<instruction set>.cpp.
#pragma once

#include "fastattn/cpu/tile.hpp"

namespace fastattn::cpu {

// The largest relative error of exp2 over [−126, 127], and whether its special values are right.
struct Exp2Report {
  double error;
  bool special_values;
};

template <class Isa>
Exp2Report report_exp2() {
  using V = Vector<Isa>;
  const auto exp2_of = [](float x) {
    float lanes[V::kWidth];
    exp2(V(x)).store(lanes);
    return lanes[0];
  };
  double error = 0.;
  float x[V::kWidth], y[V::kWidth];
  constexpr int kSteps = 1 << 22;
  for (int i = 0; i < kSteps; i += V::kWidth) {
    for (int j = 0; j < V::kWidth; ++j) {
      x[j] = -126.f + 253.f * static_cast<float>(i + j) / kSteps;
    }
    exp2(V::load(x)).store(y);
    for (int j = 0; j < V::kWidth; ++j) {
      const double exact = __builtin_exp2(static_cast<double>(x[j]));
      error = max_of(error, __builtin_fabs(y[j] - exact) / exact);
    }
  }
  const float nan = __builtin_nanf("");
  return {error, exp2_of(-kInfinity) == 0.f && exp2_of(kInfinity) == kInfinity && exp2_of(nan) != exp2_of(nan) &&
                     exp2_of(0.f) == 1.f && exp2_of(10.f) == 1024.f && exp2_of(-1e30f) == 0.f &&
                     exp2_of(128.f) == kInfinity && exp2_of(1e30f) == kInfinity && exp2_of(-126.f) == 0x1p-126f};
}

// Are loads of 8-bit elements, and what is rounded to them, those of the scalar code? Ties and what lies beside them
// too.
template <class Isa>
bool agrees_with_scalars_of_8_bits() {
  using V = Vector<Isa>;
  bool agrees = true;
  float lanes[V::kWidth];
  const auto same = [](float x, float y) { return x == y || (x != x && y != y); };
  for (int first = 0; first < 0x100; first += V::kWidth) {
    std::int8_t integers[V::kWidth];
    Float8E4M3 floats[V::kWidth];
    for (int i = 0; i < V::kWidth; ++i) {
      integers[i] = static_cast<std::int8_t>(first + i - 128);
      floats[i].bits = static_cast<std::uint8_t>(first + i);
    }
    V::load(integers).store(lanes);
    for (int i = 0; i < V::kWidth; ++i) {
      agrees = agrees && lanes[i] == integers[i];
    }
    V::load(floats).store(lanes);
    for (int i = 0; i < V::kWidth; ++i) {
      agrees = agrees && same(lanes[i], to_float(floats[i]));
    }
  }
  const auto rounds = [&](std::uint32_t bits) {
    const float x = std::bit_cast<float>(bits);
    rounded_to_float8(V(x)).store(lanes);
    return same(lanes[0], to_float(from_float<Float8E4M3>(x)));
  };
  const std::uint32_t largest = std::bit_cast<std::uint32_t>(500.f);
  for (std::uint32_t bits = 0; bits < largest; bits += 509) {
    agrees = agrees && rounds(bits);
  }
  for (std::uint8_t value = 0; value < 0x7e; ++value) {
    const float tie = (to_float(Float8E4M3{value}) + to_float(Float8E4M3{static_cast<std::uint8_t>(value + 1)})) / 2;
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(tie);
    agrees = agrees && rounds(bits - 1) && rounds(bits) && rounds(bits + 1);
  }
  return agrees && rounds(std::bit_cast<std::uint32_t>(__builtin_nanf("")));
}

// Are loads of 16-bit elements, transposition and reductions those of the scalar code?
template <class Isa>
bool agrees_with_scalars() {
  using V = Vector<Isa>;
  bool agrees = true;
  float lanes[V::kWidth];
  for (int first = 0; first < 0x10000; first += V::kWidth) {
    BFloat16 b[V::kWidth];
    Float16 h[V::kWidth];
    for (int i = 0; i < V::kWidth; ++i) {
      b[i].bits = h[i].bits = static_cast<std::uint16_t>(first + i);
    }
    const auto same = [](float x, float y) { return x == y || (x != x && y != y); };
    V::load(b).store(lanes);
    for (int i = 0; i < V::kWidth; ++i) {
      agrees = agrees && same(lanes[i], to_float(b[i]));
    }
    V::load(h).store(lanes);
    for (int i = 0; i < V::kWidth; ++i) {
      agrees = agrees && same(lanes[i], to_float(h[i]));
    }
  }
  V rows[V::kWidth];
  for (int i = 0; i < V::kWidth; ++i) {
    for (int j = 0; j < V::kWidth; ++j) {
      lanes[j] = static_cast<float>(100 * i + j);
    }
    rows[i] = V::load(lanes);
    agrees = agrees && sum_of(rows[i]) == V::kWidth * (100.f * i + (V::kWidth - 1) / 2.f);
    agrees = agrees && largest_of(rows[i]) == 100.f * i + V::kWidth - 1;
  }
  transpose(rows);
  for (int i = 0; i < V::kWidth; ++i) {
    rows[i].store(lanes);
    for (int j = 0; j < V::kWidth; ++j) {
      agrees = agrees && lanes[j] == 100.f * j + i;
    }
  }
  return agrees;
}

struct VectorReport {
  Exp2Report exp2;
  bool agrees_with_scalars;
};

template <class Isa>
VectorReport report_vector() {
  return {report_exp2<Isa>(), agrees_with_scalars<Isa>() && agrees_with_scalars_of_8_bits<Isa>()};
}

VectorReport report_avx2();
VectorReport report_avx512();

}  // namespace fastattn::cpu

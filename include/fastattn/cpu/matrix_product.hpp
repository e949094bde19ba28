// C = A · B on tiles in scratch memory: A is read one element at a time and broadcast, B one register at a time.
#pragma once

#include "fastattn/cpu/tile.hpp"

namespace fastattn::cpu {

// How many rows of A and C a product of `rows` rows touches.
template <class Isa>
constexpr int padded_rows(int rows) {
  return ceil_div(rows, Isa::kRows) * Isa::kRows;
}

// What happens to C's old value.
enum class Update { kOverwrite, kAdd, kScaleAndAdd };

// A block of Isa::kRows rows and kVectors registers, which stays in registers for the whole depth.
template <class Isa, int kVectors, Update kUpdate>
void multiply_block(const float* a, int lda, const float* b, int depth, float* c, int ldc, const float* row_scale) {
  using V = Vector<Isa>;
  V sum[Isa::kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < Isa::kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = V(0.f);
    }
  }
  for (int k = 0; k < depth; ++k) {
    V right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      right[j] = V::load(b + (k * kVectors + j) * V::kWidth);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Isa::kRows; ++i) {
      const V left(a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] = fused_multiply_add(left, right[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Isa::kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* at = c + i * ldc + j * V::kWidth;
      if constexpr (kUpdate == Update::kAdd) {
        sum[i][j] = sum[i][j] + V::load(at);
      } else if constexpr (kUpdate == Update::kScaleAndAdd) {
        sum[i][j] = fused_multiply_add(V(row_scale[i]), V::load(at), sum[i][j]);
      }
      sum[i][j].store(at);
    }
  }
}

// C[rows × b.columns] from A[rows × b.depth], with padded_rows(rows) rows in both. One panel of B stays in the L1 cache
// while all rows of A pass by.
template <class Isa, Update kUpdate>
void multiply(const float* a, int lda, Panels<Isa> b, float* c, int ldc, int rows, const float* row_scale = nullptr) {
  const auto panel = [&]<int kVectors>(std::integral_constant<int, kVectors>, int column) {
    for (int row = 0; row < rows; row += Isa::kRows) {
      multiply_block<Isa, kVectors, kUpdate>(a + row * lda, lda, b.panel(column), b.depth, c + row * ldc + column, ldc,
                                             kUpdate == Update::kScaleAndAdd ? row_scale + row : nullptr);
    }
  };
  for (int column = 0; column < b.columns; column += Panels<Isa>::kColumns) {
    switch (b.columns_at(column) / Vector<Isa>::kWidth) {
      case 1:
        panel(std::integral_constant<int, 1>{}, column);
        break;
      case 2:
        panel(std::integral_constant<int, 2>{}, column);
        break;
      case 3:
        panel(std::integral_constant<int, min_of(3, Isa::kVectors)>{}, column);
        break;
      case 4:
        panel(std::integral_constant<int, min_of(4, Isa::kVectors)>{}, column);
        break;
    }
  }
}

}  // namespace fastattn::cpu

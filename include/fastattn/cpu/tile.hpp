// Tiles in a thread's scratch memory: float32, zero-padded, laid out as the matrix product reads them.
#pragma once

#include "fastattn/cpu/vector.hpp"

namespace fastattn::cpu {

inline constexpr int kMaxHeadDim = 256;

// The tokens of one head of one sequence.
template <class Element>
struct Tokens {
  Element* first;
  std::int64_t stride;

  Element* operator[](std::int64_t i) const { return first + i * stride; }
};

template <class Element>
Tokens<Element> tokens_of(const TensorView& view, std::int64_t b, std::int64_t h) {
  return {view.row<Element>(b, 0, h), view.stride[1]};
}

template <class Isa>
constexpr int round_up(int n) {
  return ceil_div(n, Vector<Isa>::kWidth) * Vector<Isa>::kWidth;
}

// Up to one register's worth of elements at p, then zeros.
template <class Isa, class Element>
Vector<Isa> load_some(const Element* p, int count) {
  constexpr int kWidth = Vector<Isa>::kWidth;
  if (count >= kWidth) {
    return Vector<Isa>::load(p);
  }
  float lanes[kWidth] = {};
  for (int i = 0; i < count; ++i) {
    lanes[i] = to_float(p[i]);
  }
  return Vector<Isa>::load(lanes);
}

// Right-hand side B of a matrix product, `depth` × `columns`: panels of Isa::kVectors registers, each panel contiguous.
// The last one is as narrow as the columns allow.
template <class Isa>
struct Panels {
  static constexpr int kColumns = Isa::kVectors * Vector<Isa>::kWidth;
  float* data;
  int depth, columns;

  int columns_at(int column) const { return min_of(kColumns, columns - column); }
  float* panel(int column) const { return data + column * depth; }  // column: a multiple of kColumns
  // The register that holds (row, column), for a column that is a multiple of the register's width.
  float* at(int row, int column) const {
    const int inside = column % kColumns, first = column - inside;
    return panel(first) + row * columns_at(first) + inside;
  }
};

// tokens[first, first + count) as the rows of a row-major tile of width `dim`.
template <class Isa, class Element>
void load_rows(float* tile, Tokens<Element> tokens, int first, int count, int rows, int dim) {
  const int width = round_up<Isa>(dim);
  for (int row = 0; row < rows; ++row) {
    for (int d = 0; d < width; d += Vector<Isa>::kWidth) {
      const Vector<Isa> x = row < count ? load_some<Isa>(tokens[first + row] + d, dim - d) : Vector<Isa>(0.f);
      x.store(tile + row * width + d);
    }
  }
}

// The same tokens as the rows of B: depth = tokens, columns = dims.
template <class Isa, class Element>
void pack_rows(Panels<Isa> b, Tokens<Element> tokens, int first, int count, int dim) {
  for (int row = 0; row < b.depth; ++row) {
    for (int d = 0; d < b.columns; d += Vector<Isa>::kWidth) {
      const Vector<Isa> x = row < count ? load_some<Isa>(tokens[first + row] + d, dim - d) : Vector<Isa>(0.f);
      x.store(b.at(row, d));
    }
  }
}

// The same tokens as the columns of B: depth = dims, columns = tokens.
template <class Isa, class Element>
void pack_columns(Panels<Isa> b, Tokens<Element> tokens, int first, int count) {
  constexpr int kWidth = Vector<Isa>::kWidth;
  for (int column = 0; column < b.columns; column += kWidth) {
    for (int d = 0; d < b.depth; d += kWidth) {
      Vector<Isa> block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int token = column + i;
        block[i] = token < count ? load_some<Isa>(tokens[first + token] + d, b.depth - d) : Vector<Isa>(0.f);
      }
      transpose(block);
      for (int i = 0; i < min_of(kWidth, b.depth - d); ++i) {
        block[i].store(b.at(d + i, column));
      }
    }
  }
}

}  // namespace fastattn::cpu

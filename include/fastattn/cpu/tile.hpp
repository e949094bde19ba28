// Tiles in a thread's scratch memory: float32, zero-padded, laid out as the matrix product reads them.
#pragma once

#include "fastattn/cpu/vector.hpp"

namespace fastattn::cpu {

// The tokens of one head of one sequence.
template <class Element>
struct Tokens {
  Element* first;
  std::int64_t stride;

  FASTATTN_HD Element* operator[](std::int64_t i) const { return first + i * stride; }
};

template <class Element>
FASTATTN_HD Tokens<Element> tokens_of(const TensorView& view, std::int64_t b, std::int64_t h) {
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
  int stride_at(int column) const { return columns_at(column - column % kColumns); }
  // The register that holds (row, column), for a column that is a multiple of the register's width.
  float* at(int row, int column) const {
    const int inside = column % kColumns;
    return panel(column - inside) + row * stride_at(column) + inside;
  }
};

// Brings tokens[first, first + count) towards the core while something else is computed: a tile's rows are too far
// apart for the hardware to see them coming.
template <class Isa, class Element>
void prefetch(Tokens<Element> tokens, int first, int count, int dim) {
  constexpr int kLine = 64 / sizeof(Element);
  for (int row = first; row < first + count; ++row) {
    for (int d = 0; d < dim; d += kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(tokens[row] + d), _MM_HINT_T1);
    }
  }
}

// tokens[first, first + count) as the first of `rows` rows of a row-major tile, zeros after them.
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

// tokens[first, first + b.depth) as the rows of B, whose columns are dims.
template <class Isa, class Element>
void pack_rows(Panels<Isa> b, Tokens<Element> tokens, int first, int dim) {
  for (int row = 0; row < b.depth; ++row) {
    for (int d = 0; d < b.columns; d += Vector<Isa>::kWidth) {
      load_some<Isa>(tokens[first + row] + d, dim - d).store(b.at(row, d));
    }
  }
}

// tokens[first, first + count) as the columns of B, zeros after them; its depth is the dims.
template <class Isa, class Element>
void pack_columns(Panels<Isa> b, Tokens<Element> tokens, int first, int count) {
  constexpr int kWidth = Vector<Isa>::kWidth;
  for (int column = 0; column < b.columns; column += kWidth) {
    for (int d = 0; d < b.depth; d += kWidth) {
      Vector<Isa> block[kWidth];
      if (column + kWidth <= count && d + kWidth <= b.depth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          block[i] = Vector<Isa>::load(tokens[first + column + i] + d);
        }
      } else {
        for (int i = 0; i < kWidth; ++i) {
          const int token = column + i;
          block[i] = token < count ? load_some<Isa>(tokens[first + token] + d, b.depth - d) : Vector<Isa>(0.f);
        }
      }
      transpose(block);
      float* const to = b.at(d, column);
      const int stride = b.stride_at(column);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (d + i < b.depth) {
          block[i].store(to + i * stride);
        }
      }
    }
  }
}

}  // namespace fastattn::cpu

// Tiles in a thread's scratch memory: float32, zero-padded, laid out as the matrix product reads them.
#pragma once

#include <type_traits>

#include "fastattn/cpu/parallel.hpp"
#include "fastattn/cpu/vector.hpp"
#include "fastattn/schedule/neighborhood.hpp"
#include "fastattn/schedule/sequences.hpp"

namespace fastattn::cpu {

// Calls function.operator()<Element>() for the element type of `dtype`, which has 16 bits or more.
template <class Function>
void with_element(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function.template operator()<float>();
    case DType::kFloat16:
      return function.template operator()<Float16>();
    case DType::kBFloat16:
      return function.template operator()<BFloat16>();
    case DType::kInt8:
    case DType::kFloat8:
      break;
  }
}

// The tokens in a tile's slots; −1 where there is none.
template <int kSlots>
struct TileTokens {
  int token[kSlots];

  FASTATTN_HD int operator[](int slot) const { return token[slot]; }
};

// The tokens of a box that begins at `first`, of a line of tokens or of a grid.
template <int kSlots>
FASTATTN_HD TileTokens<kSlots> tokens_of_box(int first, int, int num_tokens) {
  TileTokens<kSlots> tokens;
  for (int i = 0; i < kSlots; ++i) {
    tokens.token[i] = first + i < num_tokens ? first + i : -1;
  }
  return tokens;
}

template <int kSlots>
FASTATTN_HD TileTokens<kSlots> tokens_of_box(SequenceOrigin first, int, int) {
  TileTokens<kSlots> tokens;
  for (int i = 0; i < kSlots; ++i) {
    tokens.token[i] = i < first.rows ? first.token + i : -1;
  }
  return tokens;
}

template <int kSlots>
FASTATTN_HD TileTokens<kSlots> tokens_of_box(const PerAxis<int>& first, const GridBox& box, int) {
  TileTokens<kSlots> tokens;
  for (int i = 0; i < kSlots; ++i) {
    const PerAxis<int> position = position_in_box(box.extent, static_cast<unsigned>(i));
    PerAxis<int> at;
    bool exists = true;
    for (int a = 0; a < kAxes; ++a) {
      at[a] = first[a] + position[a] * box.step[a];
      exists = exists && at[a] < box.length[a];
    }
    tokens.token[i] = exists ? (at[0] * box.length[1] + at[1]) * box.length[2] + at[2] : -1;
  }
  return tokens;
}

template <TileShape kTile, TileSchedule Schedule>
FASTATTN_HD TileTokens<kTile.q> query_tokens(const Schedule& schedule, int q_tile) {
  return tokens_of_box<kTile.q>(schedule.query_origin(q_tile, kTile), schedule.query_box(kTile), schedule.num_q);
}

template <TileShape kTile, TileSchedule Schedule>
FASTATTN_HD TileTokens<kTile.k> key_tokens(const Schedule& schedule, int k_tile) {
  return tokens_of_box<kTile.k>(schedule.key_origin(k_tile, kTile), schedule.key_box(kTile), schedule.num_k);
}

template <class Element>
inline constexpr Element kZeroRow[kMaxHeadDim] = {};

// The rows of a tile's slots in a tensor. A slot without a token has zeros to read, and nowhere to write: null.
template <class Element, int kSlots>
struct Rows {
  Element* row[kSlots];

  FASTATTN_HD Element* operator[](int slot) const { return row[slot]; }
};

template <class Element, int kSlots>
FASTATTN_HD Rows<Element, kSlots> rows_of(const TensorView& view, std::int64_t b, std::int64_t h,
                                          const TileTokens<kSlots>& tokens) {
  Element* none = nullptr;
  if constexpr (std::is_const_v<Element>) {
    none = kZeroRow<std::remove_const_t<Element>>;
  }
  Element* const first = view.row<Element>(b, 0, h);
  Rows<Element, kSlots> rows;
  for (int i = 0; i < kSlots; ++i) {
    rows.row[i] = tokens[i] < 0 ? none : first + tokens[i] * view.stride[1];
  }
  return rows;
}

// The rows of one tile of keys after the other, in two tensors.
template <class Element, TileShape kTile, TileSchedule Schedule>
struct KeyStream {
  const Schedule& schedule;
  const TensorView &view1, &view2;
  std::int64_t b, h;
  int tile = -1;
  TileTokens<kTile.k> tokens = {};
  Rows<const Element, kTile.k> rows1 = {}, rows2 = {};

  FASTATTN_HD void move_to(int k_tile) {
    if (tile != k_tile) {
      tile = k_tile;
      tokens = key_tokens<kTile>(schedule, k_tile);
      rows1 = rows_of<const Element>(view1, b, h, tokens);
      rows2 = rows_of<const Element>(view2, b, h, tokens);
    }
  }
};

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

// Brings rows towards the core while something else is computed: they are too far apart for the hardware to see them
// coming.
template <class Isa, class Element, int kSlots>
void prefetch(const Rows<Element, kSlots>& rows, int dim) {
  constexpr int kLine = 64 / sizeof(Element);
  for (int row = 0; row < kSlots; ++row) {
    for (int d = 0; d < dim; d += kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(rows[row] + d), _MM_HINT_T1);
    }
  }
}

// A row-major tile.
template <class Isa, class Element, int kSlots>
void load_rows(float* tile, const Rows<Element, kSlots>& rows, int dim) {
  const int width = round_up<Isa>(dim);
  for (int row = 0; row < kSlots; ++row) {
    for (int d = 0; d < width; d += Vector<Isa>::kWidth) {
      load_some<Isa>(rows[row] + d, dim - d).store(tile + row * width + d);
    }
  }
}

// The first b.depth rows as the rows of B, whose columns are dims.
template <class Isa, class Element, int kSlots>
void pack_rows(Panels<Isa> b, const Rows<Element, kSlots>& rows, int dim) {
  for (int row = 0; row < b.depth; ++row) {
    for (int d = 0; d < b.columns; d += Vector<Isa>::kWidth) {
      load_some<Isa>(rows[row] + d, dim - d).store(b.at(row, d));
    }
  }
}

// The first b.columns rows as the columns of B, whose depth is the dims. What is read is packed as rows as well, if
// that is asked for: then with as many of them.
template <class Isa, class Element, int kSlots>
void pack_columns(Panels<Isa> b, const Rows<Element, kSlots>& rows, const Panels<Isa>* as_rows = nullptr) {
  constexpr int kWidth = Vector<Isa>::kWidth;
  for (int column = 0; column < b.columns; column += kWidth) {
    for (int d = 0; d < b.depth; d += kWidth) {
      Vector<Isa> block[kWidth];
      if (d + kWidth <= b.depth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          block[i] = Vector<Isa>::load(rows[column + i] + d);
        }
      } else {
        for (int i = 0; i < kWidth; ++i) {
          block[i] = load_some<Isa>(rows[column + i] + d, b.depth - d);
        }
      }
      if (as_rows != nullptr) {
        float* const to = as_rows->at(column, d);
        const int stride = as_rows->stride_at(d);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          block[i].store(to + i * stride);
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

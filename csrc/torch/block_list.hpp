// The tensors of a BlockList, judged and shown to the core.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "call.hpp"
#include "fastattn/portable.hpp"

namespace fastattn::binding {

using Shape = std::vector<std::int64_t>;

// The shape of the lists: [batch or 1, heads or 1], and the blocks on each axis of the scores.
struct Grid {
  std::int64_t batch, heads, rows, columns;

  Shape of_rows() const { return {batch, heads, rows, columns}; }
  Shape of_columns() const { return {batch, heads, columns, rows}; }
};

inline Grid grid_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& counts, const Shape& block_size) {
  require(block_size.size() == 2 && std::ranges::min(block_size) > 0, op,
          ": block_size must be (queries, keys), 64, 128 or 192 and 64 or 128, got ", list(block_size));
  const auto extent = [&](int axis, std::int64_t of_q) {
    return counts.dim() == 3 && counts.sizes()[axis] == 1 ? 1 : of_q;
  };
  return {extent(0, q.sizes()[0]), extent(1, q.sizes()[2]), ceil_div(q.sizes()[1], block_size[0]),
          ceil_div(k.sizes()[1], block_size[1])};
}

// What a list's tensors and their axes are called in messages.
struct Names {
  const char *counts, *indices, *full;
  const char *counts_axes, *axes;
};

inline constexpr Names kRows{"counts", "indices", "full", "[batch or 1, heads or 1, query blocks]",
                             "[batch or 1, heads or 1, query blocks, key blocks]"};
inline constexpr Names kColumns{"column_counts", "column_indices", "column_full",
                                "[batch or 1, heads or 1, key blocks]",
                                "[batch or 1, heads or 1, key blocks, query blocks]"};

// The tensors of a list, for as long as the core reads them.
struct List {
  Tensor counts, indices;
  std::optional<Tensor> full;

  BlockRows rows() const {
    return {counts.const_data_ptr<std::int32_t>(), indices.const_data_ptr<std::int32_t>(),
            full ? full->const_data_ptr<bool>() : nullptr};
  }
};

// `shape` is that of the indices.
template <class Place>
List list_of(const Call<Place>& call, const Names& names, const Tensor& counts, const Tensor& indices,
             const std::optional<Tensor>& full, const Shape& shape) {
  List list{call.array(names.counts, counts, ScalarType::Int, names.counts_axes, {shape[0], shape[1], shape[2]}),
            call.array(names.indices, indices, ScalarType::Int, names.axes, shape), std::nullopt};
  if (full) {
    list.full = call.array(names.full, *full, ScalarType::Bool, names.axes, shape);
  }
  return list;
}

inline BlockLists lists_of(const Tensor& q, const Tensor& k, const Grid& grid, const Shape& block_size, bool causal,
                           const BlockRows& rows, const BlockRows& columns) {
  const auto integer = [](std::int64_t x) { return static_cast<int>(x); };
  const int num_q = integer(q.sizes()[1]), num_k = integer(k.sizes()[1]);
  return {.first = {.num_q = num_q,
                    .num_k = num_k,
                    .left = num_k,
                    .right = causal ? 0 : num_q,
                    .block = {integer(block_size[0]), integer(block_size[1])},
                    .rows = rows,
                    .columns = columns},
          .batch = integer(grid.batch),
          .heads = integer(grid.heads)};
}

}  // namespace fastattn::binding

// A few queries over many keys: the query heads that read one key head are rows of the same tile, and the keys are
// parted among thread blocks.
#pragma once

#include <cstdint>

#include "fastattn/schedule/band.hpp"

namespace fastattn {

// Where a tile's first query lies, and the first of its heads.
struct GroupOrigin {
  int query, head;
};

// So many heads of so many queries.
struct GroupBox {
  int heads, queries;
};

// A band over one part of the keys, for heads that share them. A slot is a query and one of 2^shift heads, and its
// number query · 2^shift + head. Slots past the last query keep what the last one keeps, so that they make no tile
// partial: nobody reads them.
struct SplitBand {
  int num_q, num_k;  // slots, and keys of all parts
  Band band;         // of queries
  int shift, first_head;
  Interval keys;  // of this part, which begins and ends with a tile

  FASTATTN_HD constexpr int query(int slot) const { return min_of(slot >> shift, band.num_q - 1); }
  FASTATTN_HD constexpr bool keeps(int slot, int k) const { return keys.contains(k) && band.keeps(query(slot), k); }

  FASTATTN_HD constexpr Band::Cursor runs(int q_tile, TileShape shape) const {
    const int first = query(q_tile * shape.q), last = query(q_tile * shape.q + shape.q - 1);
    const auto within = [this, shape](int k_tile) {
      return min_of(max_of(k_tile, keys.begin / shape.k), ceil_div(keys.end, shape.k));
    };
    const Band::Cursor whole = band.runs_of({first, last + 1}, shape.k);
    return {within(whole.at), within(whole.end), within(whole.full_begin), within(whole.full_end)};
  }

  struct TileMask {
    Band::TileMask mask;  // whose first row is the tile's first query
    int first_slot, shift, last_query;

    FASTATTN_HD constexpr Band::RowMask row(int q) const {
      return mask.row(min_of((first_slot + q) >> shift, last_query) - min_of(first_slot >> shift, last_query));
    }
  };

  FASTATTN_HD constexpr TileMask tile_mask(int q_tile, int k_tile, TileShape shape, std::uint16_t cells) const {
    const int slot = q_tile * shape.q;
    return {band.tile_mask(query(slot), k_tile, {1, shape.k}, cells), slot, shift, band.num_q - 1};
  }

  // Tokens of partial results, which are of slots.
  FASTATTN_HD constexpr int query_token(int slot) const { return slot < num_q ? slot : -1; }
  FASTATTN_HD constexpr int query_token(int q_tile, int row, TileShape shape) const {
    return query_token(q_tile * shape.q + row);
  }
  FASTATTN_HD constexpr int key_token(int slot) const { return band.key_token(slot); }
  FASTATTN_HD constexpr GroupOrigin query_origin(int q_tile, TileShape shape) const {
    return {(q_tile * shape.q) >> shift, first_head};
  }
  FASTATTN_HD constexpr int key_origin(int k_tile, TileShape shape) const { return band.key_origin(k_tile, shape); }
  constexpr GroupBox query_box(TileShape shape) const { return {1 << shift, shape.q >> shift}; }
  constexpr int key_box(TileShape shape) const { return band.key_box(shape); }
};

// The bands of all parts, each of which is a head to the kernel: part `head % count` of key head `head / (count ·
// boxes)`, whose `group` query heads fill so many boxes of 2^shift heads.
struct SplitBands {
  static constexpr bool kInMemory = false;
  Band band;
  int kv_heads, group, boxes, shift;
  int count;      // of parts
  int first_key;  // that any query sees, or one before: of a tile
  int part_keys;  // a multiple of every tile

  constexpr bool suits(TileShape tile) const { return slots().num_q <= tile.q; }
  FASTATTN_HD constexpr SplitBand slots() const { return at(0, 0); }
  FASTATTN_HD constexpr SplitBand at(int, int head) const {
    const int part = head % count, box = head / count;
    const int first = first_key + part * part_keys;
    return {band.num_q << shift,       band.num_k, band, shift, box / boxes * group + (box % boxes << shift),
            {first, first + part_keys}};
  }
  // Of the kernel.
  FASTATTN_HD constexpr int heads() const { return kv_heads * boxes * count; }
};

FASTATTN_HD constexpr int num_heads(const SplitBands& schedules, int) { return schedules.heads(); }

static_assert(TileSchedule<SplitBand> && ScheduleFamily<SplitBands>);
static_assert(is_exact(SplitBand{12, 22, {3, 22, 30, 0}, 2, 0, {8, 16}}, {8, 4}));

}  // namespace fastattn

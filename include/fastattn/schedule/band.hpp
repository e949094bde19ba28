// Dense, causal and sliding-window attention: one schedule, told apart by two integers at run time.
#pragma once

#include <cstdint>

#include "fastattn/schedule/schedule.hpp"

namespace fastattn {

// Query q keeps key k when −left ≤ k − (q + num_k − num_q) ≤ right: a band around the diagonal that ends in the
// bottom-right corner. Causal is right = 0; an unbounded side is any value ≥ num_q + num_k.
struct Band {
  static constexpr bool kInMemory = false;
  int num_q, num_k, left, right;

  // Key tiles [at, end), of which [full_begin, full_end) are full.
  struct Cursor {
    int at, end, full_begin, full_end;

    FASTATTN_HD constexpr bool next(TileRun& run) {
      if (at >= end) {
        return false;
      }
      const bool full = full_begin <= at && at < full_end;
      const int stop = full ? full_end : (at < full_begin ? full_begin : end);
      run = {at, stop - at, full ? Coverage::kFull : Coverage::kPartial};
      at = stop;
      return true;
    }
  };

  struct RowMask {
    Interval kept;

    FASTATTN_HD constexpr bool keeps(int k) const { return kept.contains(k); }
    FASTATTN_HD constexpr std::uint32_t lane_bits(int first) const { return fastattn::lane_bits(kept, first); }
  };

  struct TileMask {
    int queries, keys;  // that there are from the tile's first on
    int diagonal;       // the key opposite to the tile's first query
    int left, right;    // of the band

    FASTATTN_HD constexpr Interval existing_keys(int q) const { return {0, q < queries ? keys : 0}; }
    FASTATTN_HD constexpr RowMask row(int q) const {
      const int begin = max_of(q + diagonal - left, 0);
      return {{begin, max_of(min_of(q + diagonal + right + 1, existing_keys(q).end), begin)}};
    }
  };

  FASTATTN_HD constexpr bool keeps(int q, int k) const {
    const int offset = k - q - (num_k - num_q);
    return -left <= offset && offset <= right && 0 <= k && k < num_k && q < num_q;
  }

  FASTATTN_HD constexpr TileMask tile_mask(int q_tile, int k_tile, TileShape shape, std::uint16_t) const {
    const int q = q_tile * shape.q, k = k_tile * shape.k;
    return {num_q - q, num_k - k, q + (num_k - num_q) - k, left, right};
  }

  FASTATTN_HD constexpr int query_token(int slot) const { return slot < num_q ? slot : -1; }
  FASTATTN_HD constexpr int query_token(int q_tile, int row, TileShape shape) const {
    return query_token(q_tile * shape.q + row);
  }
  FASTATTN_HD constexpr int key_token(int slot) const { return slot < num_k ? slot : -1; }
  FASTATTN_HD constexpr int query_origin(int q_tile, TileShape shape) const { return q_tile * shape.q; }
  FASTATTN_HD constexpr int key_origin(int k_tile, TileShape shape) const { return k_tile * shape.k; }
  constexpr int query_box(TileShape shape) const { return shape.q; }
  constexpr int key_box(TileShape shape) const { return shape.k; }

  // Is little of what a tile visits in vain, beside small tiles?
  constexpr bool suits(TileShape tile) const {
    return static_cast<double>(visited(tile)) <= kMostVisited * static_cast<double>(visited({64, 16}));
  }
  static constexpr double kMostVisited = 1.12;  // see csrc/ops/attention.md

  // Scores of all tiles that are visited.
  constexpr std::int64_t visited(TileShape tile) const {
    std::int64_t tiles = 0;
    for (int q_tile = 0; q_tile * tile.q < num_q; ++q_tile) {
      const Cursor cursor = runs(q_tile, tile);
      tiles += cursor.end - cursor.at;
    }
    return tiles * tile.q * tile.k;
  }

  // All that a query tile sees lies in consecutive key tiles, up to this one.
  FASTATTN_HD constexpr int last_k_tile(int q_tile, TileShape shape) const { return runs(q_tile, shape).end - 1; }

  FASTATTN_HD constexpr Band slots() const { return *this; }
  FASTATTN_HD constexpr Band at(int, int) const { return *this; }  // one mask for all heads

  FASTATTN_HD constexpr Cursor runs(int q_tile, TileShape shape) const {
    return runs_of({q_tile * shape.q, (q_tile + 1) * shape.q}, shape.k);
  }
  // Those of any queries, in tiles of so many keys.
  FASTATTN_HD constexpr Cursor runs_of(Interval queries, int keys) const {
    const int diagonal = num_k - num_q;
    const int q_first = queries.begin;
    const int q_last = min_of(queries.end, num_q) - 1;
    const int any_begin = max_of(q_first + diagonal - left, 0);         // some row keeps these keys
    const int any_end = min_of(q_last + diagonal + right + 1, num_k);   //
    const int all_begin = max_of(q_last + diagonal - left, 0);          // every row keeps these keys
    const int all_end = min_of(q_first + diagonal + right + 1, num_k);  //
    if (any_begin >= any_end) {
      return {0, 0, 0, 0};
    }
    const int begin = any_begin / keys, end = ceil_div(any_end, keys);
    const int full_begin = ceil_div(all_begin, keys), full_end = max_of(all_end, 0) / keys;
    const bool whole_rows = queries.end <= num_q;  // a query tile past the end has no full tile
    if (!whole_rows || full_begin >= full_end) {
      return {begin, end, end, end};
    }
    return {begin, end, full_begin, full_end};
  }

  // Does this query see no key?
  FASTATTN_HD constexpr bool is_blind(int q) const {
    const Cursor tiles = runs_of({q, q + 1}, 1);
    return tiles.at >= tiles.end;
  }

  FASTATTN_HD constexpr Band transposed() const { return {num_k, num_q, right, left}; }
};

// The same with sides of each head's own, of which the narrower ones count.
struct Bands {
  static constexpr bool kInMemory = true;
  Band of_all;
  // [heads], in memory of the device; below 0: unbounded. Null: the band of all.
  const std::int32_t *left = nullptr, *right = nullptr;

  constexpr bool suits(TileShape tile) const { return of_all.suits(tile); }
  FASTATTN_HD constexpr Band slots() const { return of_all; }
  FASTATTN_HD constexpr Band at(int, int head) const {
    const auto narrower = [head](const std::int32_t* own, int of_all) {
      return own == nullptr || own[head] < 0 ? of_all : min_of(static_cast<int>(own[head]), of_all);
    };
    return {of_all.num_q, of_all.num_k, narrower(left, of_all.left), narrower(right, of_all.right)};
  }
};

static_assert(TileSchedule<Band> && ScheduleFamily<Band> && ScheduleFamily<Bands>);
static_assert(is_exact(Band{17, 22, 6, 0}, {8, 4}));

}  // namespace fastattn

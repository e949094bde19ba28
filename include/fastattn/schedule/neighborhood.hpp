// Generalized neighborhood attention in one, two or three dimensions: each query keeps a box of keys around itself.
//
// Along an axis, a token at coordinate c belongs to dilation group c mod dilation, at position c div dilation. A query
// sees its own group only, and there a window of positions, which the `stride` queries of a stride group share. The
// mask is the conjunction of the axes, so that what a query keeps is a box, and so is what a tile of queries keeps.
//
// A tile is a box of positions of one dilation group. Tokens in the order of their tiles are called slots: dilation
// groups row-major, then the group's tiles row-major, then the tile's tokens row-major. Tiles are padded to whole
// boxes; a slot of padding keeps nothing and is kept by nothing.
#pragma once

#include "fastattn/schedule/schedule.hpp"

namespace fastattn {

inline constexpr int kAxes = 3;

// One value for each axis, outermost first. Indexed by constants once the loops are unrolled, hence in registers.
template <class T>
struct PerAxis {
  T at[kAxes];

  FASTATTN_HD constexpr PerAxis() : at{} {}
  FASTATTN_HD constexpr PerAxis(T outer, T middle, T inner) : at{outer, middle, inner} {}
  FASTATTN_HD constexpr T& operator[](int axis) { return at[axis]; }
  FASTATTN_HD constexpr const T& operator[](int axis) const { return at[axis]; }
};

template <class T>
FASTATTN_HD constexpr int product(const PerAxis<T>& x) {
  return x[0] * x[1] * x[2];
}

// Tokens of a grid of `length` tokens along each axis: `extent` of them, every `step`-th.
struct GridBox {
  PerAxis<int> length, extent, step;
};

// A divisor of numbers in [0, 2³¹) whose reciprocal is known: three instructions instead of twenty (round-up method of
// Granlund and Montgomery, 1994).
class Divisor {
 public:
  // 0, of an empty axis, is a number to multiply by.
  FASTATTN_HD constexpr Divisor(int value = 1) : value_(value) {
    const auto divisor = static_cast<std::uint32_t>(max_of(value, 1));
    while ((1u << shift_) < divisor) {
      ++shift_;
    }
    const std::uint64_t excess = (std::uint64_t{1} << shift_) - divisor;
    multiplier_ = static_cast<std::uint32_t>((excess << 32) / divisor + 1);
  }

  FASTATTN_HD constexpr operator int() const { return value_; }

  FASTATTN_HD friend constexpr int operator/(int x, const Divisor& y) {
    const auto dividend = static_cast<std::uint32_t>(x);
    const auto product = static_cast<std::uint32_t>(std::uint64_t{y.multiplier_} * dividend >> 32);
    return static_cast<int>((product + dividend) >> y.shift_);
  }
  FASTATTN_HD friend constexpr int operator%(int x, const Divisor& y) { return x - x / y * y.value_; }

 private:
  int value_, shift_ = 0;
  std::uint32_t multiplier_ = 0;
};

// The problem along one axis. A problem of fewer dimensions leads with axes of length 1.
struct NeighborhoodAxis {
  int length;
  int window = -1;               // positions; −1 or more than there are: all of them
  int stride = 1, dilation = 1;  // 1 ≤ stride ≤ window
  bool causal = false;
};

// The windows along one axis of one dilation group with `length` positions, of which every window spans `window`.
struct WindowRule {
  int length, window;
  Divisor stride;
  bool causal;

  // A stride group has the window of its leader: the query in its middle or, if causal, its last one. At an edge the
  // window moves inwards as a whole.
  FASTATTN_HD constexpr Interval keys_of(int query) const {
    const int leader = min_of(query / stride * stride + leader_offset(), length - 1);
    const int begin = max_of(min_of(leader - left(), length - window), 0);
    return {begin, causal ? query + 1 : begin + window};
  }

  // Windows begin and end in the order of their queries: a key is kept by those whose window has begun and not ended.
  FASTATTN_HD constexpr Interval queries_of(int key) const {
    return {causal ? key : windows_begun(key - window), windows_begun(key)};
  }

 private:
  FASTATTN_HD constexpr int leader_offset() const { return causal ? stride - 1 : stride / 2; }
  FASTATTN_HD constexpr int left() const { return causal ? window - 1 : window / 2; }

  // Number of queries whose window begins at `key` or before.
  FASTATTN_HD constexpr int windows_begun(int key) const {
    if (key < 0) {
      return 0;
    }
    if (key >= length - window) {
      return length;
    }
    return min_of((key + left() - leader_offset() + stride) / stride * stride, length);
  }
};

// Where a slot is: its dilation group, and its position in that group (past the end of the group: padding).
struct SlotPlace {
  PerAxis<int> group, position;
};

// The positions of a tile. A kernel that finds its way in a tile score by score wants them fixed when it is compiled.
struct AnyBox {
  PerAxis<int> extents;

  FASTATTN_HD constexpr PerAxis<int> extent() const { return extents; }
};
template <int kOuter, int kMiddle, int kInner>
struct FixedBox {
  FASTATTN_HD static constexpr PerAxis<int> extent() { return {kOuter, kMiddle, kInner}; }
};

// Where in a box its `slot` is. Unsigned, for then powers of two are shifts.
FASTATTN_HD constexpr PerAxis<int> position_in_box(const PerAxis<int>& extent, unsigned slot) {
  const unsigned inner = static_cast<unsigned>(extent[2]), middle = static_cast<unsigned>(extent[1]);
  return {static_cast<int>(slot / inner / middle), static_cast<int>(slot / inner % middle),
          static_cast<int>(slot % inner)};
}

// How the tokens of one side are cut into tiles: boxes, `tiles` of them in each dilation group.
template <class Box>
struct BoxTiling {
  Box box;
  PerAxis<Divisor> tiles;

  FASTATTN_HD constexpr PerAxis<int> extent() const { return box.extent(); }
  FASTATTN_HD constexpr int slots() const { return product(extent()); }  // of a tile
};

// kTransposed: the queries of this schedule are the keys of the problem. Made by make_neighborhood and transposed().
template <bool kTransposed, class QBox = AnyBox, class KBox = AnyBox>
struct NeighborhoodSchedule {
  static constexpr bool kInMemory = false;
  int num_q, num_k;  // slots
  PerAxis<NeighborhoodAxis> axes;
  PerAxis<Divisor> stride, dilation;  // of the axes
  BoxTiling<QBox> q_tiling;
  BoxTiling<KBox> k_tiling;

  // Yields the box of key tiles row by row, cut where full tiles begin and end.
  struct Cursor {
    PerAxis<Interval> any, full;  // tiles with some kept score, tiles with nothing but kept scores
    PerAxis<int> at;
    PerAxis<int> tiles;
    int first_of_group;

    FASTATTN_HD constexpr bool next(TileRun& run) {
      if (at[0] >= any[0].end) {
        return false;
      }
      const bool row_has_full = full[0].contains(at[0]) && full[1].contains(at[1]);
      const bool is_full = row_has_full && full[2].contains(at[2]);
      const bool before_full = row_has_full && at[2] < full[2].begin;
      const int stop = is_full ? full[2].end : (before_full ? full[2].begin : any[2].end);
      run = {first_of_group + (at[0] * tiles[1] + at[1]) * tiles[2] + at[2], stop - at[2],
             is_full ? Coverage::kFull : Coverage::kPartial};
      at[2] = stop;
      if (at[2] == any[2].end) {
        at[2] = any[2].begin;
        if (++at[1] == any[1].end) {
          at[1] = any[1].begin;
          ++at[0];
        }
      }
      return true;
    }
  };

  FASTATTN_HD constexpr TileShape tile_shape() const { return {q_tiling.slots(), k_tiling.slots()}; }

  FASTATTN_HD constexpr bool keeps(int q, int k) const {
    if (q < 0 || q >= num_q || k < 0 || k >= num_k) {
      return false;
    }
    const SlotPlace query = place(q_tiling, q), key = place(k_tiling, k);
    const PerAxis<Interval> kept = kept_keys(query);
    bool keeps = true;
    for (int a = 0; a < kAxes; ++a) {
      keeps = keeps && query.group[a] == key.group[a] && kept[a].contains(key.position[a]);
    }
    return keeps;
  }

  FASTATTN_HD static constexpr bool is_power_of_two(int x) { return (x & (x - 1)) == 0; }
  // The first `width` bits, again and again.
  FASTATTN_HD static constexpr std::uint32_t repeated(std::uint32_t bits, int width) {
    for (; width < 32; width *= 2) {
      bits |= bits << width;
    }
    return bits;
  }
  // Fields of `width` bits, those in `kept` set.
  FASTATTN_HD static constexpr std::uint32_t bits_of(Interval kept, int width) {
    return low_bits(kept.end * width) & ~low_bits(kept.begin * width);
  }

  // The mask of one query in one key tile.
  struct RowMask {
    KBox box;
    PerAxis<Interval> kept;  // positions in the tile

    FASTATTN_HD constexpr bool keeps(int slot) const {
      const PerAxis<int> at = position_in_box(box.extent(), static_cast<unsigned>(slot));
      return kept[0].contains(at[0]) & kept[1].contains(at[1]) & kept[2].contains(at[2]);
    }

    // In the boxes of GPU tiles a line of the innermost axis is whole octets, and extents are powers of two: one word
    // for a line, repeated, and cut by the ranges of kept lines and planes. Score by score for any other box.
    FASTATTN_HD constexpr std::uint32_t lane_bits(int first) const {
      const PerAxis<int> extent = box.extent();
      const int line = extent[2] / 4, plane = extent[1] * line;  // bits
      if (extent[2] % 8 == 0 && is_power_of_two(line) && is_power_of_two(plane)) {
        const Interval in_line{kept[2].begin, min_of(kept[2].end, extent[2])};
        const Interval in_plane{kept[1].begin, min_of(kept[1].end, extent[1])};
        return repeated(fastattn::lane_bits(in_line, first), line) & repeated(bits_of(in_plane, line), plane) &
               bits_of(kept[0], plane);
      }
      std::uint32_t bits = 0;
      for (int i = 0; i < min_of(ceil_div(product(extent), 8) * 2, 32); ++i) {
        bits |= std::uint32_t{keeps(i / 2 * 8 + first + i % 2)} << i;
      }
      return bits;
    }
  };

  struct TileMask {
    NeighborhoodSchedule schedule;
    SlotPlace query_tile, key_tile;

    FASTATTN_HD constexpr RowMask row(int q) const {
      const PerAxis<int> at = position_in_box(schedule.q_tiling.extent(), static_cast<unsigned>(q));
      RowMask row{schedule.k_tiling.box, schedule.kept_keys(advance(query_tile, at))};
      for (int a = 0; a < kAxes; ++a) {
        row.kept[a].begin -= key_tile.position[a];
        row.kept[a].end -= key_tile.position[a];
      }
      return row;
    }
  };

  FASTATTN_HD constexpr TileMask tile_mask(int q_tile, int k_tile, TileShape, std::uint16_t) const {
    return {*this, place_of_tile(q_tiling, q_tile), place_of_tile(k_tiling, k_tile)};
  }

  constexpr bool suits(TileShape) const { return true; }
  FASTATTN_HD constexpr NeighborhoodSchedule slots() const { return *this; }
  FASTATTN_HD constexpr NeighborhoodSchedule at(int, int) const { return *this; }  // one mask for all heads

  // The positions that a query keeps in its dilation group; none if it is padding.
  FASTATTN_HD constexpr PerAxis<Interval> kept_keys(const SlotPlace& query) const {
    PerAxis<Interval> kept;
    for (int a = 0; a < kAxes; ++a) {
      const WindowRule rule = rule_of(a, query.group[a]);
      kept[a] = query.position[a] < rule.length ? kept_by(rule, query.position[a]) : Interval{0, 0};
    }
    return kept;
  }

  // `shape` is tile_shape(): a box has no other.
  FASTATTN_HD constexpr Cursor runs(int q_tile, TileShape) const {
    const SlotPlace origin = place_of_tile(q_tiling, q_tile);
    Cursor cursor{};
    bool empty = false;
    for (int a = 0; a < kAxes; ++a) {
      const WindowRule rule = rule_of(a, origin.group[a]);
      const int first = origin.position[a], end = first + q_tiling.extent()[a];
      const Interval kept_first = kept_by(rule, first), kept_last = kept_by(rule, min_of(end, rule.length) - 1);
      const int extent = k_tiling.extent()[a];
      cursor.any[a] = {kept_first.begin / extent, ceil_div(kept_last.end, extent)};
      cursor.full[a] = {ceil_div(kept_last.begin, extent), kept_first.end / extent};
      if (end > rule.length || cursor.full[a].empty()) {  // a query of padding keeps nothing
        cursor.full[a] = {cursor.any[a].end, cursor.any[a].end};
      }
      cursor.at[a] = cursor.any[a].begin;
      cursor.tiles[a] = k_tiling.tiles[a];
      empty = empty || first >= rule.length || cursor.any[a].empty();
    }
    cursor.first_of_group = q_tile / product(q_tiling.tiles) * product(k_tiling.tiles);
    if (empty) {
      cursor.at[0] = cursor.any[0].end;
    }
    return cursor;
  }

  FASTATTN_HD constexpr NeighborhoodSchedule<!kTransposed, KBox, QBox> transposed() const {
    return {num_k, num_q, axes, stride, dilation, k_tiling, q_tiling};
  }

  // Row-major index of a slot's token, −1 for padding.
  FASTATTN_HD constexpr int query_token(int slot) const { return token(q_tiling, slot, num_q); }
  FASTATTN_HD constexpr int query_token(int q_tile, int row, TileShape) const {
    return token_at(
        advance(place_of_tile(q_tiling, q_tile), position_in_box(q_tiling.extent(), static_cast<unsigned>(row))));
  }
  FASTATTN_HD constexpr int key_token(int slot) const { return token(k_tiling, slot, num_k); }

  FASTATTN_HD constexpr SlotPlace query_place(int slot) const { return place(q_tiling, slot); }
  FASTATTN_HD constexpr SlotPlace key_place(int slot) const { return place(k_tiling, slot); }

  // Where a tile's tokens lie: the coordinates of its first, and the box that follows. Coordinates past the end of an
  // axis are padding.
  FASTATTN_HD constexpr PerAxis<int> query_origin(int q_tile, TileShape) const {
    return coordinates(place_of_tile(q_tiling, q_tile));
  }
  FASTATTN_HD constexpr PerAxis<int> key_origin(int k_tile, TileShape) const {
    return coordinates(place_of_tile(k_tiling, k_tile));
  }
  constexpr GridBox query_box(TileShape) const { return grid_box(q_tiling.extent()); }
  constexpr GridBox key_box(TileShape) const { return grid_box(k_tiling.extent()); }

  // The number of kept scores: the pairs of a product set are counted axis by axis.
  constexpr long kept_scores() const {
    long scores = 1;
    for (int a = 0; a < kAxes; ++a) {
      long pairs = 0;
      for (int group = 0; group < axes[a].dilation; ++group) {
        const WindowRule rule = rule_of(a, group);
        for (int query = 0; query < rule.length; ++query) {
          const Interval kept = kept_by(rule, query);
          pairs += kept.end - kept.begin;
        }
      }
      scores *= pairs;
    }
    return scores;
  }

 private:
  FASTATTN_HD constexpr WindowRule rule_of(int a, int group) const {
    const NeighborhoodAxis& axis = axes[a];
    const int length = (axis.length - group + axis.dilation - 1) / dilation[a];
    return {length, min_of(axis.window, length), stride[a], axis.causal};
  }

  FASTATTN_HD static constexpr Interval kept_by(const WindowRule& rule, int position) {
    if constexpr (kTransposed) {
      return rule.queries_of(position);
    } else {
      return rule.keys_of(position);
    }
  }

  constexpr GridBox grid_box(const PerAxis<int>& extent) const {
    GridBox box{{}, extent, {}};
    for (int a = 0; a < kAxes; ++a) {
      box.length[a] = axes[a].length;
      box.step[a] = axes[a].dilation;
    }
    return box;
  }

  template <class Box>
  FASTATTN_HD constexpr SlotPlace place_of_tile(const BoxTiling<Box>& tiling, int tile) const {
    SlotPlace place;
    for (int a = kAxes - 1; a >= 0; --a) {
      place.position[a] = tile % tiling.tiles[a] * tiling.extent()[a];
      tile = tile / tiling.tiles[a];
    }
    for (int a = kAxes - 1; a >= 0; --a) {
      place.group[a] = tile % dilation[a];
      tile = tile / dilation[a];
    }
    return place;
  }

  template <class Box>
  FASTATTN_HD constexpr SlotPlace place(const BoxTiling<Box>& tiling, int slot) const {
    return advance(place_of_tile(tiling, slot / tiling.slots()),
                   position_in_box(tiling.extent(), slot % tiling.slots()));
  }

  FASTATTN_HD static constexpr SlotPlace advance(SlotPlace place, const PerAxis<int>& positions) {
    for (int a = 0; a < kAxes; ++a) {
      place.position[a] += positions[a];
    }
    return place;
  }

  FASTATTN_HD constexpr PerAxis<int> coordinates(const SlotPlace& place) const {
    PerAxis<int> at;
    for (int a = 0; a < kAxes; ++a) {
      at[a] = place.group[a] + place.position[a] * axes[a].dilation;
    }
    return at;
  }

  template <class Box>
  FASTATTN_HD constexpr int token(const BoxTiling<Box>& tiling, int slot, int num_slots) const {
    return slot < 0 || slot >= num_slots ? -1 : token_at(place(tiling, slot));
  }

  FASTATTN_HD constexpr int token_at(const SlotPlace& place) const {
    const PerAxis<int> at = coordinates(place);
    const bool exists = at[0] < axes[0].length && at[1] < axes[1].length && at[2] < axes[2].length;
    return exists ? (at[0] * axes[1].length + at[1]) * axes[2].length + at[2] : -1;
  }
};

using Neighborhood = NeighborhoodSchedule<false>;

// The schedule of a valid problem in query tiles of `q_box` and key tiles of `k_box`.
template <class QBox, class KBox>
constexpr NeighborhoodSchedule<false, QBox, KBox> make_neighborhood(PerAxis<NeighborhoodAxis> axes, QBox q_box,
                                                                    KBox k_box) {
  BoxTiling<QBox> q_tiling{q_box, {}};
  BoxTiling<KBox> k_tiling{k_box, {}};
  PerAxis<Divisor> stride, dilation;
  int groups = 1;
  for (int a = 0; a < kAxes; ++a) {
    NeighborhoodAxis& axis = axes[a];
    axis.window = axis.window == -1 ? axis.length : axis.window;
    axis.dilation = max_of(min_of(axis.dilation, axis.length), 1);  // a larger one has empty groups only to add
    const int longest_group = ceil_div(axis.length, axis.dilation);
    q_tiling.tiles[a] = ceil_div(longest_group, q_tiling.extent()[a]);
    k_tiling.tiles[a] = ceil_div(longest_group, k_tiling.extent()[a]);
    groups *= axis.dilation;
    stride[a] = axis.stride;
    dilation[a] = axis.dilation;
  }
  return {groups * product(q_tiling.tiles) * q_tiling.slots(),
          groups * product(k_tiling.tiles) * k_tiling.slots(),
          axes,
          stride,
          dilation,
          q_tiling,
          k_tiling};
}

constexpr Neighborhood make_neighborhood(PerAxis<NeighborhoodAxis> axes, PerAxis<int> q_box, PerAxis<int> k_box) {
  return make_neighborhood(axes, AnyBox{q_box}, AnyBox{k_box});
}

static_assert(TileSchedule<Neighborhood> && TileSchedule<NeighborhoodSchedule<true>>);
static_assert(is_exact(make_neighborhood({{1}, {3, 2}, {5, 3, 2, 2}}, {1, 2, 2}, {1, 1, 4}), {4, 4}));

}  // namespace fastattn

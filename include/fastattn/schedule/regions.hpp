// A band, rectangles that are seen beside it, and segments that keep to themselves: prompts of text and images, and
// sequences packed into one.
//
// The band and the rectangles are intervals of tiles, so what a cursor finds holds as far as the next edge of any of
// them. Segments are data. A survey notes for each 64 tokens the least and the greatest of their ids, before the
// attention; a tile whose queries and keys have no ids in common by that is not visited, and one whose ids are all the
// same is not cut. Any order of ids is right, one that keeps a segment together is fast.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastattn/schedule/band.hpp"

namespace fastattn {

// [batch or 1, count, 4], in memory of the device: of each the first query, the end of its queries, the first key and
// the end of its keys. It may reach outside the tensor, and is empty where an end is not behind its beginning.
struct Rectangles {
  const std::int32_t* sides = nullptr;
  std::int64_t batch = 1, count = 0;

  static constexpr int kMost = 4, kSides = 4;
};

struct Rectangle {
  Interval queries, keys;
};

// The segment that each token is in, [batch or 1, tokens], in memory of the device; null: all are in one.
struct SegmentIds {
  const std::int32_t* ids = nullptr;
  std::int64_t batch = 1;
};

struct Segments {
  SegmentIds q, k;  // both or none

  FASTATTN_HD constexpr bool exist() const { return q.ids != nullptr; }
};

inline constexpr int kSurveyedTokens = 64;

template <class Int>
FASTATTN_HD constexpr Int num_surveyed(Int tokens) {
  return ceil_div<Int>(tokens, kSurveyedTokens);
}

// The ids of a group of tokens are among these.
struct alignas(8) IdRange {
  std::int32_t least, greatest;

  FASTATTN_HD constexpr bool meets(IdRange other) const { return least <= other.greatest && other.least <= greatest; }
  FASTATTN_HD constexpr IdRange joined(IdRange other) const {
    return {min_of(least, other.least), max_of(greatest, other.greatest)};
  }
  FASTATTN_HD constexpr bool of_one() const { return least == greatest; }
};

// The reach of queries that meet no keys, and whose union with any other is that.
inline constexpr Interval kNoReach{1 << 24, 0};

// What is found out about segments, in a workspace: see survey_in().
struct SegmentSurvey {
  IdRange *q = nullptr, *k = nullptr;  // [batch or 1, num_surveyed(tokens)]
  // [batch or 1, num_surveyed(num_q)]: from the first group of keys to the last that meets a group of queries.
  Interval* reach = nullptr;
  std::int64_t reach_batch = 1;
};

// The segments of one sequence of tokens.
struct TokenSegments {
  const std::int32_t* ids;
  const IdRange* ranges;
  const Interval* reach;  // null: not known

  FASTATTN_HD constexpr IdRange range(Interval tokens) const {
    int group = tokens.begin / kSurveyedTokens;
    IdRange range = ranges[group];
    for (++group; group * kSurveyedTokens < tokens.end; ++group) {
      range = range.joined(ranges[group]);
    }
    return range;
  }
};

// The mask of one head: query q keeps key k when the band or a rectangle holds (q, k) and both are in one segment.
struct Region {
  int num_q, num_k;                // tokens
  int left, right;                 // the band, see Band
  const std::int32_t* rectangles;  // see Rectangles
  int num_rectangles;
  int query_sides;  // which of a rectangle's sides are the queries': from 0 on, or transposed from 2 on
  TokenSegments q_segments, k_segments;  // both or none

  // Bounds how far a cursor reads ahead before it yields: a kernel loads the first tile of a run when the run is known.
  static constexpr int kLongestRun = 16;

  // A run's cells: does the band keep some of a tile, does rectangle i, and do segments cut it?
  static constexpr int kBandCell = 0, kRectangleCell = 1, kSegmentsCell = kRectangleCell + Rectangles::kMost;

  struct RowMask {
    Interval seen[1 + Rectangles::kMost];  // the band's keys and the rectangles'
    const std::int32_t* key_ids;           // of the tile's first key on; null: segments do not cut the tile
    int id;                                // the query's
    int tile_keys;

    FASTATTN_HD constexpr bool keeps(int k) const {
      bool is_seen = false;
      for (const Interval& interval : seen) {
        is_seen |= interval.contains(k);
      }
      if (key_ids == nullptr) {
        return is_seen;  // without a read or a branch: a CPU tests a vector of scores at a time
      }
      return is_seen && key_ids[k] == id;
    }
    FASTATTN_HD constexpr std::uint32_t lane_bits(int first) const {
      std::uint32_t bits = 0;
      for (const Interval& interval : seen) {
        bits |= fastattn::lane_bits(interval, first);
      }
      if (key_ids != nullptr) {
        for (int i = 0; i < ceil_div(tile_keys, 8) * 2; ++i) {
          const std::uint32_t bit = std::uint32_t{1} << i;
          bits &= (bits & bit) != 0 && key_ids[i / 2 * 8 + first + i % 2] != id ? ~bit : ~std::uint32_t{0};
        }
      }
      return bits;
    }
  };

  struct TileMask {
    Band::TileMask band;
    Rectangle rectangles[Rectangles::kMost];  // from the tile's first query and key on
    const std::int32_t *query_ids, *key_ids;  // likewise; null: segments do not cut the tile
    int tile_keys;

    FASTATTN_HD constexpr RowMask row(int q) const {
      RowMask row{{band.row(q).kept}, key_ids, 0, tile_keys};
      for (int i = 0; i < Rectangles::kMost; ++i) {
        row.seen[1 + i] = rectangles[i].queries.contains(q) ? rectangles[i].keys : Interval{0, 0};
      }
      row.id = query_ids != nullptr && q < band.queries ? query_ids[q] : 0;
      return row;
    }
  };

  // In a kernel, ask a tile_mask().
  FASTATTN_HD constexpr bool keeps(int q, int k) const {
    if (q < 0 || q >= num_q || k < 0 || k >= num_k) {
      return false;
    }
    bool seen = band().keeps(q, k);
    for (int i = 0; i < num_rectangles; ++i) {
      seen = seen || (rectangle(i).queries.contains(q) && rectangle(i).keys.contains(k));
    }
    return seen && (!has_segments() || q_segments.ids[q] == k_segments.ids[k]);
  }

  FASTATTN_HD constexpr TileMask tile_mask(int q_tile, int k_tile, TileShape shape, std::uint16_t cells) const {
    const auto has = [cells](int cell) { return (cells >> cell & 1) != 0; };
    const auto moved = [](Interval interval, int by) { return Interval{interval.begin - by, interval.end - by}; };
    const int q = q_tile * shape.q, k = k_tile * shape.k;
    TileMask mask{band().tile_mask(q_tile, k_tile, shape, cells), {}, nullptr, nullptr, shape.k};
    for (int i = 0; i < Rectangles::kMost; ++i) {
      if (has(kRectangleCell + i)) {
        const Rectangle seen = rectangle(i);
        mask.rectangles[i] = {moved(seen.queries, q), moved(seen.keys, k)};
      }
    }
    if (has(kSegmentsCell)) {
      mask.query_ids = q_segments.ids + q;
      mask.key_ids = k_segments.ids + k;
    }
    return mask;
  }

  FASTATTN_HD constexpr int query_token(int slot) const { return band().query_token(slot); }
  FASTATTN_HD constexpr int query_token(int q_tile, int row, TileShape shape) const {
    return band().query_token(q_tile, row, shape);
  }
  FASTATTN_HD constexpr int key_token(int slot) const { return band().key_token(slot); }
  FASTATTN_HD constexpr int query_origin(int q_tile, TileShape shape) const { return q_tile * shape.q; }
  FASTATTN_HD constexpr int key_origin(int k_tile, TileShape shape) const { return k_tile * shape.k; }
  constexpr int query_box(TileShape shape) const { return shape.q; }
  constexpr int key_box(TileShape shape) const { return shape.k; }

  struct Cursor;
  FASTATTN_HD constexpr Cursor runs(int q_tile, TileShape shape) const;

  FASTATTN_HD constexpr Region transposed() const {
    return {num_k, num_q, right, left, rectangles, num_rectangles, 2 - query_sides, k_segments, q_segments};
  }

  FASTATTN_HD constexpr Band band() const { return {num_q, num_k, left, right}; }
  FASTATTN_HD constexpr bool has_segments() const { return q_segments.ids != nullptr; }

  // As much of it as there is.
  FASTATTN_HD constexpr Rectangle rectangle(int i) const {
    const auto clipped = [](const std::int32_t* sides, int count) {
      const int begin = min_of(max_of<int>(sides[0], 0), count);
      return Interval{begin, min_of(max_of<int>(sides[1], begin), count)};
    };
    const std::int32_t* const sides = rectangles + Rectangles::kSides * i;
    return {clipped(sides + query_sides, num_q), clipped(sides + 2 - query_sides, num_k)};
  }

  // The tiles of query tile `q_tile` that it covers, as a band's.
  FASTATTN_HD constexpr Band::Cursor tiles_of_rectangle(int i, int q_tile, TileShape shape) const {
    const auto [queries, keys] = rectangle(i);
    const Interval tile{q_tile * shape.q, (q_tile + 1) * shape.q};
    if (keys.empty() || max_of(queries.begin, tile.begin) >= min_of(queries.end, tile.end)) {
      return {0, 0, 0, 0};
    }
    const int begin = keys.begin / shape.k, end = ceil_div(keys.end, shape.k);
    const int full_begin = ceil_div(keys.begin, shape.k), full_end = keys.end / shape.k;
    const bool whole_rows = queries.begin <= tile.begin && tile.end <= queries.end;
    if (!whole_rows || full_begin >= full_end) {
      return {begin, end, end, end};
    }
    return {begin, end, full_begin, full_end};
  }
};

struct Region::Cursor {
  Region region;
  TileShape shape;
  int q_tile;
  int at, end;          // tiles that are left
  int stop;             // up to which the band and the rectangles keep as much as of tile `at`
  std::uint16_t cells;  // of these tiles, but for the segments
  bool full;
  IdRange ids;  // of the queries

  enum class Share : std::uint8_t { kNothing, kSome, kAll };

  FASTATTN_HD constexpr bool next(TileRun& run) {
    while (at < end) {
      if (at >= stop) {
        find_stop();
      }
      if (cells == 0) {
        at = stop;
        continue;
      }
      const int first = at;
      const Share share = share_of_segments(first);
      at = region.has_segments() ? end_of(share) : stop;
      if (share == Share::kAll && full) {
        run = {first, at - first, Coverage::kFull};
        return true;
      }
      if (share != Share::kNothing) {
        const int cut = (share == Share::kSome) << kSegmentsCell;
        run = {first, at - first, Coverage::kPartial, static_cast<std::uint16_t>(cells | cut)};
        return true;
      }
    }
    return false;
  }

  // What the band and the rectangles keep of tile `at`, and the next tile where one of them has an edge.
  FASTATTN_HD constexpr void find_stop() {
    stop = end;
    cells = 0;
    full = false;
    pass(region.band().runs(q_tile, shape), kBandCell);
    for (int i = 0; i < Rectangles::kMost; ++i) {
      if (i < region.num_rectangles) {
        pass(region.tiles_of_rectangle(i, q_tile, shape), kRectangleCell + i);
      }
    }
  }

  FASTATTN_HD constexpr void pass(const Band::Cursor& tiles, int cell) {
    cells |= static_cast<std::uint16_t>((tiles.at <= at && at < tiles.end) << cell);
    full = full || (tiles.full_begin <= at && at < tiles.full_end);
    const auto stop_at = [this](int edge) { stop = at < edge ? min_of(stop, edge) : stop; };
    stop_at(tiles.at);
    stop_at(tiles.full_begin);
    stop_at(tiles.full_end);
    stop_at(tiles.end);
  }

  // Behind the tiles from `at` on that share as much.
  FASTATTN_HD constexpr int end_of(Share share) const {
    const int most = min_of(stop, at + kLongestRun);
    int k_tile = at + 1;
    while (k_tile < most && share_of_segments(k_tile) == share) {
      ++k_tile;
    }
    return k_tile;
  }

  FASTATTN_HD constexpr Share share_of_segments(int k_tile) const {
    if (!region.has_segments()) {
      return Share::kAll;
    }
    const int k = k_tile * shape.k;
    const IdRange keys = region.k_segments.range({k, min_of(k + shape.k, region.num_k)});
    return !keys.meets(ids) ? Share::kNothing : keys.joined(ids).of_one() ? Share::kAll : Share::kSome;
  }
};

FASTATTN_HD constexpr Region::Cursor Region::runs(int q_tile, TileShape shape) const {
  Cursor cursor{*this, shape, q_tile, 0, ceil_div(num_k, shape.k), 0, 0, false, {}};
  if (has_segments()) {
    const Interval tile{q_tile * shape.q, min_of((q_tile + 1) * shape.q, num_q)};
    cursor.ids = q_segments.range(tile);
    if (q_segments.reach != nullptr) {
      Interval reach = kNoReach;
      for (int group = tile.begin / kSurveyedTokens; group * kSurveyedTokens < tile.end; ++group) {
        const Interval of_group = q_segments.reach[group];
        reach = {min_of(reach.begin, of_group.begin), max_of(reach.end, of_group.end)};
      }
      cursor.at = reach.begin * kSurveyedTokens / shape.k;
      cursor.end = min_of(cursor.end, ceil_div(reach.end * kSurveyedTokens, shape.k));
    }
  }
  return cursor;
}

// Those of all heads.
struct Regions {
  static constexpr bool kInMemory = true;
  Bands bands;
  Rectangles rectangles;
  Segments segments;
  SegmentSurvey survey;

  constexpr bool suits(TileShape tile) const { return bands.suits(tile); }
  FASTATTN_HD constexpr Region slots() const { return of_band(bands.slots()); }
  FASTATTN_HD constexpr Region at(int batch, int head) const {
    Region region = of_band(bands.at(batch, head));
    if (rectangles.count > 0) {
      region.rectangles = rectangles.sides + entry(rectangles.batch, batch, rectangles.count * Rectangles::kSides);
      region.num_rectangles = static_cast<int>(rectangles.count);
    }
    if (segments.exist()) {
      const auto tokens = [batch](const SegmentIds& of_all, const IdRange* ranges, int count) {
        return TokenSegments{of_all.ids + entry(of_all.batch, batch, count),
                             ranges + entry(of_all.batch, batch, num_surveyed(count)), nullptr};
      };
      region.q_segments = tokens(segments.q, survey.q, region.num_q);
      region.k_segments = tokens(segments.k, survey.k, region.num_k);
      region.q_segments.reach = survey.reach + entry(survey.reach_batch, batch, num_surveyed(region.num_q));
    }
    return region;
  }

  // Where the entry of a batch begins, among `count` or one of `size`.
  FASTATTN_HD static constexpr std::int64_t entry(std::int64_t count, int batch, std::int64_t size) {
    return count == 1 ? 0 : batch * size;
  }
  FASTATTN_HD static constexpr Region of_band(const Band& band) {
    return {band.num_q, band.num_k, band.left, band.right, nullptr, 0, 0, {}, {}};
  }
};

// Lays the survey of segments out in `memory`, 8-byte aligned, of survey_bytes(…).
inline SegmentSurvey survey_in(void* memory, const Segments& segments, int num_q, int num_k) {
  SegmentSurvey survey;
  survey.reach_batch = max_of(segments.q.batch, segments.k.batch);
  survey.q = static_cast<IdRange*>(memory);
  survey.k = survey.q + segments.q.batch * num_surveyed(num_q);
  survey.reach = reinterpret_cast<Interval*>(survey.k + segments.k.batch * num_surveyed(num_k));
  return survey;
}

constexpr std::size_t survey_bytes(const Segments& segments, std::int64_t num_q, std::int64_t num_k) {
  const std::int64_t ranges = segments.q.batch * num_surveyed(num_q) + segments.k.batch * num_surveyed(num_k);
  const std::int64_t reach = max_of(segments.q.batch, segments.k.batch) * num_surveyed(num_q);
  return segments.exist() ? ranges * sizeof(IdRange) + reach * sizeof(Interval) : 0;
}

static_assert(TileSchedule<Region> && ScheduleFamily<Regions>);
static_assert([] {
  const std::int32_t rectangles[] = {0, 6, 1, 9, 3, 20, -5, 2};
  return is_exact(Region{9, 11, 20, 0, rectangles, 2, 0, {}, {}}, {4, 4});
}());

}  // namespace fastattn

// A schedule says which key tiles a query tile visits, and which scores inside them survive.
//
// A mask is defined once, by `keeps(q, k)`. Its tiles come as runs of consecutive key tiles with a coverage: full tiles
// need no mask, partial tiles ask their tile mask row by row and score by score, empty tiles are never produced. The
// TMA producer, the WGMMA consumer, the CPU kernel and the planner all iterate with `for_each_tile`; they differ only
// in the body they pass.
//
// Queries and keys are counted in slots, the order in which tiles take them. `query_token` and `key_token` tell where
// in the tensors a slot is; for most schedules slot and token are the same.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "fastattn/portable.hpp"

namespace fastattn {

// Queries × keys of one score tile.
struct TileShape {
  int q, k;
};

enum class Coverage : std::uint8_t { kPartial, kFull };

// `count` consecutive key tiles, starting at tile `first`.
struct TileRun {
  int first, count;
  Coverage coverage;
  // Of partial tiles, what the cursor has read and tile_mask() would have to read again: it is told these bits, and
  // their meaning is the schedule's own. 0 in full tiles, and where the tile's number says it all. No more bits than
  // are needed: in the registers of a producer that reads a list, a word of its own would be spilled.
  std::uint16_t cells = 0;

  // One of `parts` parts, as long as the others.
  FASTATTN_HD constexpr TileRun share(int part, int parts) const {
    const int begin = count * part / parts, end = count * (part + 1) / parts;
    return {first + begin, end - begin, coverage, cells};
  }
};

// Coverage as a type, so that a body compiles its masked and its unmasked form separately.
template <Coverage kCoverage>
using CoverageTag = std::integral_constant<Coverage, kCoverage>;

// Yields the runs of one query tile in visiting order. A small state machine: an array of runs indexed at run time
// would live in local memory on the GPU.
template <class C>
concept RunCursor = requires(C cursor, TileRun& run) {
  { cursor.next(run) } -> std::same_as<bool>;
};

// begin ≤ x < end
struct Interval {
  int begin, end;

  // One comparison where begin ≤ end; scores are asked for by the million.
  FASTATTN_HD constexpr bool contains(int x) const {
    return static_cast<unsigned>(x - begin) < static_cast<unsigned>(end - begin);
  }
  FASTATTN_HD constexpr bool empty() const { return begin >= end; }
};

FASTATTN_HD constexpr std::uint32_t low_bits(int count) {
  return count >= 32 ? ~std::uint32_t{0} : (std::uint32_t{1} << max_of(count, 0)) - 1;
}

// The scores of a row that one lane of a tensor-core accumulator holds are slots 8 · j + first + e, with first = 0, 2,
// 4 or 6 and e = 0 or 1. A lane's word has bit 2 · j + e set for those that are kept; these are the bits of slots below
// `end`.
FASTATTN_HD constexpr std::uint32_t lane_bits_below(int end, int first) {
  constexpr std::uint32_t kEven = 0x55555555u;
  const int slots = end - first;
  return (low_bits(((slots + 7) >> 3) * 2) & kEven) | (low_bits(((slots + 6) >> 3) * 2) & ~kEven);
}

FASTATTN_HD constexpr std::uint32_t lane_bits(Interval kept, int first) {
  return lane_bits_below(kept.end, first) & ~lane_bits_below(kept.begin, first);
}

template <class S>
concept TileSchedule =
    std::is_trivially_copyable_v<S> && requires(const S schedule, TileShape shape, int q, int k, std::uint16_t cells) {
      { schedule.num_q } -> std::convertible_to<int>;
      { schedule.num_k } -> std::convertible_to<int>;
      { schedule.keeps(q, k) } -> std::same_as<bool>;  // false outside [0, num_q) × [0, num_k)
      { schedule.runs(q, shape) } -> RunCursor;        // key tiles of query tile q
      // keeps() inside one partial tile that runs() yields with these cells, tile_mask(q_tile, k_tile, shape, cells):
      // slots are counted from the tile's first, and what the scores of a tile or of a row have in common is found
      // once. On a GPU every thread asks for it between two products, so it reads no memory, but for a schedule whose
      // mask is data, such as the ids of segments: then only in tiles whose cells say so. Lane bits are of at most 128
      // keys.
      { schedule.tile_mask(q, k, shape, cells).row(q).keeps(k) } -> std::same_as<bool>;
      { schedule.tile_mask(q, k, shape, cells).row(q).lane_bits(k) } -> std::same_as<std::uint32_t>;
      { schedule.query_token(q) } -> std::same_as<int>;            // of a slot in [0, num_q) or after; −1: no token
      { schedule.query_token(q, k, shape) } -> std::same_as<int>;  // row k of query tile q: cheaper for many rows
      { schedule.key_token(k) } -> std::same_as<int>;
      // The tokens of a tile as something to copy: where its first one lies, and the shape of the whole.
      schedule.query_origin(q, shape), schedule.key_origin(k, shape);
      schedule.query_box(shape), schedule.key_box(shape);
    };

// One that has a backward: the same mask with queries and keys exchanged is a schedule too.
template <class S>
concept ReversibleSchedule = TileSchedule<S> && requires(const S schedule) {
  { schedule.transposed() } -> TileSchedule;
};

// The schedules of all heads, which share their slots: the numbers of them and the tokens in them.
template <class S>
concept ScheduleFamily =
    std::is_trivially_copyable_v<S> && requires(const S schedules, int batch, int head, TileShape tile) {
      { S::kInMemory } -> std::convertible_to<bool>;    // does at() read memory of the device?
      { schedules.suits(tile) } -> std::same_as<bool>;  // else a kernel with other tiles is preferred, if any
      { schedules.slots() } -> TileSchedule;            // of any head; reads no memory of the device
      { schedules.at(batch, head) } -> TileSchedule;
    };

// Most families have a schedule for each batch entry and head. Where a batch entry holds several sequences, `batch` in
// at(batch, head) is the sequence, and these functions have overloads; the executors ask them alone.

struct SequenceTile {
  int sequence, q_tile;
};

// How many heads the executor counts in a batch entry, where there are so many of queries.
template <class S>
FASTATTN_HD constexpr int num_heads(const S&, int heads) {
  return heads;
}

// Query tiles of a head in a batch entry of the tensors, those of all its sequences.
template <class S>
FASTATTN_HD constexpr int num_q_tiles(const S& schedules, TileShape tile) {
  return ceil_div(schedules.slots().num_q, tile.q);
}
// One of these. It may lie past the end of its sequence where schedules are in memory.
template <class S>
FASTATTN_HD constexpr SequenceTile sequence_tile(const S&, int batch, int q_tile, TileShape) {
  return {batch, q_tile};
}
// How many of these come before a sequence's in its batch entry.
template <class S>
FASTATTN_HD constexpr int first_q_tile(const S&, int, TileShape) {
  return 0;
}
// The batch entry of the tensors that holds a sequence.
template <class S>
FASTATTN_HD constexpr int batch_of(const S&, int sequence) {
  return sequence;
}

// The same of key tiles, for a backward whose tiles of keys stay: `tile.k` is theirs.

struct SequenceKeyTile {
  int sequence, k_tile;
};

template <class S>
FASTATTN_HD constexpr int num_k_tiles(const S& schedules, TileShape tile) {
  return ceil_div(schedules.slots().num_k, tile.k);
}
template <class S>
FASTATTN_HD constexpr SequenceKeyTile sequence_key_tile(const S&, int batch, int k_tile, TileShape) {
  return {batch, k_tile};
}
// What slots() tells, of one sequence.
template <class S>
FASTATTN_HD constexpr auto slots_of(const S& schedules, int) {
  return schedules.slots();
}

// Visits every tile of a run: body(k_tile, coverage, cells).
template <class Body>
FASTATTN_HD constexpr void for_each_tile(TileRun run, Body&& body) {
  const int end = run.first + run.count;
  if (run.coverage == Coverage::kFull) {
    for (int k_tile = run.first; k_tile < end; ++k_tile) {
      body(k_tile, CoverageTag<Coverage::kFull>{}, run.cells);
    }
  } else {
    for (int k_tile = run.first; k_tile < end; ++k_tile) {
      body(k_tile, CoverageTag<Coverage::kPartial>{}, run.cells);
    }
  }
}

// Visits every tile of query tile `q_tile`.
template <TileSchedule Schedule, class Body>
FASTATTN_HD constexpr void for_each_tile(const Schedule& schedule, int q_tile, TileShape shape, Body&& body) {
  auto cursor = schedule.runs(q_tile, shape);
  for (TileRun run{}; cursor.next(run);) {
    for_each_tile(run, body);
  }
}

// The law every schedule obeys: each kept score is visited exactly once, a full tile holds nothing but kept scores, and
// the mask of a partial tile is keeps(). Quadratic in the problem; for tests.
template <TileSchedule Schedule>
constexpr bool is_exact(const Schedule& schedule, TileShape shape) {
  for (int q_tile = 0; q_tile * shape.q < schedule.num_q; ++q_tile) {
    const int q_begin = q_tile * shape.q;
    const int q_end = q_begin + shape.q;
    int last_tile = -1;
    long visited = 0;
    bool honest = true;
    for_each_tile(schedule, q_tile, shape, [&](int k_tile, auto coverage, std::uint16_t cells) {
      honest = honest && k_tile > last_tile;  // ascending, hence no tile twice
      last_tile = k_tile;
      const auto mask = schedule.tile_mask(q_tile, k_tile, shape, cells);
      for (int q = 0; q < shape.q; ++q) {
        const auto row = mask.row(q);
        const std::uint32_t bits[4] = {row.lane_bits(0), row.lane_bits(2), row.lane_bits(4), row.lane_bits(6)};
        for (int k = 0; k < shape.k; ++k) {
          const bool kept = schedule.keeps(q_begin + q, k_tile * shape.k + k);
          visited += kept;
          const bool bit = k < 128 ? (bits[k % 8 / 2] >> (k / 8 * 2 + k % 2) & 1) != 0 : kept;
          honest = honest && (coverage() == Coverage::kFull ? kept : row.keeps(k) == kept && bit == kept);
        }
      }
    });
    long kept = 0;
    for (int q = q_begin; q < q_end; ++q) {
      for (int k = 0; k < schedule.num_k; ++k) {
        kept += schedule.keeps(q, k);
      }
    }
    if (!honest || visited != kept) {
      return false;
    }
  }
  return true;
}

}  // namespace fastattn

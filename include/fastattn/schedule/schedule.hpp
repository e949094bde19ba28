// A schedule says which key tiles a query tile visits, and which scores inside them survive.
//
// A mask is written once, as `keeps(q, k)`. Its tiles come as runs of consecutive key tiles with a coverage: full tiles
// need no mask, partial tiles ask `keeps` score by score, empty tiles are never produced. The TMA producer, the WGMMA
// consumer, the CPU kernel and the planner all iterate with `for_each_tile`; they differ only in the body they pass.
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

template <class S>
concept TileSchedule = std::is_trivially_copyable_v<S> && requires(const S schedule, TileShape shape, int q, int k) {
  { schedule.num_q } -> std::convertible_to<int>;
  { schedule.num_k } -> std::convertible_to<int>;
  { schedule.keeps(q, k) } -> std::same_as<bool>;  // false outside [0, num_q) × [0, num_k)
  { schedule.runs(q, shape) } -> RunCursor;        // key tiles of query tile q
  schedule.transposed();                           // the same mask with queries and keys exchanged, for the backward
};

// Visits every tile of a run: body(k_tile, coverage).
template <class Body>
FASTATTN_HD constexpr void for_each_tile(TileRun run, Body&& body) {
  const int end = run.first + run.count;
  if (run.coverage == Coverage::kFull) {
    for (int k_tile = run.first; k_tile < end; ++k_tile) {
      body(k_tile, CoverageTag<Coverage::kFull>{});
    }
  } else {
    for (int k_tile = run.first; k_tile < end; ++k_tile) {
      body(k_tile, CoverageTag<Coverage::kPartial>{});
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

// The law every schedule obeys: each kept score is visited exactly once, and a full tile holds nothing but kept scores.
// Quadratic in the problem; for tests.
template <TileSchedule Schedule>
constexpr bool is_exact(const Schedule& schedule, TileShape shape) {
  for (int q_tile = 0; q_tile * shape.q < schedule.num_q; ++q_tile) {
    const int q_begin = q_tile * shape.q;
    const int q_end = q_begin + shape.q;
    int last_tile = -1;
    long visited = 0;
    bool honest = true;
    for_each_tile(schedule, q_tile, shape, [&](int k_tile, auto coverage) {
      honest = honest && k_tile > last_tile;  // ascending, hence no tile twice
      last_tile = k_tile;
      for (int q = q_begin; q < q_end; ++q) {
        for (int k = k_tile * shape.k; k < (k_tile + 1) * shape.k; ++k) {
          const bool kept = schedule.keeps(q, k);
          visited += kept;
          honest = honest && (kept || coverage() == Coverage::kPartial);
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

// What a schedule costs, found by running it: the tiles that it visits, how many of them need a mask, and how much
// faster than visiting everything a kernel can get for it.
#pragma once

#include <concepts>

#include "fastattn/schedule/schedule.hpp"

namespace fastattn {

struct Census {
  TileShape shape;
  long query_tiles, key_tiles;
  long visited, full;  // tiles, summed over the query tiles
  long most_visited;   // by one query tile
  long kept;           // scores

  constexpr long partial() const { return visited - full; }
  constexpr double mean_visited() const { return ratio(visited, query_tiles, 0); }
  constexpr double full_share() const { return ratio(full, visited, 1); }
  constexpr double useful_share() const { return ratio(kept, visited * shape.q * shape.k, 1); }

  // Bounds on the speedup over visiting every tile. The first is what a balanced grid approaches; the second holds
  // where all query tiles run at once and the last one is waited for.
  constexpr double speedup_by_mean() const { return ratio(query_tiles * key_tiles, visited, kInfinity); }
  constexpr double speedup_by_max() const { return ratio(key_tiles, most_visited, kInfinity); }

 private:
  static constexpr double ratio(long x, long y, double if_none) {
    return y == 0 ? if_none : static_cast<double>(x) / static_cast<double>(y);
  }
};

template <class S>
concept CountsItsScores = requires(const S schedule) {
  { schedule.kept_scores() } -> std::same_as<long>;
};

// Runs `schedule` over all query tiles. Fast for a schedule that counts its own scores; the partial tiles of any other
// are counted score by score.
template <TileSchedule Schedule>
constexpr Census census_of(const Schedule& schedule, TileShape shape) {
  Census census{};
  census.shape = shape;
  census.query_tiles = ceil_div(schedule.num_q, shape.q);
  census.key_tiles = ceil_div(schedule.num_k, shape.k);
  for (int q_tile = 0; q_tile < census.query_tiles; ++q_tile) {
    long visited = 0;
    auto cursor = schedule.runs(q_tile, shape);
    for (TileRun run{}; cursor.next(run);) {
      visited += run.count;
      if (run.coverage == Coverage::kFull) {
        census.full += run.count;
      } else if constexpr (!CountsItsScores<Schedule>) {
        for (int q = q_tile * shape.q; q < (q_tile + 1) * shape.q; ++q) {
          for (int k = run.first * shape.k; k < (run.first + run.count) * shape.k; ++k) {
            census.kept += schedule.keeps(q, k);
          }
        }
      }
    }
    census.visited += visited;
    census.most_visited = max_of(census.most_visited, visited);
  }
  if constexpr (CountsItsScores<Schedule>) {
    census.kept = schedule.kept_scores();
  } else {
    census.kept += census.full * shape.q * shape.k;
  }
  return census;
}

}  // namespace fastattn

// The census is what counting one by one gives, for every schedule, and agrees with known cases.
#include "fastattn/plan/census.hpp"

#include <string>

#include "check.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/schedule/neighborhood.hpp"

using namespace fastattn;

namespace {

bool near(double x, double y) { return x > y - 0.005 && x < y + 0.005; }

template <TileSchedule Schedule>
void check_counts(const Schedule& schedule, TileShape shape, const std::string& what) {
  const Census census = census_of(schedule, shape);
  long visited = 0, full = 0, most = 0, kept = 0;
  for (int q_tile = 0; q_tile * shape.q < schedule.num_q; ++q_tile) {
    long tiles = 0;
    for_each_tile(schedule, q_tile, shape, [&](int, auto coverage, auto) {
      ++tiles;
      full += coverage() == Coverage::kFull;
    });
    visited += tiles;
    most = max_of(most, tiles);
  }
  for (int q = 0; q < schedule.num_q; ++q) {
    for (int k = 0; k < schedule.num_k; ++k) {
      kept += schedule.keeps(q, k);
    }
  }
  check(census.visited == visited && census.full == full && census.partial() == visited - full, "tiles: " + what);
  check(census.most_visited == most, "most visited: " + what);
  check(census.kept == kept, "scores: " + what);
}

const Test counts("census: counts tiles and scores as one by one", [] {
  for (const int right : {0, 5, 100}) {
    for (const int left : {0, 9, 100}) {
      check_counts(Band{37, 45, left, right}, {8, 4}, "band");
    }
  }
  for (const bool causal : {false, true}) {
    for (const int dilation : {1, 2}) {
      const Neighborhood schedule =
          make_neighborhood({{3}, {7, 3, 2, dilation}, {9, 4, 3, dilation, causal}}, {1, 2, 4}, {2, 2, 2});
      check_counts(schedule, schedule.tile_shape(), "neighborhood");
      check_counts(schedule.transposed(), schedule.transposed().tile_shape(), "neighborhood, transposed");
    }
  }
});

const Test known("census: dense, causal, empty and block-sparse", [] {
  const Census dense = census_of(Band{256, 512, 1000, 1000}, {64, 64});
  check(dense.visited == 32 && dense.full_share() == 1 && dense.useful_share() == 1, "dense");
  check(dense.speedup_by_mean() == 1 && dense.speedup_by_max() == 1 && dense.mean_visited() == 8, "dense");
  const Census causal = census_of(Band{256, 256, 1000, 0}, {64, 64});
  check(causal.visited == 10 && causal.partial() == 4 && causal.most_visited == 4, "causal");
  check(causal.speedup_by_mean() == 1.6 && causal.speedup_by_max() == 1, "causal");
  const Census empty = census_of(Band{0, 0, 1, 1}, {64, 64});
  check(empty.visited == 0 && empty.useful_share() == 1 && empty.speedup_by_mean() > 1e30, "empty");

  // HunyuanVideo at 720p: what the paper on generalized neighborhood attention and its block-sparse case say.
  const PerAxis<int> box{2, 8, 8};
  const Neighborhood strided = make_neighborhood({{30, 18, 2}, {48, 24, 8}, {80, 24, 8}}, box, box);
  const Census census = census_of(strided, strided.tile_shape());
  check(near(census.speedup_by_mean(), 11.11) && near(census.speedup_by_max(), 11.11), "block-sparse bounds");
  check(census.full_share() == 1 && census.useful_share() == 1, "block-sparse tiles");
  const Neighborhood unstrided = make_neighborhood({{30, 18}, {48, 24}, {80, 24}}, {4, 8, 8}, box);
  check(near(census_of(unstrided, unstrided.tile_shape()).speedup_by_max(), 3.27), "the paper's bound at stride 1");
});

}  // namespace

// What turns rely on: the key tiles that a query tile sees are consecutive, the last one is known, and the same ones
// see the query tile.
#pragma once

#include <string>
#include <vector>

#include "check.hpp"
#include "fastattn/schedule/schedule.hpp"

template <fastattn::ReversibleSchedule Schedule>
void check_turns(const Schedule& schedule, fastattn::TileShape tile, const std::string& what) {
  using namespace fastattn;
  std::vector<std::vector<int>> from_keys(static_cast<std::size_t>(ceil_div(schedule.num_q, tile.q)));
  for (int k_tile = 0; k_tile * tile.k < schedule.num_k; ++k_tile) {
    for_each_tile(schedule.transposed(), k_tile, {tile.k, tile.q},
                  [&](int q_tile, auto, auto) { from_keys.at(static_cast<std::size_t>(q_tile)).push_back(k_tile); });
  }
  int q_tile = 0;
  for (const std::vector<int>& seen_from_keys : from_keys) {
    std::vector<int> seen;
    for_each_tile(schedule, q_tile, tile, [&](int k_tile, auto, auto) { seen.push_back(k_tile); });
    check(seen == seen_from_keys, what + ": the same from both sides");
    if (!seen.empty()) {
      check(schedule.last_k_tile(q_tile, tile) == seen.back(), what + ": the last");
      check(seen.back() - seen.front() + 1 == static_cast<int>(seen.size()), what + ": consecutive");
    }
    ++q_tile;
  }
}

// What a kernel is compiled for. A configuration changes speed, never results.
#pragma once

#include "fastattn/schedule/schedule.hpp"

namespace fastattn::sm90 {

struct Config {
  int head_dim;  // of the tiles in shared memory; a tensor's own may be smaller
  TileShape tile;
  int stages;
  int warpgroups;  // consumers; one more warpgroup produces

  // 65,536 registers a block: with two consumer warpgroups 24 + 2 · 240, with three 32 + 3 · 160, times 128 threads.
  constexpr int producer_registers() const { return warpgroups == 3 ? 32 : 24; }
  constexpr int consumer_registers() const { return warpgroups == 3 ? 160 : 240; }
};

}  // namespace fastattn::sm90

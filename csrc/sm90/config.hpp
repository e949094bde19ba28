// What a kernel is compiled for. A configuration changes speed, never results.
#pragma once

#include "fastattn/schedule/schedule.hpp"

namespace fastattn::sm90 {

struct Config {
  int head_dim;              // of the tiles in shared memory; a tensor's own may be smaller
  int value_dim = head_dim;  // the same of values and of a forward's output
  TileShape tile;
  int stages;
  int warpgroups;           // consumers; one more warpgroup produces
  int query_stages = 2;     // of a forward: one in use, one on its way
  bool tile_behind = true;  // of all gradients at once: dQ is that of the tile before, if there are registers for it

  // What a block is launched with is shared out anew: 168 registers for each thread of three warpgroups become 24 and
  // 2 · 240, 128 of four 32 and 3 · 160, 96 of five 24 and 4 · 112. Asking for more than there are waits forever.
  // With a single consumer all threads have as many as there can be.
  constexpr bool shares_registers() const { return warpgroups > 1; }
  constexpr int launched_registers() const { return 65536 / ((warpgroups + 1) * 128) / 8 * 8; }
  constexpr int producer_registers() const { return warpgroups == 3 ? 32 : 24; }
  constexpr int consumer_registers() const {
    return (launched_registers() * (warpgroups + 1) - producer_registers()) / warpgroups / 8 * 8;
  }
};

}  // namespace fastattn::sm90

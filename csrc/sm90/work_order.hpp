// In which order a launch's tiles are taken. Plain C++, for the host, the device and a test.
#pragma once

#include <cstdint>

#include "fastattn/portable.hpp"

namespace fastattn::sm90 {

// A head's longest tile goes first (under a causal mask the last query tile has the most keys, and the first key tile
// the most queries), and the short ones then fill the gaps at the end. Heads come one after the other, so that blocks
// read the same rows at the same time; but the last heads are taken together, all their longest tiles first, for there
// is nothing after them to fill gaps with.
//
// Where a tile waits for the one before it in a head, those of one rank are taken together for some heads: as many as
// are under way anyway, so that the next ones come when it is their turn (`at_in_turns`).
//
// A work is a tile, or, of the last ones, a share of it: where tiles are as long as one another, the last would leave
// multiprocessors idle.
struct WorkOrder {
  int heads;  // of all batch entries
  int tiles;  // of a head
  int last_heads;
  int heads_in_turns = 1;
  int shared = 0, parts = 1;  // so many of the last tiles are so many works each

  struct Place {
    int head, rank;  // rank 0 is the longest tile
  };

  struct Share {
    int index, part, parts;  // of which tile
  };

  FASTATTN_HD constexpr int count() const { return heads * tiles; }
  FASTATTN_HD constexpr int first_shared() const { return count() - shared; }
  FASTATTN_HD constexpr int works() const { return first_shared() + shared * parts; }
  FASTATTN_HD constexpr Share share_of(int work) const {
    const int within = work - first_shared();
    return within < 0 ? Share{work, 0, 1} : Share{first_shared() + within / parts, within % parts, parts};
  }
  FASTATTN_HD constexpr Place at(int index) const {
    const int first_of_last = heads - last_heads, within = index - first_of_last * tiles;
    return within < 0 ? Place{index / tiles, index % tiles}
                      : Place{first_of_last + within % last_heads, within / last_heads};
  }
  FASTATTN_HD constexpr Place at_in_turns(int index) const {
    const int first = index / (tiles * heads_in_turns) * heads_in_turns, within = index - first * tiles;
    const int together = min_of(heads_in_turns, heads - first);
    return {first + within % together, within / together};
  }
};

// `blocks` take the works of all heads, of which `sharing` at a time stream the same `bytes`. Two works a block are
// enough to end with, and together what the heads stream should stay in the L2 cache: of 50 MB, in two halves. All
// heads within 32 MB at a time, instead of the last ones, were up to 9 % slower; this cap was not measured by itself.
constexpr WorkOrder work_order(std::int64_t heads, int tiles, std::int64_t blocks, std::int64_t bytes, int sharing) {
  constexpr std::int64_t kCachedBytes = 24 << 20, kWorksOfBlock = 2;
  const std::int64_t cached = kCachedBytes / max_of<std::int64_t>(bytes, 1) * sharing;
  const std::int64_t wanted = ceil_div<std::int64_t>(kWorksOfBlock * blocks, max_of(tiles, 1));
  const std::int64_t last = max_of<std::int64_t>(min_of(min_of(wanted, cached), heads), min_of<std::int64_t>(heads, 1));
  return {static_cast<int>(heads), tiles, static_cast<int>(last)};
}

// Shares the last tiles of an order if they then end sooner: those that are left when every one of `blocks` blocks has
// taken as many as the others. A tile has `steps`; a work's beginning and end are taken to need the time of
// `kStepsOfWork` more, and adding up what the parts compute that of `kStepsOfSums`: of the counts that were measured,
// with blocks that did not stay, they choose the best, or one beside it (attention.md).
constexpr WorkOrder share_last(WorkOrder order, int blocks, int steps) {
  constexpr int kMostParts = 8, kStepsOfWork = 4, kStepsOfSums = 3;
  const int shared = order.count() % max_of(blocks, 1);
  int fewest = steps + kStepsOfWork;
  for (int parts = 2; parts <= kMostParts; ++parts) {
    const int rounds = ceil_div(shared * parts, blocks);
    const int taken = rounds * (ceil_div(steps, parts) + kStepsOfWork) + kStepsOfSums;
    if (shared > 0 && taken < fewest) {
      fewest = taken;
      order.shared = shared;
      order.parts = parts;
    }
  }
  return order;
}

// For works in turns.
constexpr WorkOrder order_in_turns(std::int64_t heads, int tiles, std::int64_t blocks) {
  return {static_cast<int>(heads), tiles, 0, static_cast<int>(ceil_div<std::int64_t>(blocks, max_of(tiles, 1)))};
}

}  // namespace fastattn::sm90

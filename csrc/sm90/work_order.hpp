// In which order a launch's query tiles are taken. Plain C++, for the host, the device and a test.
#pragma once

#include <cstdint>

#include "fastattn/portable.hpp"

namespace fastattn::sm90 {

// The last tile of a head goes first: under a causal mask it has the most keys, and the short ones then fill the gaps
// at the end. Heads come one after the other, so that blocks read the same keys at the same time; but the last heads
// are taken together, all their longest tiles first, for there is nothing after them to fill gaps with.
struct WorkOrder {
  int heads;  // of all batch entries
  int q_tiles;
  int last_heads;

  struct Place {
    int head, q_tile;
  };

  FASTATTN_HD constexpr int count() const { return heads * q_tiles; }
  FASTATTN_HD constexpr Place at(int index) const {
    const int first_of_last = heads - last_heads, within = index - first_of_last * q_tiles;
    return within < 0 ? Place{index / q_tiles, q_tiles - 1 - index % q_tiles}
                      : Place{first_of_last + within % last_heads, q_tiles - 1 - within / last_heads};
  }
};

// `blocks` take the works of all heads, of which a key head has so many and reads so many bytes. Two works a block are
// enough to end with, and together the heads' keys and values should stay in the L2 cache: of 50 MB, in two halves. All
// heads within 32 MB at a time, instead of the last ones, were up to 9 % slower; this cap was not measured by itself.
constexpr WorkOrder work_order(std::int64_t heads, int q_tiles, std::int64_t blocks, std::int64_t bytes_of_kv_head,
                               int heads_per_kv_head) {
  constexpr std::int64_t kCachedBytes = 24 << 20, kWorksOfBlock = 2;
  const std::int64_t cached = kCachedBytes / max_of<std::int64_t>(bytes_of_kv_head, 1) * heads_per_kv_head;
  const std::int64_t wanted = ceil_div<std::int64_t>(kWorksOfBlock * blocks, max_of(q_tiles, 1));
  const std::int64_t last = max_of<std::int64_t>(min_of(min_of(wanted, cached), heads), min_of<std::int64_t>(heads, 1));
  return {static_cast<int>(heads), q_tiles, static_cast<int>(last)};
}

}  // namespace fastattn::sm90

// Which dK and dV are sums in memory, because several works add to them. Plain C++, for the host, the device and
// a test.
#pragma once

#include <cstdint>

#include "fastattn/portable.hpp"
#include "fastattn/tensor_view.hpp"
#include "sm90/work_order.hpp"

namespace fastattn::sm90 {

// The key tiles whose dK and dV are sums: all, with a work for each query head of a group, or those that are shared.
struct KeySums {
  float* data = nullptr;  // of dK, then of dV: [2, tiles, pieces, 8, 128, 4]; null: none
  int tiles = 0;
  int works_of_group = 1;  // one for each of its query heads

  // Which of these tiles is a work's? −1: none.
  FASTATTN_HD constexpr int tile_of(const WorkOrder& order, int work) const {
    if (works_of_group > 1) {
      const WorkOrder::Place place = order.at(work);
      return place.head / works_of_group * order.tiles + place.rank;
    }
    return max_of(order.share_of(work).index - order.first_shared(), -1);
  }
  // The place of such a tile, by its key head of all batch entries.
  FASTATTN_HD constexpr WorkOrder::Place place_of(const WorkOrder& order, int tile) const {
    return works_of_group > 1 ? WorkOrder::Place{tile / order.tiles, tile % order.tiles}
                              : order.at(order.first_shared() + tile);
  }
};

// Is a work to be one query head's part in a key tile, not that of all heads of a group, and to add its dK and dV to
// sums in memory? That pays where there are too few key tiles for the multiprocessors, and where a group's rows do not
// stay in the L2 cache: under a causal mask its works come to a head at different times (attention.md).
// `tiles` of a key head have rows of `head_dim` elements.
constexpr bool divides_groups(const TensorView& q, const TensorView& k, std::int64_t tiles, int head_dim,
                              int multiprocessors) {
  constexpr std::int64_t kCachedBytes = 48 << 20;
  if (q.heads() <= k.heads()) {
    return false;
  }
  const std::int64_t all_tiles = k.batch() * k.heads() * tiles;
  const std::int64_t group_bytes =
      q.heads() / k.heads() * q.seq() * head_dim * (2 * sizeof(std::int16_t) + sizeof(float));  // Q, dO, dQ in fp32
  return 2 * all_tiles < 3 * multiprocessors || group_bytes > kCachedBytes;
}

// dQ leaves its place free until the end, and the sums lie there. Has it room for those of `tiles` tiles?
constexpr bool has_room_for_keys(const TensorView& dq, std::int64_t tiles, int tile_keys, int head_dim) {
  const std::int64_t bytes = 2 * tiles * tile_keys * head_dim * sizeof(float);
  return dq.is_contiguous() && bytes <= dq.size() * size_of(dq.dtype);
}

}  // namespace fastattn::sm90

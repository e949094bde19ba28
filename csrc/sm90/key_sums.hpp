// Whether dK and dV of grouped heads are sums in memory. Plain C++, for the host and a test.
#pragma once

#include <cstdint>

#include "fastattn/portable.hpp"
#include "fastattn/tensor_view.hpp"

namespace fastattn::sm90 {

// Is a thread block to take one query head's part in a key tile, not that of all heads of a group, and to add its dK
// and dV to sums in memory? That pays where there are too few key tiles for the multiprocessors, and where a group's
// rows do not stay in the L2 cache: under a causal mask its blocks come to a head at different times (attention.md).
// dQ leaves its place free until the end, and the sums lie there if they have room. `tiles` of a key head have
// `tile_keys` keys each and rows of `head_dim` elements.
constexpr bool sums_keys_in_memory(const TensorView& q, const TensorView& k, const TensorView& dq, std::int64_t tiles,
                                   int tile_keys, int head_dim, int multiprocessors) {
  constexpr std::int64_t kCachedBytes = 48 << 20;
  if (q.heads() <= k.heads()) {
    return false;
  }
  const std::int64_t all_tiles = k.batch() * k.heads() * tiles;
  const std::int64_t group_bytes =
      q.heads() / k.heads() * q.seq() * head_dim * (2 * sizeof(std::int16_t) + sizeof(float));  // Q, dO, dQ in fp32
  const std::int64_t sums_bytes = 2 * all_tiles * tile_keys * head_dim * sizeof(float);
  return (2 * all_tiles < 3 * multiprocessors || group_bytes > kCachedBytes) && dq.is_contiguous() &&
         sums_bytes <= dq.size() * size_of(dq.dtype);
}

}  // namespace fastattn::sm90

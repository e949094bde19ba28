// Which attentions have their keys parted among thread blocks, and into how many parts. Plain C++, for the host and a
// test.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/split.hpp"
#include "ops/validate.hpp"

namespace fastattn::sm90 {

inline constexpr int kSplitRows = 64;  // of the smaller tile
inline constexpr int kMaxParts = 128;
inline constexpr int kSplitPartKeys = 128;  // a part is a multiple of this, as tiles have 128 or 64 keys

// The parts of a valid problem, if there should be some: where a tile of one head's queries is nearly empty, or where
// there are too few tiles for the multiprocessors.
inline std::optional<SplitBands> split_bands(const Attention& p, int multiprocessors) {
  constexpr std::int64_t kFewQueries = 16, kManyKeys = 1024, kMaxShift = 6;
  constexpr int kLeastTiles = 4;  // of a part
  constexpr double kStart = 2.;   // tiles that a part's beginning and end take as long as
  const Band band = band_of(p);
  if (num_rows(p) == 0 || multiprocessors < 1 || p.modifier().exists() || p.has_regions() || p.head_left != nullptr ||
      p.head_right != nullptr) {
    return {};
  }
  const int first = max_of(band.num_k - band.num_q - band.left, 0) / kSplitPartKeys * kSplitPartKeys;
  const int k_tiles = ceil_div(band.num_k - first, kSplitPartKeys);
  if (band.num_k - first < kManyKeys) {
    return {};
  }
  const int kv_heads = static_cast<int>(p.k.heads()), group = static_cast<int>(p.q.heads()) / kv_heads;
  const int shift = static_cast<int>(min_of<std::int64_t>(std::bit_width(static_cast<unsigned>(group - 1)), kMaxShift));
  const int boxes = ceil_div(group, 1 << shift);
  const std::int64_t slots = std::int64_t{band.num_q} << shift;
  const std::int64_t q_tiles = ceil_div<std::int64_t>(slots, slots <= kSplitRows ? kSplitRows : 2 * kSplitRows);
  const std::int64_t works = p.q.batch() * kv_heads * boxes * q_tiles;
  const std::int64_t works_of_heads = p.q.batch() * p.q.heads() * ceil_div(band.num_q, 2 * kSplitRows);
  if (band.num_q > kFewQueries && 2 * works_of_heads > multiprocessors) {
    return {};
  }
  int best = 1;
  double least = kInfinity;
  for (int count = 1; count <= min_of(kMaxParts, max_of(k_tiles / kLeastTiles, 1)); ++count) {
    const double rounds = static_cast<double>(ceil_div<std::int64_t>(works * count, multiprocessors));
    const double time = rounds * (ceil_div(k_tiles, count) + kStart);
    if (time < least) {
      best = count;
      least = time;
    }
  }
  const int part_tiles = ceil_div(k_tiles, best);
  return SplitBands{
      band, kv_heads, group, boxes, shift, ceil_div(k_tiles, part_tiles), first, part_tiles * kSplitPartKeys};
}

}  // namespace fastattn::sm90

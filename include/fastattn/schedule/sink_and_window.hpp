// The blocks that attention seldom does without: the first ones of the keys, and those nearest to the queries.
#pragma once

#include "fastattn/schedule/schedule.hpp"

namespace fastattn {

// Of one row of blocks.
struct SinkAndWindow {
  int sink;         // blocks [0, sink)
  Interval window;  // and these, which may reach past the keys on either side

  FASTATTN_HD constexpr bool contains(int block) const { return block < sink || window.contains(block); }
};

// A row's own key blocks hold the positions of its queries, bottom-right aligned. A window of 1 is these, one of 2 has
// a block more on either side.
FASTATTN_HD constexpr SinkAndWindow sink_and_window(int row, int num_q, int num_k, TileShape block, std::int64_t sink,
                                                    std::int64_t window) {
  constexpr std::int64_t kAll = 1 << 25;  // more blocks than there are of 2^30 tokens, on either side
  const auto block_of = [block](int key) { return key >= 0 ? key / block.k : -ceil_div(-key, block.k); };
  const int first = row * block.q, last = min_of(first + block.q, num_q) - 1, diagonal = num_k - num_q;
  const int width = static_cast<int>(min_of(window, kAll));
  const Interval nearest{block_of(first + diagonal) - width + 1, block_of(last + diagonal) + width};
  return {static_cast<int>(min_of(sink, kAll)), width > 0 ? nearest : Interval{0, 0}};
}

static_assert(sink_and_window(1, 256, 256, {64, 64}, 1, 2).contains(2));
static_assert(!sink_and_window(3, 256, 256, {64, 64}, 1, 2).contains(1));
static_assert(sink_and_window(0, 256, 100, {128, 64}, 0, 1).window.begin == -3);

}  // namespace fastattn

// The order of tiles: all of them, once, the longest first where it matters.
#include "sm90/work_order.hpp"

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"

using namespace fastattn;
using namespace fastattn::sm90;

namespace {

const Test each_once("work order: each tile of each head once", [] {
  for (const int heads : {1, 2, 3, 7, 64, 512}) {
    for (const int tiles : {1, 2, 5, 86}) {
      for (const std::int64_t bytes :
           {std::int64_t{0}, std::int64_t{1} << 10, std::int64_t{5} << 20, std::int64_t{1} << 40}) {
        const WorkOrder order = work_order(heads, tiles, 132, bytes, 4);
        const std::string what = std::to_string(heads) + " heads of " + std::to_string(tiles) + " tiles, " +
                                 std::to_string(order.last_heads) + " at the end";
        check(1 <= order.last_heads && order.last_heads <= heads && order.count() == heads * tiles, what);
        std::set<std::pair<int, int>> seen;
        for (int i = 0; i < order.count(); ++i) {
          const auto [head, rank] = order.at(i);
          check(0 <= head && head < heads && 0 <= rank && rank < tiles, what);
          seen.emplace(head, rank);
        }
        check(static_cast<int>(seen.size()) == order.count(), what);
      }
    }
  }
});

const Test longest_first("work order: the longest tile of a head first, and of the last heads before all their others",
                         [] {
                           const WorkOrder order = work_order(64, 32, 132, 2 << 20, 1);
                           check(order.last_heads == 9, "two works for each of 132 blocks");
                           for (int i = 1; i < order.count(); ++i) {
                             const auto [head, rank] = order.at(i);
                             const auto [head_before, rank_before] = order.at(i - 1);
                             check(head < 64 - 9 ? head >= head_before : rank >= rank_before || head_before < 64 - 9,
                                   "at work " + std::to_string(i));
                           }
                           check(order.at(0).rank == 0 && order.at(0).head == 0 && order.at(32).head == 1,
                                 "one head after the other");
                         });

const Test cached("work order: no more heads at the end than the cache has room for", [] {
  check(work_order(64, 32, 132, 8 << 20, 1).last_heads == 3, "three of 8 MB");
  check(work_order(64, 32, 132, 8 << 20, 2).last_heads == 6, "which two heads share");
  check(work_order(16, 256, 132, 17 << 20, 1).last_heads == 1, "one of 17 MB");
  check(work_order(16, 256, 132, 100 << 20, 1).last_heads == 1, "one that has no room");
  check(work_order(0, 4, 0, 1, 1).last_heads == 0 && work_order(4, 0, 0, 1, 1).count() == 0, "none");
});

const Test shares("work order: the last tiles are shared where they then end sooner, each part once", [] {
  for (const int heads : {1, 16, 33, 64}) {
    for (const int steps : {1, 5, 64, 256}) {
      const WorkOrder whole = work_order(heads, 128, 132, 8 << 20, 1), order = share_last(whole, 132, steps);
      const std::string what = std::to_string(heads) + " heads of 128 tiles of " + std::to_string(steps) + " steps";
      check(order.shared == 0 || order.shared == whole.count() % 132, what);
      check(order.works() == whole.count() + order.shared * (order.parts - 1), what);
      std::set<std::pair<int, int>> seen;
      for (int work = 0; work < order.works(); ++work) {
        const auto [tile, part, parts] = order.share_of(work);
        check(0 <= tile && tile < order.count() && 0 <= part && part < parts, what);
        check(parts == (tile < order.first_shared() ? 1 : order.parts), what);
        seen.emplace(tile, part);
      }
      check(static_cast<int>(seen.size()) == order.works(), what);
    }
  }
  const auto parts = [](int works, int steps) {
    return share_last(work_order(1, works, 132, 8 << 20, 1), 132, steps).parts;
  };
  check(parts(15 * 132 + 68, 256) == 7, "68 works of 256 steps: in four rounds of a seventh, not in one");
  check(parts(132 + 3, 5) == 5 && parts(132 + 3, 9) > 1, "three of 520 keys: small cases of the bench");
  check(parts(15 * 132 + 68, 5) == 1, "works too short to be divided");
  check(parts(16 * 132, 256) == 1 && parts(16 * 132 - 1, 256) == 1, "none left over, or one missing");
  check(parts(0, 256) == 1, "no works");
});

const Test in_turns("work order: in turns each tile once, and after all that it waits for", [] {
  for (const int heads : {1, 2, 7, 64, 131}) {
    for (const int tiles : {1, 4, 32, 133}) {
      const WorkOrder order = order_in_turns(heads, tiles, 132);
      const std::string what = std::to_string(heads) + " heads of " + std::to_string(tiles) + " tiles";
      std::vector<int> next_rank(heads, 0), last_index(heads, -1);
      for (int i = 0; i < order.count(); ++i) {
        const auto [head, rank] = order.at_in_turns(i);
        check(0 <= head && head < heads && rank == next_rank[head]++, what + ": a head's tiles in their order");
        const int apart = min_of(ceil_div(132, tiles), heads - head / ceil_div(132, tiles) * ceil_div(132, tiles));
        check(rank == 0 || i - last_index[head] == apart, what + ": other heads' tiles between two of one head");
        last_index[head] = i;
      }
      check(std::ranges::all_of(next_rank, [&](int rank) { return rank == tiles; }), what + ": all");
    }
  }
});

}  // namespace

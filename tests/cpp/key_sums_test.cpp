// Which gradients of keys are sums in memory: where that pays, and only where they have room.
#include "sm90/key_sums.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include "check.hpp"

using namespace fastattn;
using namespace fastattn::sm90;

namespace {

constexpr TensorView view(std::int64_t batch, std::int64_t seq, std::int64_t heads, std::int64_t head_dim) {
  return {.shape = {batch, seq, heads, head_dim},
          .stride = {seq * heads * head_dim, heads * head_dim, head_dim, 1},
          .dtype = DType::kBFloat16};
}

// Of `seq` queries and keys, on a chip of 132 multiprocessors, with tiles of 128 keys.
constexpr bool divides(std::int64_t batch, std::int64_t seq, std::int64_t heads, std::int64_t kv_heads, int head_dim) {
  return divides_groups(view(batch, seq, heads, head_dim), view(batch, seq, kv_heads, head_dim), (seq + 127) / 128,
                        head_dim, 132);
}

const Test pays("sums of keys: groups are divided with few key tiles, or rows that the cache does not hold", [] {
  check(divides(1, 2048, 64, 8, 128), "64 heads on 8, 128 tiles");
  check(divides(1, 1024, 32, 8, 128), "32 heads on 8, 64 tiles");
  check(!divides(2, 2048, 32, 8, 128), "32 heads on 8, 256 tiles of rows that the cache holds");
  check(divides(2, 8192, 64, 8, 128) && divides(2, 8192, 32, 4, 128), "groups of 64 MiB");
  check(!divides(2, 8192, 32, 8, 128), "of 32 MiB");
  check(!divides(1, 1024, 8, 8, 128) && !divides(1, 1024, 0, 2, 128), "heads of their own, and none");
});

const Test room("sums of keys: as many as dQ has room for", [] {
  const TensorView dq = view(1, 1024, 32, 128);  // 256 tiles of 128 queries
  check(has_room_for_keys(dq, 64, 128, 128) && !has_room_for_keys(dq, 65, 128, 128), "a quarter of its tiles");
  TensorView strided = dq;
  strided.stride[1] *= 2;
  check(!has_room_for_keys(strided, 1, 128, 128), "with something between its rows");
  check(!has_room_for_keys(view(1, 1024, 32, 40), 64, 128, 64), "narrower rows than the tiles'");
});

const Test places("sums of keys: works that add to one tile belong to it, and all of a tile's do", [] {
  const auto check_works = [](const WorkOrder& order, const KeySums& sums, int works_of_tile, const char* what) {
    std::vector<int> seen(sums.tiles, 0);
    for (int work = 0; work < order.works(); ++work) {
      const int tile = sums.tile_of(order, work);
      if (tile < 0) {
        continue;
      }
      const auto own = order.at(order.share_of(work).index), place = sums.place_of(order, tile);
      check(own.head / sums.works_of_group == place.head && own.rank == place.rank, what);
      ++seen[tile];
    }
    for (const int works : seen) {
      check(works == works_of_tile, what);
    }
  };
  const WorkOrder of_heads = work_order(32, 8, 132, 1 << 20, 1);
  check_works(of_heads, {nullptr, 4 * 8, 8}, 8, "a work for each of eight heads of a group");
  const WorkOrder shared = share_last(work_order(16, 128, 132, 8 << 20, 1), 132, 256);
  check(shared.shared == 68, "15 tiles a block, and 68");
  check_works(shared, {nullptr, shared.shared}, shared.parts, "shared tiles");
});

}  // namespace

// The laws of SplitBands: exact tiles in each part, and parts that together are the band. Which problems have parts.
#include "fastattn/schedule/split.hpp"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "check.hpp"
#include "sm90/split_plan.hpp"

using namespace fastattn;

namespace {

const Test parts_are_exact("split: each part is exact, and together they keep what the band keeps", [] {
  for (const TileShape tile : {TileShape{8, 4}, {16, 4}, {16, 8}}) {
    for (const int shift : {0, 1, 3}) {
      for (const int num_q : {1, 2, 3, 5, 9}) {
        for (const int num_k : {1, 7, 8, 31, 64, 70}) {
          for (const auto& [left, right] : {std::pair{100, 100}, {100, 0}, {20, 0}, {0, 3}, {5, 9}}) {
            const Band band{num_q, num_k, left, right};
            for (const int part_keys : {8, 16, 24, 72}) {
              const int count = ceil_div(num_k, part_keys), group = 1 << shift;
              const SplitBands parts{band, 2, group, 1, shift, count, 0, part_keys};
              const std::string name = std::to_string(num_q) + " x " + std::to_string(num_k);
              for (int part = 0; part < count; ++part) {
                check(is_exact(parts.at(0, count + part), tile), name);
                check(parts.at(0, count + part).first_head == group, "the second key head's first query head");
              }
              for (int slot = 0; slot < num_q << shift; ++slot) {
                for (int k = 0; k < num_k; ++k) {
                  int kept = 0;
                  for (int part = 0; part < count; ++part) {
                    kept += parts.at(0, part).keeps(slot, k);
                  }
                  check(kept == band.keeps(slot >> shift, k), name);
                }
              }
            }
          }
        }
      }
    }
  }
});

const Test heads_fill_boxes("split: the heads of a group fill boxes, the last one less than full", [] {
  const SplitBands parts{{3, 4096, 4096, 4096}, 2, 96, 2, 6, 4, 0, 1024};
  check(parts.heads() == 2 * 2 * 4, "heads of the kernel");
  const int first_heads[] = {0, 64, 96, 160};
  for (int box = 0; box < 4; ++box) {
    check(parts.at(0, 4 * box + 3).first_head == first_heads[box], "first head");
    check(parts.at(0, 4 * box + 3).keys.begin == 3072, "keys of the last part");
  }
});

std::optional<SplitBands> parts_of(std::int64_t batch, std::int64_t seq_q, std::int64_t seq_k, std::int64_t heads,
                                   std::int64_t kv_heads, Window window = {}) {
  Attention problem;
  problem.q.shape[0] = problem.k.shape[0] = batch;
  problem.q.shape[1] = seq_q;
  problem.k.shape[1] = seq_k;
  problem.q.shape[2] = heads;
  problem.k.shape[2] = kv_heads;
  problem.window = window;
  return sm90::split_bands(problem, 132);
}

const Test which_have_parts("split: few queries over many keys are parted, others are not", [] {
  check(!parts_of(1, 4096, 4096, 16, 16) && !parts_of(32, 512, 512, 16, 16), "tiles for all multiprocessors");
  check(!parts_of(1, 1, 1023, 64, 8), "few keys");
  check(!parts_of(1, 1, 65536, 64, 8, {500, 0}), "few keys in the window");
  check(!parts_of(4, 128, 65536, 32, 8) && parts_of(1, 512, 65536, 8, 2), "too few tiles, or not");
  check(parts_of(1, 1, 8192, 64, 8)->count == 16, "one query: 8 key heads in 16 parts for 132 multiprocessors");
  check(parts_of(64, 1, 8192, 64, 8)->count == 1, "as many key heads as there can be at a time");
  Attention capped;
  capped.q.shape[0] = capped.k.shape[0] = capped.q.shape[1] = capped.q.shape[2] = capped.k.shape[2] = 1;
  capped.k.shape[1] = 8192;
  check(sm90::split_bands(capped, 132).has_value() && !sm90::split_bands(capped, 0), "without multiprocessors");
  capped.softcap = 50.f;
  check(!sm90::split_bands(capped, 132), "a softcap");
});

const Test parts_hold_all_keys("split: the parts hold all keys that are seen, and none is empty", [] {
  for (const std::int64_t seq_k : {1024, 1025, 5000, 8191, 131072}) {
    for (const std::int64_t kv_heads : {1, 2, 8}) {
      for (const Window window : {Window{}, Window{1500, 0}, Window{3000, 7}}) {
        const auto parts = parts_of(1, 3, seq_k, 16, kv_heads, window);
        check(parts.has_value(), "parted");
        const int end = parts->first_key + parts->count * parts->part_keys;
        check(parts->count <= sm90::kMaxParts && parts->part_keys % sm90::kSplitPartKeys == 0, "whole tiles");
        check(end >= seq_k && end - parts->part_keys < seq_k, "up to the last key");
        const std::int64_t first_seen = window.left == kUnbounded ? 0 : seq_k - 3 - window.left;
        check(parts->first_key <= std::max<std::int64_t>(first_seen, 0), "from the first one on");
      }
    }
  }
});

}  // namespace

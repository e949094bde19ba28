// The laws of SplitBands: exact tiles in each part, and parts that together are the band.
#include "fastattn/schedule/split.hpp"

#include <string>
#include <utility>

#include "check.hpp"

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

}  // namespace

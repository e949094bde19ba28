// The laws of Band: exact tiles, the right mask, and a transpose that is one.
#include "fastattn/schedule/band.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "check.hpp"
#include "turns.hpp"

using namespace fastattn;

namespace {

std::string describe(const Band& band, TileShape tile = {0, 0}) {
  return "Band{" + std::to_string(band.num_q) + ", " + std::to_string(band.num_k) + ", " + std::to_string(band.left) +
         ", " + std::to_string(band.right) + "} in tiles " + std::to_string(tile.q) + " x " + std::to_string(tile.k);
}

// Windows from empty to unbounded, none of them a multiple of a tile.
std::vector<std::pair<int, int>> windows(int num_q, int num_k) {
  const int unbounded = num_q + num_k;
  return {{unbounded, unbounded}, {unbounded, 0}, {0, unbounded}, {0, 0}, {1, 2}, {7, 0}, {130, 61}, {0, 129}};
}

const Test every_kept_score_once("band: each kept score is in one tile, and full tiles are full", [] {
  const auto sweep = [](TileShape tile, const std::vector<int>& lengths) {
    for (const int num_q : lengths) {
      for (const int num_k : lengths) {
        for (const auto& [left, right] : windows(num_q, num_k)) {
          const Band band{num_q, num_k, left, right};
          check(is_exact(band, tile), describe(band, tile));
          check(is_exact(band.transposed(), tile), "transposed " + describe(band, tile));
        }
      }
    }
  };
  for (const TileShape tile : {TileShape{1, 1}, {2, 3}, {4, 8}, {8, 4}, {5, 5}, {16, 2}, {2, 16}}) {
    sweep(tile, {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33});
  }
  // The tiles of the kernels: lengths one off their edges.
  for (const TileShape tile :
       {TileShape{128, 128}, {192, 128}, {128, 192}, {64, 128}, {128, 64}, {96, 128}, {96, 64}}) {
    sweep(tile, {0, 1, tile.q - 1, tile.q, tile.q + 1, tile.k - 1, tile.k + 1, 2 * tile.q + 1});
  }
});

const Test keeps_the_formula("band: keeps() is the formula, transposed() exchanges its sides", [] {
  for (const int num_q : {0, 1, 2, 5, 9}) {
    for (const int num_k : {0, 1, 2, 5, 9}) {
      for (int left = 0; left <= 10; ++left) {
        for (int right = 0; right <= 10; ++right) {
          const Band band{num_q, num_k, left, right};
          const Band transposed = band.transposed();
          for (int q = 0; q < num_q; ++q) {
            std::vector<int> kept;  // what a sliding window of left + 1 + right keys around the query's own place holds
            const int own = num_k - (num_q - q);
            for (int k = std::max(own - left, 0); k < std::min(own + right + 1, num_k); ++k) {
              kept.push_back(k);
            }
            check(band.is_blind(q) == kept.empty(), describe(band) + " at " + std::to_string(q));
            for (int k = -1; k < num_k + 2; ++k) {
              const bool expected = std::find(kept.begin(), kept.end(), k) != kept.end();
              check(band.keeps(q, k) == expected,
                    describe(band) + " at " + std::to_string(q) + ", " + std::to_string(k));
              if (k >= 0) {
                check(transposed.keeps(k, q) == expected, "transposed " + describe(band));
              }
            }
          }
          check(!band.keeps(num_q, 0) && !transposed.keeps(num_k, 0), "past the end: " + describe(band));
        }
      }
    }
  }
});

const Test visits_no_empty_tile("band: an empty tile is never visited", [] {
  for (const auto& [left, right] : windows(37, 61)) {
    const Band band{37, 61, left, right};
    const TileShape tile{8, 16};
    for (int q_tile = 0; q_tile * tile.q < band.num_q; ++q_tile) {
      for_each_tile(band, q_tile, tile, [&](int k_tile, auto, auto) {
        bool any = false;
        for (int q = q_tile * tile.q; q < (q_tile + 1) * tile.q; ++q) {
          for (int k = k_tile * tile.k; k < (k_tile + 1) * tile.k; ++k) {
            any = any || band.keeps(q, k);
          }
        }
        check(any, describe(band, tile));
      });
    }
  }
});

const Test turns("band: key tiles that take turns at a query tile", [] {
  for (const auto& [num_q, num_k] : std::vector<std::pair<int, int>>{{37, 61}, {61, 37}, {64, 64}, {5, 90}, {90, 5}}) {
    for (const auto& [left, right] : windows(num_q, num_k)) {
      const Band band{num_q, num_k, left, right};
      check_turns(band, {8, 16}, describe(band, {8, 16}));
    }
  }
});

const Test sides_of_heads("band: of a head's own side and that of all the narrower one counts", [] {
  const std::int32_t left[] = {-1, 3, 90}, right[] = {0, -1, 2};
  const Band all{37, 61, 20, 5};
  const auto same = [](const Band& a, const Band& b) {
    return a.num_q == b.num_q && a.num_k == b.num_k && a.left == b.left && a.right == b.right;
  };
  check(same(Bands{all, left, right}.at(1, 0), {37, 61, 20, 0}), "no own left side");
  check(same(Bands{all, left, right}.at(0, 1), {37, 61, 3, 5}), "no own right side");
  check(same(Bands{all, left, right}.at(0, 2), {37, 61, 20, 2}), "a wider one");
  check(same(Bands{all, nullptr, right}.at(0, 2), {37, 61, 20, 2}), "left sides of none");
  check(same(Bands{all}.at(4, 2), all), "sides of none");
});

const Test suitable_tiles("band: long tiles of queries suit where they visit little in vain", [] {
  const auto causal = [](int length) { return Band{length, length, length, 0}; };
  constexpr TileShape kLong{192, 128};
  check(!causal(512).suits(kLong) && !causal(1024).suits(kLong), "short, causal");
  check(causal(4096).suits(kLong) && Band{2048, 2048, 2048, 2048}.suits(kLong), "long");
  check(!Band{197, 197, 197, 197}.suits(kLong) && !Band{577, 577, 577, 577}.suits(kLong),
        "a few queries in the last tile");
  constexpr TileShape kShort{128, 128};
  check(Band{577, 577, 577, 577}.suits(kShort) && causal(512).suits(kShort) && causal(1024).suits(kShort),
        "short tiles");
  check(!Band{197, 197, 197, 197}.suits(kShort), "few keys in the last tile");
  check(Band{0, 5, 5, 5}.suits(kLong) && Band{5, 0, 5, 5}.suits(kLong), "nothing");
});

}  // namespace

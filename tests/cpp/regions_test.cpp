// The laws of Region: exact tiles, the right mask, tiles of nothing left out, and a survey that tells the truth.
#include "fastattn/schedule/regions.hpp"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "fastattn/cpu/survey.hpp"

using namespace fastattn;

namespace {

// Ids of tokens in segments, one after the other or in any order.
enum class Order { kSorted, kMixed, kInterleaved };

std::vector<std::int32_t> some_ids(std::mt19937& random, std::int64_t count, int segments, Order order) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::size_t id = order == Order::kInterleaved ? i : random();
    ids[i] = static_cast<std::int32_t>(id % static_cast<std::size_t>(segments)) - segments / 2;
  }
  if (order == Order::kSorted) {
    std::ranges::sort(ids);
  }
  return ids;
}

// The regions of `batch` entries, with what they point to.
struct Owner {
  std::vector<std::int32_t> sides, q_ids, k_ids;
  std::vector<std::uint64_t> memory;
  Regions regions;

  Owner(const Band& band, std::vector<std::int32_t> rectangles, std::vector<std::int32_t> of_queries,
        std::vector<std::int32_t> of_keys)
      : sides(std::move(rectangles)),
        q_ids(std::move(of_queries)),
        k_ids(std::move(of_keys)),
        regions{{band}, {}, {}, {}} {
    regions.rectangles = {sides.data(), 1, std::ssize(sides) / Rectangles::kSides};
    if (!q_ids.empty() && !k_ids.empty()) {
      const auto entries = [](const std::vector<std::int32_t>& ids, int tokens) { return std::ssize(ids) / tokens; };
      regions.segments = {{q_ids.data(), entries(q_ids, band.num_q)}, {k_ids.data(), entries(k_ids, band.num_k)}};
      memory.resize(survey_bytes(regions.segments, band.num_q, band.num_k) / sizeof(std::uint64_t));
      regions.survey = survey_in(memory.data(), regions.segments, band.num_q, band.num_k);
      cpu::survey_segments(regions, StdThreads{1});
    }
  }
  Owner(const Owner&) = delete;
};

std::string describe(const Region& region, TileShape tile) {
  std::string text = "Region{" + std::to_string(region.num_q) + ", " + std::to_string(region.num_k) + ", " +
                     std::to_string(region.left) + ", " + std::to_string(region.right) + "}";
  for (int i = 0; i < Rectangles::kSides * region.num_rectangles; ++i) {
    text += (i % Rectangles::kSides == 0 ? "; " : ", ") + std::to_string(region.rectangles[i]);
  }
  return text + (region.has_segments() ? "; segments" : "") + " in tiles " + std::to_string(tile.q) + " x " +
         std::to_string(tile.k);
}

constexpr TileShape kSmallTiles[] = {{1, 1}, {2, 3}, {4, 8}, {8, 4}, {5, 5}, {16, 2}};
constexpr TileShape kKernelTiles[] = {{128, 128}, {128, 64}, {128, 32}, {96, 128}, {64, 128}, {192, 128}, {256, 64}};

void check_laws(const Region& region, TileShape tile) {
  check(is_exact(region, tile), describe(region, tile));
  check(is_exact(region.transposed(), tile), "transposed " + describe(region, tile));
}

// Bands, rectangles and segments as they come, around tiles of the size.
void sweep(unsigned seed, TileShape tile, int problems) {
  std::mt19937 random(seed);
  const auto any = [&random](int least, int most) { return std::uniform_int_distribution<int>(least, most)(random); };
  const int longest = 2 * std::max(tile.q, tile.k) + 3;
  for (int i = 0; i < problems; ++i) {
    const int num_q = any(1, longest), num_k = any(1, longest), all = num_q + num_k;
    const auto side = [&] { return any(0, 2) == 0 ? all : any(0, longest); };
    const Band band{num_q, num_k, side(), any(0, 1) == 0 ? 0 : side()};
    std::vector<std::int32_t> sides(static_cast<std::size_t>(Rectangles::kSides * any(0, Rectangles::kMost)));
    for (std::int32_t& x : sides) {
      x = any(-longest / 4, longest + longest / 4);
    }
    std::vector<std::int32_t> q_ids, k_ids;
    if (any(0, 2) != 0) {
      const int segments = any(1, 6);
      const auto order = static_cast<Order>(any(0, 2));
      q_ids = some_ids(random, num_q, segments, order);
      k_ids = some_ids(random, num_k, any(1, 6), order);
    }
    const Owner owner(band, sides, q_ids, k_ids);
    check_laws(owner.regions.at(0, 0), tile);
  }
}

const Test every_kept_score_once("regions: each kept score is in one tile, and full tiles are full", [] {
  unsigned seed = 0;
  for (const TileShape tile : kSmallTiles) {
    sweep(++seed, tile, 300);
  }
  for (const TileShape tile : kKernelTiles) {
    sweep(++seed, tile, 12);
  }
});

const Test long_sequences(
    "regions: of segments that are many tiles long whole tiles are full, and others left out", [] {
      std::mt19937 random(1);
      for (const Order order : {Order::kSorted, Order::kMixed, Order::kInterleaved}) {
        const int num_q = 700, num_k = 900;
        const Owner owner({num_q, num_k, num_q + num_k, num_q + num_k}, {10, 300, 500, 640, 0, 128, 0, 128},
                          some_ids(random, num_q, 3, order), some_ids(random, num_k, 3, order));
        const Region region = owner.regions.at(0, 0);
        const TileShape tile{64, 64};
        check_laws(region, tile);
        int visited = 0, full = 0;
        for (int q_tile = 0; q_tile * tile.q < num_q; ++q_tile) {
          for_each_tile(region, q_tile, tile, [&](int, auto coverage, auto) {
            ++visited;
            full += coverage() == Coverage::kFull;
          });
        }
        const int all = ceil_div(num_q, tile.q) * ceil_div(num_k, tile.k);
        check(order == Order::kSorted ? visited < all / 2 && full > visited / 3 : visited == all && full == 0,
              std::to_string(visited) + " tiles, " + std::to_string(full) + " full of " + std::to_string(all));
      }
    });

const Test visits_no_empty_tile("regions: without segments an empty tile is never visited, nor a full one masked", [] {
  std::mt19937 random(2);
  std::uniform_int_distribution<std::int32_t> any(-10, 80);
  const TileShape tile{8, 16};
  for (int i = 0; i < 300; ++i) {
    std::vector<std::int32_t> sides(static_cast<std::size_t>(Rectangles::kSides));
    std::ranges::generate(sides, [&] { return any(random); });
    const Owner owner({40, 64, i % 3 == 0 ? 7 : 0, 0}, sides, {}, {});
    const Region region = owner.regions.at(0, 0);
    for (int q_tile = 0; q_tile * tile.q < region.num_q; ++q_tile) {
      for_each_tile(region, q_tile, tile, [&](int k_tile, auto coverage, auto) {
        int kept = 0;
        for (int q = q_tile * tile.q; q < (q_tile + 1) * tile.q; ++q) {
          for (int k = k_tile * tile.k; k < (k_tile + 1) * tile.k; ++k) {
            kept += region.keeps(q, k);
          }
        }
        const int most = tile.q * tile.k;
        check(kept > 0 && (kept == most) == (coverage() == Coverage::kFull), describe(region, tile));
      });
    }
  }
});

const Test keeps_the_formula("regions: keeps() is the formula, whatever the sides of a rectangle", [] {
  constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min(),
                         kMost = std::numeric_limits<std::int32_t>::max();
  const std::vector<std::int32_t> values{kLeast, -3, 0, 2, 5, 9, kMost};
  const std::vector<std::int32_t> q_ids{3, 3, -7, 3, kLeast, -7, kMost}, k_ids{-7, 3, kMost, 3, 3};
  const Band band{7, 5, 1, 0};
  for (const std::int32_t row_begin : values) {
    for (const std::int32_t row_end : values) {
      for (const std::int32_t key_begin : values) {
        for (const std::int32_t key_end : values) {
          const Owner owner(band, {row_begin, row_end, key_begin, key_end}, q_ids, k_ids);
          const Region region = owner.regions.at(0, 0);
          for (int q = -1; q < band.num_q + 2; ++q) {
            for (int k = -1; k < band.num_k + 2; ++k) {
              const bool exists = 0 <= q && q < band.num_q && 0 <= k && k < band.num_k;
              const bool seen = row_begin <= q && q < row_end && key_begin <= k && k < key_end;
              const bool expected = exists && (seen || band.keeps(q, k)) &&
                                    q_ids[static_cast<std::size_t>(q)] == k_ids[static_cast<std::size_t>(k)];
              check(region.keeps(q, k) == expected && region.transposed().keeps(k, q) == expected,
                    describe(region, {}) + " at " + std::to_string(q) + ", " + std::to_string(k));
            }
          }
          check_laws(region, {2, 3});
        }
      }
    }
  }
});

const Test entries_of_a_batch("regions: an entry of a batch has its own rectangles and segments, or those of all", [] {
  std::mt19937 random(3);
  const Band band{70, 130, 200, 0};
  const std::vector<std::int32_t> sides{0, 9, 0, 99, 5, 70, 3, 4}, other{60, 70, 90, 130, 0, 0, 0, 0};
  std::vector<std::int32_t> both = sides;
  both.insert(both.end(), other.begin(), other.end());
  const auto q_ids = some_ids(random, band.num_q, 2, Order::kSorted);
  const auto k_ids = some_ids(random, 2 * band.num_k, 2, Order::kMixed);
  Owner owner(band, both, q_ids, k_ids);
  owner.regions.rectangles = {owner.sides.data(), 2, 2};
  for (int batch = 0; batch < 2; ++batch) {
    const auto* const keys = k_ids.data() + batch * band.num_k;
    const Owner alone(band, batch == 0 ? sides : other, q_ids, {keys, keys + band.num_k});
    const Region got = owner.regions.at(batch, 5), want = alone.regions.at(0, 0);
    check_laws(got, {96, 128});
    for (int q = 0; q < band.num_q; ++q) {
      for (int k = 0; k < band.num_k; ++k) {
        check(got.keeps(q, k) == want.keeps(q, k), "entry " + std::to_string(batch));
      }
    }
  }
});

}  // namespace

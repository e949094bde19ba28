// The laws of BlockList: exact tiles at every ratio of tile to block, the right mask, and a transpose that is one.
#include "fastattn/schedule/block_list.hpp"

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

using namespace fastattn;

namespace {

constexpr std::int32_t kPoison = 1 << 28;  // past a row's count: never read

// A block mask, and the lists that say the same.
struct Blocks {
  int rows, columns;
  std::vector<bool> kept, full;
  std::vector<std::int32_t> counts, indices;
  std::unique_ptr<bool[]> flags;

  Blocks(int rows, int columns, std::vector<bool> kept_blocks, std::vector<bool> full_blocks)
      : rows(rows),
        columns(columns),
        kept(std::move(kept_blocks)),
        full(std::move(full_blocks)),
        counts(rows),
        indices(rows * columns, kPoison),
        flags(new bool[rows * columns + 1]{}) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        if (kept[i * columns + j]) {
          const int entry = i * columns + counts[i]++;
          indices[entry] = j;
          flags[entry] = full[i * columns + j];
        }
      }
    }
  }

  BlockRows view(bool with_full) const { return {counts.data(), indices.data(), with_full ? flags.get() : nullptr}; }

  Blocks transposed() const {
    std::vector<bool> kept_blocks(rows * columns), full_blocks(rows * columns);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        kept_blocks[j * rows + i] = kept[i * columns + j];
        full_blocks[j * rows + i] = full[i * columns + j];
      }
    }
    return {columns, rows, kept_blocks, full_blocks};
  }
};

Blocks random_blocks(int rows, int columns, double density, std::mt19937& random) {
  std::bernoulli_distribution keep(density), whole(0.3);
  std::vector<bool> kept(rows * columns), full(rows * columns);
  for (int i = 0; i < rows * columns; ++i) {
    kept[i] = keep(random);
    full[i] = kept[i] && whole(random);
  }
  return {rows, columns, kept, full};
}

// One problem in memory: a mask, its lists in both directions, and the schedule that reads them.
struct Problem {
  Blocks blocks, transposed;
  BlockList list;

  Problem(int num_q, int num_k, TileShape block, Band band, bool with_full, double density, std::mt19937& random)
      : blocks(random_blocks(ceil_div(num_q, block.q), ceil_div(num_k, block.k), density, random)),
        transposed(blocks.transposed()),
        list{num_q, num_k, band.left, band.right, block, blocks.view(with_full), transposed.view(with_full)} {}

  bool keeps(int q, int k) const {
    const int block = q / list.block.q * blocks.columns + k / list.block.k;
    const bool exempt = list.rows.full != nullptr && blocks.full[block];
    return blocks.kept[block] && (exempt || list.band().keeps(q, k));
  }
};

std::string describe(const BlockList& list, TileShape tile = {0, 0}) {
  const auto pair = [](int a, int b) { return std::to_string(a) + " x " + std::to_string(b); };
  return pair(list.num_q, list.num_k) + " tokens, band " + std::to_string(list.left) + ", " +
         std::to_string(list.right) + ", blocks " + pair(list.block.q, list.block.k) + ", tiles " +
         pair(tile.q, tile.k) + (list.rows.full != nullptr ? ", some full" : "");
}

std::vector<Band> bands(int num_q, int num_k) {
  const int unbounded = num_q + num_k;
  return {{num_q, num_k, unbounded, unbounded}, {num_q, num_k, unbounded, 0}, {num_q, num_k, 5, 3}};
}

// Calls body(problem) for random lists of every density, under no band, a causal one and a window.
template <class Body>
void for_random_problems(TileShape block, const std::vector<int>& lengths, Body&& body) {
  std::mt19937 random(1);
  for (const int num_q : lengths) {
    for (const int num_k : lengths) {
      for (const Band& band : bands(num_q, num_k)) {
        for (const double density : {0., 0.2, 0.7, 1.}) {
          for (const bool with_full : {false, true}) {
            body(Problem(num_q, num_k, block, band, with_full, density, random));
          }
        }
      }
    }
  }
}

// Tiles of a quarter of a block to two, those that lie across edges among them.
std::vector<TileShape> tiles_of(TileShape block) {
  std::vector<TileShape> tiles;
  for (int q = block.q / 4; q <= 2 * block.q; q += block.q / 4) {
    for (int k = block.k / 4; k <= 2 * block.k; k += block.k / 4) {
      const TileShape tile{q, k};
      if (BlockList{.num_q = 0, .num_k = 0, .left = 0, .right = 0, .block = block, .rows = {}, .columns = {}}.supports(
              tile)) {
        tiles.push_back(tile);
      }
    }
  }
  return tiles;
}

// Calls body(k_tile, coverage, kept pairs) for each visited tile of a query tile.
template <class Body>
void count_tiles(const BlockList& list, int q_tile, TileShape tile, Body&& body) {
  for_each_tile(list, q_tile, tile, [&](int k_tile, auto coverage, auto) {
    int kept = 0;
    for (int q = q_tile * tile.q; q < (q_tile + 1) * tile.q; ++q) {
      for (int k = k_tile * tile.k; k < (k_tile + 1) * tile.k; ++k) {
        kept += list.keeps(q, k);
      }
    }
    body(k_tile, coverage(), kept);
  });
}

const Test every_kept_score_once("block list: each kept score is in one tile, and full tiles are full", [] {
  for (const TileShape block : {TileShape{4, 4}, {8, 4}, {4, 8}}) {
    for_random_problems(block, {0, 1, 3, 4, 7, 8, 9, 16, 17, 24, 31, 33}, [&](const Problem& problem) {
      for (const TileShape tile : tiles_of(block)) {
        check(is_exact(problem.list, tile), describe(problem.list, tile));
        const TileShape turned{tile.k, tile.q};
        check(is_exact(problem.list.transposed(), turned), "transposed " + describe(problem.list, tile));
      }
    });
  }
  // The blocks and tiles of the kernels: lengths one off their edges.
  for (const TileShape block : {TileShape{128, 128}, {64, 64}, {64, 128}, {128, 64}, {192, 128}}) {
    for_random_problems(block, {127, 193, 256}, [&](const Problem& problem) {
      for (const TileShape tile : {TileShape{128, 128}, {64, 128}, {128, 64}, {96, 128}, {96, 64}, {192, 128}}) {
        if (tile.q == 192 && block.q != 192) {
          continue;  // of 64 queries it would meet three
        }
        check(problem.list.supports(tile), describe(problem.list, tile));
        check(is_exact(problem.list, tile), describe(problem.list, tile));
        check(is_exact(problem.list.transposed(), tile), "transposed " + describe(problem.list, tile));
      }
    });
  }
});

const Test suiting_tiles("block list: tiles whose queries lie in one block suit it", [] {
  const auto lists = [](int queries) { return BlockLists{{0, 0, 0, 0, {queries, 128}, {}, {}}, 1, 1}; };
  check(lists(192).suits({192, 128}) && lists(128).suits({128, 128}) && lists(128).suits({64, 128}), "in one block");
  check(!lists(128).suits({192, 128}) && !lists(64).suits({192, 128}) && !lists(192).suits({128, 128}), "in two");
});

const Test supported_tiles("block list: tiles that meet three blocks are not supported", [] {
  const auto list = [](TileShape block) { return BlockList{0, 0, 0, 0, block, {}, {}}; };
  check(list({128, 64}).supports({192, 128}) && list({128, 128}).supports({256, 256}), "two blocks");
  check(!list({64, 128}).supports({192, 128}), "three blocks");
  check(!list({128, 64}).supports({128, 192}), "three blocks");
  check(!list({8, 8}).supports({11, 8}), "three blocks, where a tile begins just before an edge");
});

const Test keeps_the_mask("block list: keeps() is the block mask under the band, transposed() exchanges its sides", [] {
  for_random_problems({4, 8}, {1, 4, 7, 16, 27}, [](const Problem& problem) {
    const BlockList& list = problem.list;
    const BlockList transposed = list.transposed();
    for (int q = 0; q < list.num_q; ++q) {
      for (int k = 0; k < list.num_k; ++k) {
        check(list.keeps(q, k) == problem.keeps(q, k), describe(list));
        check(transposed.keeps(k, q) == problem.keeps(q, k), "transposed " + describe(list));
      }
      check(!list.keeps(q, -1) && !list.keeps(q, list.num_k), "outside: " + describe(list));
    }
    check(!list.keeps(-1, 0) && !list.keeps(list.num_q, 0), "outside: " + describe(list));
  });
});

const Test tightest_tiles("block list: no visited tile is empty, and none that is full is called partial", [] {
  for_random_problems({4, 8}, {1, 7, 16, 27, 40}, [](const Problem& problem) {
    for (const BlockList& list : {problem.list, problem.list.transposed()}) {
      for (const TileShape tile : tiles_of(list.block)) {
        for (int q_tile = 0; q_tile * tile.q < list.num_q; ++q_tile) {
          count_tiles(list, q_tile, tile, [&](int, Coverage coverage, int kept) {
            check(kept > 0, describe(list, tile));
            check((kept == tile.q * tile.k) == (coverage == Coverage::kFull), describe(list, tile));
          });
        }
      }
    }
  });
});

const Test longest_runs("block list: equal neighbours are one run, up to the bound on reading ahead", [] {
  for_random_problems({4, 4}, {40, 160}, [](const Problem& problem) {
    for (const TileShape tile : tiles_of(problem.list.block)) {
      for (int q_tile = 0; q_tile * tile.q < problem.list.num_q; ++q_tile) {
        TileRun last{-1, 0, Coverage::kPartial};
        auto cursor = problem.list.runs(q_tile, tile);
        for (TileRun run{}; cursor.next(run); last = run) {
          check(run.count > 0 && run.count <= BlockList::kLongestRun, describe(problem.list, tile));
          check(last.count == BlockList::kLongestRun || run.first != last.first + last.count ||
                    run.coverage != last.coverage || run.cells != last.cells,
                describe(problem.list, tile));
        }
      }
    }
  });
});

const Test every_head("block list: each batch and head has its own list, or shares one", [] {
  const int num_q = 17, num_k = 23;
  const TileShape block{4, 8};
  const int rows = ceil_div(num_q, block.q), columns = ceil_div(num_k, block.k);
  for (const int batch : {1, 2}) {
    for (const int heads : {1, 3}) {
      // All heads' rows one after the other are the rows of one tall mask.
      std::mt19937 random(1);
      const Blocks all = random_blocks(batch * heads * rows, columns, 0.5, random);
      std::vector<std::int32_t> counts, indices;  // of all heads' transposed lists
      for (int head = 0; head < batch * heads; ++head) {
        const auto begin = all.kept.begin() + head * rows * columns;
        const std::vector<bool> kept(begin, begin + rows * columns), none(rows * columns);
        const Blocks turned = Blocks(rows, columns, kept, none).transposed();
        counts.insert(counts.end(), turned.counts.begin(), turned.counts.end());
        indices.insert(indices.end(), turned.indices.begin(), turned.indices.end());
      }
      const BlockList first{num_q, num_k, 40, 40, block, all.view(true), {counts.data(), indices.data(), nullptr}};
      const BlockLists lists{first, batch, heads};
      for (int b = 0; b < 2; ++b) {
        for (int h = 0; h < 3; ++h) {
          const int head = (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
          const BlockList list = lists.at(b, h);
          for (int q = 0; q < num_q; ++q) {
            for (int k = 0; k < num_k; ++k) {
              const bool expected = all.kept[(head * rows + q / block.q) * columns + k / block.k];
              check(list.keeps(q, k) == expected, "head " + std::to_string(head));
              check(list.transposed().keeps(k, q) == expected, "transposed, head " + std::to_string(head));
            }
          }
          check(is_exact(list, {4, 8}) && is_exact(list.transposed(), {8, 4}), "head " + std::to_string(head));
        }
      }
      const BlockList forward_only = BlockLists{{.num_q = num_q,
                                                 .num_k = num_k,
                                                 .left = 40,
                                                 .right = 40,
                                                 .block = block,
                                                 .rows = all.view(false),
                                                 .columns = {}},
                                                batch,
                                                heads}
                                         .at(1, 2);
      check(forward_only.columns.counts == nullptr && is_exact(forward_only, {8, 8}), "without transposed lists");
    }
  }
});

}  // namespace

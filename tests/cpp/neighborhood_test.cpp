// The laws of Neighborhood: the right mask, exact tiles in both directions, and slots that hold every token once.
#include "fastattn/schedule/neighborhood.hpp"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

using namespace fastattn;

namespace {

struct Case {
  PerAxis<NeighborhoodAxis> axes;
  PerAxis<int> q_box, k_box;

  Neighborhood schedule() const { return make_neighborhood(axes, q_box, k_box); }
};

std::string describe(const PerAxis<int>& x) {
  return std::to_string(x[0]) + "x" + std::to_string(x[1]) + "x" + std::to_string(x[2]);
}

std::string describe(const Case& c) {
  std::string text;
  for (const NeighborhoodAxis& axis : c.axes.at) {
    text += "{length " + std::to_string(axis.length) + ", window " + std::to_string(axis.window) + ", stride " +
            std::to_string(axis.stride) + ", dilation " + std::to_string(axis.dilation) +
            (axis.causal ? ", causal} " : "} ");
  }
  return text + "in tiles " + describe(c.q_box) + " | " + describe(c.k_box);
}

// Does the query at coordinate q keep the key at k? The published formula, step by step, along one axis.
bool axis_keeps(const NeighborhoodAxis& axis, int q, int k) {
  if (q % axis.dilation != k % axis.dilation) {
    return false;
  }
  int length = 0;  // of the dilation group
  for (int c = q % axis.dilation; c < axis.length; c += axis.dilation) {
    ++length;
  }
  const int i = q / axis.dilation, j = k / axis.dilation;
  const int window = axis.window == -1 ? length : std::min(axis.window, length);
  const int right = window / 2 + window % 2 - 1;
  if (axis.causal) {
    const int leader = std::min(i / axis.stride * axis.stride + axis.stride - 1, length - 1);
    return leader - window < j && j <= i;
  }
  const int leader = std::min(i / axis.stride * axis.stride + axis.stride / 2, length - 1);
  int start = std::max(leader - window / 2, 0);
  if (leader + right >= length) {
    start += length - right - leader - 1;
  }
  return start <= j && j < start + window;
}

bool formula_keeps(const PerAxis<NeighborhoodAxis>& axes, int q, int k) {
  bool keeps = true;
  for (int a = kAxes - 1; a >= 0; --a) {
    keeps = keeps && axis_keeps(axes[a], q % axes[a].length, k % axes[a].length);
    q /= axes[a].length, k /= axes[a].length;
  }
  return keeps;
}

int tokens_of(const Case& c) { return c.axes[0].length * c.axes[1].length * c.axes[2].length; }

template <class Schedule>
void check_visited_tiles(const Schedule& schedule, const std::string& what) {
  const TileShape shape = schedule.tile_shape();
  for (int q_tile = 0; q_tile * shape.q < schedule.num_q; ++q_tile) {
    for_each_tile(schedule, q_tile, shape, [&](int k_tile, auto, std::uint16_t cells) {
      const auto mask = schedule.tile_mask(q_tile, k_tile, shape, cells);
      bool any = false;
      for (int q = 0; q < shape.q; ++q) {
        for (int k = 0; k < shape.k; ++k) {
          any = any || mask.row(q).keeps(k);
        }
      }
      check(any, "empty tile: " + what);
    });
  }
}

void check_tiles(const Case& c) {
  const Neighborhood schedule = c.schedule();
  const auto transposed = schedule.transposed();
  check(is_exact(schedule, schedule.tile_shape()), describe(c));
  check(is_exact(transposed, transposed.tile_shape()), "transposed " + describe(c));
}

// Each token has one slot on either side, tiles are boxes, and keeps() is the formula between tokens.
void check_mask(const Case& c) {
  const Neighborhood schedule = c.schedule();
  const auto transposed = schedule.transposed();
  const Neighborhood again = transposed.transposed();
  const auto check_slots = [&](auto token_of, int slots) {
    std::vector<int> found;
    for (int slot = -1; slot <= slots; ++slot) {
      if (token_of(slot) >= 0) {
        found.push_back(token_of(slot));
      }
    }
    std::sort(found.begin(), found.end());
    bool each_once = static_cast<int>(found.size()) == tokens_of(c);
    for (int token = 0; each_once && token < tokens_of(c); ++token) {
      each_once = found[static_cast<std::size_t>(token)] == token;
    }
    check(each_once, "slots of " + describe(c));
  };
  check_slots([&](int slot) { return schedule.query_token(slot); }, schedule.num_q);
  check_slots([&](int slot) { return schedule.key_token(slot); }, schedule.num_k);
  const TileShape shape = schedule.tile_shape();
  for (int slot = 0; slot < schedule.num_q; ++slot) {
    check(schedule.query_token(slot / shape.q, slot % shape.q, shape) == schedule.query_token(slot),
          "slot " + std::to_string(slot) + " by its tile and row, of " + describe(c));
  }
  for (int q = -1; q <= schedule.num_q; ++q) {
    const int query = schedule.query_token(q);
    for (int k = -1; k <= schedule.num_k; ++k) {
      const int key = schedule.key_token(k);
      const bool expected = query >= 0 && key >= 0 && formula_keeps(c.axes, query, key);
      if (schedule.keeps(q, k) != expected || transposed.keeps(k, q) != expected || again.keeps(q, k) != expected) {
        check(false, describe(c) + " at slots " + std::to_string(q) + ", " + std::to_string(k));
      }
    }
  }
}

// Small problems with everything in them: ragged boxes, windows beyond the axis, groups of unequal length.
class Draw {
 public:
  explicit Draw(unsigned seed) : random_(seed) {}

  int between(int low, int high) { return low + static_cast<int>(random_() % static_cast<unsigned>(high - low + 1)); }

  NeighborhoodAxis axis(int longest) {
    NeighborhoodAxis axis{between(1, longest)};
    axis.window = between(0, 4) == 0 ? -1 : between(1, axis.length + 1);
    axis.stride = between(1, axis.window == -1 ? axis.length : axis.window);
    axis.dilation = between(0, 1) == 0 ? 1 : between(1, axis.length + 1);
    axis.causal = between(0, 2) == 0;
    return axis;
  }
  PerAxis<int> box() { return {between(1, 3), between(1, 4), between(1, 5)}; }
  Case problem() {
    const NeighborhoodAxis one{1};
    const int dimensions = between(1, 3);
    return {{dimensions == 3 ? axis(5) : one, dimensions >= 2 ? axis(7) : one, axis(dimensions == 1 ? 40 : 9)},
            box(),
            box()};
  }

 private:
  std::mt19937 random_;
};

const Test one_axis_exhaustively("neighborhood: one axis, every window, stride, dilation and causality", [] {
  for (const int length : {1, 2, 3, 5, 8, 9, 12}) {
    for (int window = 1; window <= length + 1; ++window) {
      for (int stride = 1; stride <= window; ++stride) {
        for (const int dilation : {1, 2, 3, length}) {
          for (const bool causal : {false, true}) {
            const NeighborhoodAxis axis{length, window, stride, dilation, causal};
            check_mask({{{1}, {1}, axis}, {1, 1, 4}, {1, 1, 3}});
            for (const auto& [q, k] : {std::pair{1, 1}, {2, 3}, {4, 2}, {3, 5}, {8, 4}}) {
              check_tiles({{{1}, {1}, axis}, {1, 1, q}, {1, 1, k}});
            }
          }
        }
      }
    }
  }
});

const Test random_problems("neighborhood: random problems of one to three axes", [] {
  Draw draw(1);
  for (int i = 0; i < 60; ++i) {
    const Case c = draw.problem();
    check_mask(c);
    check_tiles(c);
    check_visited_tiles(c.schedule(), describe(c));
    check_visited_tiles(c.schedule().transposed(), "transposed " + describe(c));
  }
});

const Test fixed_boxes("neighborhood: boxes fixed when compiled are those given at run time", [] {
  Draw draw(3);
  for (int i = 0; i < 30; ++i) {
    const PerAxis<NeighborhoodAxis> axes{draw.axis(4), draw.axis(5), draw.axis(9)};
    const Case c{axes, {2, 2, 4}, {1, 3, 4}};
    const Neighborhood any = c.schedule();
    const auto fixed = make_neighborhood(axes, FixedBox<2, 2, 4>{}, FixedBox<1, 3, 4>{});
    check(fixed.num_q == any.num_q && fixed.num_k == any.num_k, describe(c));
    check(is_exact(fixed, fixed.tile_shape()), describe(c));
    check(is_exact(fixed.transposed(), fixed.transposed().tile_shape()), "transposed " + describe(c));
    check_visited_tiles(fixed.transposed(), "transposed " + describe(c));
    bool same = true;
    for (int q = 0; q < any.num_q; ++q) {
      for (int k = 0; k < any.num_k; ++k) {
        same = same && fixed.keeps(q, k) == any.keeps(q, k);
      }
    }
    check(same, describe(c));
  }
});

// The kernels' tiles: 128 and 192 queries, 64 and 128 keys; lengths one off their edges.
const Test boxes_of_the_kernels("neighborhood: boxes of 64, 128 and 192 slots", [] {
  for (const auto& [q_box, k_box] : std::vector<std::pair<PerAxis<int>, PerAxis<int>>>{{{1, 1, 128}, {1, 1, 128}},
                                                                                       {{1, 1, 192}, {1, 1, 128}},
                                                                                       {{1, 16, 8}, {1, 8, 8}},
                                                                                       {{1, 16, 8}, {1, 8, 16}},
                                                                                       {{1, 12, 16}, {1, 16, 8}},
                                                                                       {{1, 24, 8}, {1, 8, 8}},
                                                                                       {{2, 8, 8}, {2, 8, 8}},
                                                                                       {{2, 8, 8}, {4, 4, 8}},
                                                                                       {{4, 4, 8}, {4, 4, 4}},
                                                                                       {{3, 8, 8}, {2, 8, 8}},
                                                                                       {{4, 4, 4}, {4, 4, 8}}}) {
    for (const int mask : {0, 1, 2, 3}) {
      Case c{{{1}, {1}, {1}}, q_box, k_box};
      for (int a = 0; a < kAxes; ++a) {
        const int box = max_of(q_box[a], k_box[a]);
        if (box == 1) {
          continue;
        }
        // One tile or two along an axis; two along all of them would only take longer.
        const bool two_tiles = a == 2 || (a == 1 && mask == 2);
        const int length = two_tiles ? (mask == 0 ? 2 * box : box + 1) : box - 1;
        c.axes[a] = std::vector<NeighborhoodAxis>{{length, box, q_box[a]},
                                                  {length, box / 2 + 1},
                                                  {length, box, max_of(box / 3, 1), 1, a != 1},
                                                  {length, 3, 2, a == 1 ? 1 : 2}}[static_cast<std::size_t>(mask)];
      }
      check_tiles(c);
    }
  }
});

const Test known_masks("neighborhood: stride = window is block-diagonal, window = axis is dense", [] {
  const Neighborhood blocked =
      make_neighborhood({{4, 2, 2}, {8, 4, 4}, {12, 4, 4}}, {2, 4, 4}, {2, 4, 4});  // a tile is a block
  for (int q = 0; q < blocked.num_q; ++q) {
    for (int k = 0; k < blocked.num_k; ++k) {
      check(blocked.keeps(q, k) == (q / 32 == k / 32), "block-diagonal");
    }
  }
  for (const int window : {-1, 6, 7, 100}) {
    for (const int stride : {1, 4}) {
      const Case c{{{1}, {6, window, stride}, {6, window, stride}}, {1, 2, 3}, {1, 3, 2}};
      const Neighborhood dense = c.schedule();
      for (int q_tile = 0; q_tile < 6; ++q_tile) {
        auto cursor = dense.runs(q_tile, dense.tile_shape());
        int full = 0;
        for (TileRun run{}; cursor.next(run);) {
          full += run.coverage == Coverage::kFull ? run.count : 0;
        }
        check(full == 6, "dense " + describe(c));
      }
    }
  }
  const Neighborhood empty = make_neighborhood({{1}, {0, 3}, {6, 3, 2, 2}}, {1, 2, 2}, {1, 2, 2});
  check(empty.num_q == 0 && empty.num_k == 0 && empty.kept_scores() == 0, "an axis of length 0");
  const Neighborhood past = make_neighborhood({{1}, {1}, {6, -1, 1, 1, true}}, {1, 1, 2}, {1, 1, 2});
  int full = 0;
  for (int q_tile = 0; q_tile < 3; ++q_tile) {
    for_each_tile(past, q_tile, past.tile_shape(),
                  [&](int, auto coverage, auto) { full += coverage() == Coverage::kFull; });
  }
  check(full == 3, "causal: the tiles under the diagonal are full");
});

const Test divisors("neighborhood: a known divisor divides like any other", [] {
  for (const int divisor :
       {1, 2, 3, 5, 7, 8, 12, 96, 127, 128, 641, 65535, 1 << 20, (1 << 30) - 1, 1 << 30, 0x7fffffff}) {
    const Divisor known(divisor);
    for (const std::int64_t multiple : {0, 1, 2, 1000, 0x7fffffff / divisor}) {
      for (const std::int64_t x : {multiple * divisor - 1, multiple * divisor, multiple * divisor + 1}) {
        if (0 <= x && x <= 0x7fffffff) {
          const int dividend = static_cast<int>(x);
          check(dividend / known == dividend / divisor && dividend % known == dividend % divisor,
                std::to_string(dividend) + " / " + std::to_string(divisor));
        }
      }
    }
  }
});

const Test origins("neighborhood: a tile is a box of tokens that starts at its origin and steps by the dilation", [] {
  Draw draw(2);
  for (int i = 0; i < 300; ++i) {
    const Case c = draw.problem();
    const Neighborhood schedule = c.schedule();
    const int slots = schedule.tile_shape().k;
    for (int k_tile = 0; k_tile * slots < schedule.num_k; ++k_tile) {
      const PerAxis<int> origin = schedule.key_origin(k_tile, schedule.tile_shape());
      int slot = k_tile * slots;
      for (int x = 0; x < c.k_box[0]; ++x) {
        for (int y = 0; y < c.k_box[1]; ++y) {
          for (int z = 0; z < c.k_box[2]; ++z, ++slot) {
            const PerAxis<int> at{origin[0] + x * schedule.axes[0].dilation, origin[1] + y * schedule.axes[1].dilation,
                                  origin[2] + z * schedule.axes[2].dilation};
            const bool exists = at[0] < c.axes[0].length && at[1] < c.axes[1].length && at[2] < c.axes[2].length;
            const int token = (at[0] * c.axes[1].length + at[1]) * c.axes[2].length + at[2];
            check(schedule.key_token(slot) == (exists ? token : -1), describe(c));
            check(schedule.transposed().query_token(slot) == schedule.key_token(slot), "transposed " + describe(c));
          }
        }
      }
      check(schedule.transposed().query_origin(k_tile, schedule.tile_shape())[1] == origin[1],
            "transposed " + describe(c));
    }
  }
});

}  // namespace

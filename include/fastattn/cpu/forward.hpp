// The forward executor: what the Hopper kernel does, tile by tile, for any schedule, score and element type.
#pragma once

#include "fastattn/cpu/matrix_product.hpp"
#include "fastattn/cpu/parallel.hpp"
#include "fastattn/schedule/schedule.hpp"
#include "fastattn/score/score.hpp"

namespace fastattn::cpu {

struct ForwardTensors {
  TensorView q, k, v, out;
  float* lse;  // null for a score that has none
};

// One row of a score tile as a score policy sees it; `count` is a multiple of the register's width.
template <class Isa>
struct Row {
  float* scores;
  int count;

  float max() const {
    Vector<Isa> largest(-kInfinity);
    for (int k = 0; k < count; k += Vector<Isa>::kWidth) {
      largest = max_of(Vector<Isa>::load(scores + k), largest);
    }
    return largest_of(largest);
  }

  template <class Function>
  float apply(Function function) const {
    Vector<Isa> sum(0.f);
    for (int k = 0; k < count; k += Vector<Isa>::kWidth) {
      const Vector<Isa> weight = function(Vector<Isa>::load(scores + k));
      weight.store(scores + k);
      sum = sum + weight;
    }
    return sum_of(sum);
  }
};

// −∞ for the scores of a row that the mask drops.
template <class Isa, class RowMask>
void mask_row(const RowMask& mask, float* scores, int count) {
  for (int k = 0; k < count; ++k) {
    scores[k] = mask.keeps(k) ? scores[k] : -kInfinity;
  }
}

// For a schedule that leaves the choice: 96 queries amortise the packing of a key tile (192 are no faster) and leave
// tasks for many cores in short sequences; 128 keys bound the scores to 48 KiB of the L2 cache.
inline constexpr TileShape kForwardTile{96, 128};

template <class Isa, class Element, TileShape kTile = kForwardTile, ScheduleFamily Schedules, class Score>
void forward(const ForwardTensors& x, const Schedules& schedules, const Score& scores_of_heads,
             const Threads& threads) {
  constexpr int kRows = padded_rows<Isa>(kTile.q);
  static_assert(kTile.k % Vector<Isa>::kWidth == 0);
  static_assert(2 * (kRows + kTile.k) * kMaxHeadDim + kRows * kTile.k <= kScratchFloats);
  const int num_q = schedules.at(0, 0).num_q, num_k = schedules.at(0, 0).num_k;
  const int dim = static_cast<int>(x.q.head_dim()), width = round_up<Isa>(dim);
  const std::int64_t heads = x.q.heads(), group = heads / x.k.heads(), q_tiles = ceil_div(num_q, kTile.q);

  parallel_for(threads, x.q.batch() * heads * q_tiles, [&](std::int64_t task) {
    // The last query tiles of a head first: under a causal mask they are the longest.
    const int q_tile = static_cast<int>(q_tiles - 1 - task % q_tiles);
    const std::int64_t h = task / q_tiles % heads, b = task / q_tiles / heads;
    const auto schedule = schedules.at(static_cast<int>(b), static_cast<int>(h));
    const Score score = scores_of_heads.at(static_cast<int>(h));
    const int rows = min_of(kTile.q, num_q - q_tile * kTile.q);

    Scratch scratch;
    float* q = scratch.take(kRows * width);
    float* out = scratch.take(kRows * width);
    float* scores = scratch.take(kRows * kTile.k);
    float* keys = scratch.take(dim * kTile.k);
    float* values = scratch.take(kTile.k * width);
    float decay[kRows] = {};
    typename Score::State state[kTile.q] = {};

    const TileTokens tokens = query_tokens<kTile>(schedule, q_tile);
    load_rows<Isa>(q, rows_of<const Element>(x.q, b, h, tokens), dim);
    for (int i = 0; i < kRows * width; ++i) {
      out[i] = 0.f;
    }
    KeyStream<Element, kTile, decltype(schedule)> stream{schedule, x.k, x.v, b, h / group};
    for_each_tile(schedule, q_tile, kTile, [&](int k_tile, auto coverage, std::uint16_t cells) {
      const int count = min_of(kTile.k, num_k - k_tile * kTile.k), columns = round_up<Isa>(count);
      const Panels<Isa> k{keys, dim, columns}, v{values, count, width};
      stream.move_to(k_tile);
      pack_columns(k, stream.rows1);
      pack_rows(v, stream.rows2, dim);
      stream.move_to(k_tile + 1);  // runs ascend: most likely the next one
      prefetch<Isa>(stream.rows1, dim);
      prefetch<Isa>(stream.rows2, dim);

      multiply<Isa, Update::kOverwrite>(q, width, k, scores, kTile.k, rows);
      const auto mask = schedule.tile_mask(q_tile, k_tile, kTile, cells);
      for (int row = 0; row < rows; ++row) {
        float* const row_scores = scores + row * kTile.k;
        if constexpr (coverage() == Coverage::kPartial) {
          mask_row<Isa>(mask.row(row), row_scores, columns);
        }
        decay[row] = score.absorb(state[row], Row<Isa>{row_scores, columns});
      }
      constexpr Update kUpdate = Score::kRescales ? Update::kScaleAndAdd : Update::kAdd;
      multiply<Isa, kUpdate>(scores, kTile.k, v, out, width, rows, decay);
    });

    const Rows to = rows_of<Element>(x.out, b, h, tokens);
    for (int row = 0; row < rows; ++row) {
      if (to[row] == nullptr) {
        continue;
      }
      const RowResult result = score.finish(state[row], Identity{});
      for (int d = 0; d < dim; ++d) {
        const float sum = out[row * width + d];  // 0 · NaN where the row keeps nothing and a value is NaN
        to[row][d] = from_float<Element>(result.output_scale == 0.f ? 0.f : sum * result.output_scale);
      }
      if (x.lse != nullptr) {
        x.lse[(b * heads + h) * x.q.seq() + tokens[row]] = result.lse;
      }
    }
  });
}

}  // namespace fastattn::cpu

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

// 96 queries amortise the packing of a key tile (192 are no faster) and leave tasks for many cores in short sequences;
// 128 keys bound the scores to 48 KiB of the L2 cache.
inline constexpr TileShape kForwardTile{96, 128};

template <class Isa, class Element, ScheduleFamily Schedules, class Score>
void forward(const ForwardTensors& x, const Schedules& schedules, const Score& scores_of_heads,
             const Threads& threads) {
  static_assert(kForwardTile.q % Isa::kRows == 0 && kForwardTile.k % Vector<Isa>::kWidth == 0);
  static_assert(2 * (kForwardTile.q + kForwardTile.k) * kMaxHeadDim + kForwardTile.q * kForwardTile.k <=
                kScratchFloats);
  const int num_q = static_cast<int>(x.q.seq()), num_k = static_cast<int>(x.k.seq());
  const int dim = static_cast<int>(x.q.head_dim()), width = round_up<Isa>(dim);
  const std::int64_t heads = x.q.heads(), group = heads / x.k.heads(), q_tiles = ceil_div(num_q, kForwardTile.q);

  parallel_for(threads, x.q.batch() * heads * q_tiles, [&](std::int64_t task) {
    // The last query tiles of a head first: under a causal mask they are the longest.
    const int q_tile = static_cast<int>(q_tiles - 1 - task % q_tiles);
    const std::int64_t h = task / q_tiles % heads, b = task / q_tiles / heads;
    const auto schedule = schedules.at(static_cast<int>(b), static_cast<int>(h));
    const Score score = scores_of_heads.at(static_cast<int>(h));
    const int q_first = q_tile * kForwardTile.q, rows = min_of(kForwardTile.q, num_q - q_first);

    Scratch scratch;
    float* q = scratch.take(kForwardTile.q * width);
    float* out = scratch.take(kForwardTile.q * width);
    float* scores = scratch.take(kForwardTile.q * kForwardTile.k);
    float* keys = scratch.take(dim * kForwardTile.k);
    float* values = scratch.take(kForwardTile.k * width);
    float decay[kForwardTile.q] = {};
    typename Score::State state[kForwardTile.q] = {};

    load_rows<Isa>(q, tokens_of<const Element>(x.q, b, h), q_first, rows, kForwardTile.q, dim);
    for (int i = 0; i < kForwardTile.q * width; ++i) {
      out[i] = 0.f;
    }
    const auto k_tokens = tokens_of<const Element>(x.k, b, h / group);
    const auto v_tokens = tokens_of<const Element>(x.v, b, h / group);
    for_each_tile(schedule, q_tile, kForwardTile, [&](int k_tile, auto coverage) {
      const int k_first = k_tile * kForwardTile.k, count = min_of(kForwardTile.k, num_k - k_first);
      const int columns = round_up<Isa>(count);
      const Panels<Isa> k{keys, dim, columns}, v{values, count, width};
      pack_columns(k, k_tokens, k_first, count);
      pack_rows(v, v_tokens, k_first, dim);
      // Runs ascend: the tile after this one most likely follows it.
      const int next = k_first + count, next_count = min_of(kForwardTile.k, num_k - next);
      prefetch<Isa>(k_tokens, next, next_count, dim);
      prefetch<Isa>(v_tokens, next, next_count, dim);

      multiply<Isa, Update::kOverwrite>(q, width, k, scores, kForwardTile.k, rows);
      const auto mask = schedule.tile_mask(q_tile, k_tile, kForwardTile);
      for (int row = 0; row < rows; ++row) {
        float* const row_scores = scores + row * kForwardTile.k;
        if constexpr (coverage() == Coverage::kPartial) {
          mask_row<Isa>(mask.row(row), row_scores, columns);
        }
        decay[row] = score.absorb(state[row], Row<Isa>{row_scores, columns});
      }
      constexpr Update kUpdate = Score::kRescales ? Update::kScaleAndAdd : Update::kAdd;
      multiply<Isa, kUpdate>(scores, kForwardTile.k, v, out, width, rows, decay);
    });

    for (int row = 0; row < rows; ++row) {
      const RowResult result = score.finish(state[row], Identity{});
      Element* const to = x.out.row<Element>(b, q_first + row, h);
      for (int d = 0; d < dim; ++d) {
        const float sum = out[row * width + d];  // 0 · NaN where the row keeps nothing and a value is NaN
        to[d] = from_float<Element>(result.output_scale == 0.f ? 0.f : sum * result.output_scale);
      }
      if (x.lse != nullptr) {
        x.lse[(b * heads + h) * num_q + q_first + row] = result.lse;
      }
    }
  });
}

}  // namespace fastattn::cpu

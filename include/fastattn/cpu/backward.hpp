// The backward executor: gradients of q, k and v for any schedule, score and element type.
//
// Two passes of one shape. In the first a query tile stays and the key tiles it sees stream past (dq); in the second a
// key tile stays and the query tiles that see it stream past (dk, dv). Either way, with X the rows that stay and Y
// those that stream: S = X₁ Y₁ᵀ, dP = X₂ Y₂ᵀ, and the gradient of X₁ is dS Y₁, that of X₂ is P Y₂. Every gradient tile
// has one owner and one order of summation, so that the result does not depend on the threads; the price is seven
// matrix products instead of five.
#pragma once

#include "fastattn/cpu/forward.hpp"

namespace fastattn::cpu {

struct BackwardTensors {
  TensorView q, k, v, out, dout, dq, dk, dv;
  const float* lse;   // like the forward's; null for a score that has none
  const float* dlse;  // may be null
  float* dbias;       // [heads], may be null; for a score with a bias
  float* row_terms;   // workspace: two floats per query row
};

// What the backward needs of each query row: its log-sum-exp in base 2 and delta, Σ(out · dout) − dlse. A score without
// such statistics but with a bias has the sum of the row's score gradients in delta's place, after the first pass.
struct RowTerms {
  float *lse2, *delta;
};

FASTATTN_HD RowTerms row_terms_of(const BackwardTensors& x, std::int64_t b, std::int64_t h) {
  const std::int64_t first = (b * x.q.heads() + h) * x.q.seq();
  return {x.row_terms + first, x.row_terms + x.q.batch() * x.q.heads() * x.q.seq() + first};
}

// Rows that stay and rows that stream. 192 of the former are 3% faster but outgrow the L2 cache at head_dim 256.
inline constexpr TileShape kBackwardTile{96, 64};

template <class Isa, class Element>
void compute_row_terms(const BackwardTensors& x, const Threads& threads) {
  constexpr int kRows = 64;
  const int num_q = static_cast<int>(x.q.seq()), dim = static_cast<int>(x.q.head_dim());
  const std::int64_t heads = x.q.heads(), tiles = ceil_div(num_q, kRows);
  parallel_for(threads, x.q.batch() * heads * tiles, [&](std::int64_t task) {
    const int first = static_cast<int>(task % tiles) * kRows;
    const std::int64_t h = task / tiles % heads, b = task / tiles / heads;
    const RowTerms terms = row_terms_of(x, b, h);
    for (int i = first; i < min_of(first + kRows, num_q); ++i) {
      const std::int64_t row = (b * heads + h) * num_q + i;
      const Element *out = x.out.row<const Element>(b, i, h), *dout = x.dout.row<const Element>(b, i, h);
      Vector<Isa> sum(0.f);
      for (int d = 0; d < dim; d += Vector<Isa>::kWidth) {
        sum = fused_multiply_add(load_some<Isa>(out + d, dim - d), load_some<Isa>(dout + d, dim - d), sum);
      }
      const float lse = x.lse != nullptr ? x.lse[row] : 0.f, dlse = x.dlse != nullptr ? x.dlse[row] : 0.f;
      const bool empty = lse == -kInfinity;  // nothing kept: whatever arrives here, the gradients are zero
      terms.lse2[i] = empty ? kInfinity : lse * kLog2E;
      terms.delta[i] = empty ? 0.f : sum_of(sum) - dlse;
    }
  });
}

// Which side of the scores the rows that stay are on.
enum class Stays { kQueries, kKeys };

// One tile of rows that stay, with its share of the thread's scratch.
template <class Isa, Stays kStays>
struct GradientTile {
  static constexpr TileShape kTile = kBackwardTile;
  static constexpr int kTerms = max_of(kTile.q, kTile.k);
  static_assert(kTile.q % Isa::kRows == 0 && kTile.k % Vector<Isa>::kWidth == 0);
  static_assert(4 * (kTile.q + kTile.k) * kMaxHeadDim + 2 * kTile.q * kTile.k + 2 * kTerms <= kScratchFloats);

  int first, rows, dim, width;
  float *x1, *x2, *dx1, *dx2, *weights, *score_gradients, *stream1, *stream2, *stream1_columns, *stream2_columns, *lse2,
      *delta;

  GradientTile(int tile, int num_rows, int dim)
      : first(tile * kTile.q), rows(min_of(kTile.q, num_rows - first)), dim(dim), width(round_up<Isa>(dim)) {
    Scratch scratch;
    x1 = scratch.take(kTile.q * width);
    x2 = scratch.take(kTile.q * width);
    dx1 = scratch.take(kTile.q * width);
    dx2 = scratch.take(kTile.q * width);
    weights = scratch.take(kTile.q * kTile.k);
    score_gradients = scratch.take(kTile.q * kTile.k);
    stream1 = scratch.take(kTile.k * width);
    stream2 = scratch.take(kTile.k * width);
    stream1_columns = scratch.take(kTile.k * dim);
    stream2_columns = scratch.take(kTile.k * dim);
    lse2 = scratch.take(kTerms);
    delta = scratch.take(kTerms);
    for (int i = 0; i < kTile.q * width; ++i) {
      dx1[i] = dx2[i] = 0.f;
    }
  }

  // The terms of query rows [begin, begin + count), and those of rows without keys up to `size`.
  template <class Score>
  void load_terms(RowTerms terms, int begin, int count, int size) {
    for (int i = 0; i < size; ++i) {
      const bool known = Score::kRowStatistics && i < count;
      lse2[i] = known ? terms.lse2[begin + i] : kInfinity;
      delta[i] = known ? terms.delta[begin + i] : 0.f;
    }
  }

  // Adds what the rows of y1 and y2 that `schedule` pairs with this tile contribute.
  template <class Element, TileSchedule Schedule, class Score>
  void accumulate(const Schedule& schedule, const Score& score, Tokens<const Element> y1, Tokens<const Element> y2,
                  RowTerms terms) {
    using V = Vector<Isa>;
    for_each_tile(schedule, first / kTile.q, kTile, [&](int y_tile, auto coverage) {
      const int y_first = y_tile * kTile.k, count = min_of(kTile.k, schedule.num_k - y_first);
      const int columns = round_up<Isa>(count);
      const Panels<Isa> y1_rows{stream1, count, width}, y1_columns{stream1_columns, dim, columns};
      const Panels<Isa> y2_rows{stream2, count, width}, y2_columns{stream2_columns, dim, columns};
      pack_columns(y1_columns, y1, y_first, count);
      pack_columns(y2_columns, y2, y_first, count);
      pack_rows(y1_rows, y1, y_first, dim);
      if constexpr (kStays == Stays::kKeys) {
        pack_rows(y2_rows, y2, y_first, dim);
        load_terms<Score>(terms, y_first, count, columns);
      }
      // Runs ascend: the tile after this one most likely follows it.
      const int next = y_first + count, next_count = min_of(kTile.k, schedule.num_k - next);
      prefetch<Isa>(y1, next, next_count, dim);
      prefetch<Isa>(y2, next, next_count, dim);

      multiply<Isa, Update::kOverwrite>(x1, width, y1_columns, weights, kTile.k, rows);
      multiply<Isa, Update::kOverwrite>(x2, width, y2_columns, score_gradients, kTile.k, rows);
      const auto mask = schedule.tile_mask(first / kTile.q, y_tile, kTile);
      for (int row = 0; row < rows; ++row) {
        float *const w = weights + row * kTile.k, *const g = score_gradients + row * kTile.k;
        if constexpr (coverage() == Coverage::kPartial) {
          mask_row<Isa>(mask.row(row), w, columns);
        }
        V row_sum(0.f);
        for (int i = 0; i < columns; i += V::kWidth) {
          const V row_lse2 = kStays == Stays::kKeys ? V::load(lse2 + i) : V(lse2[row]);
          const V row_delta = kStays == Stays::kKeys ? V::load(delta + i) : V(delta[row]);
          const V weight = score.weight(row_lse2)(V::load(w + i));
          const V gradient = score.score_gradient(weight, V::load(g + i), row_delta);
          gradient.store(g + i);
          weight.store(w + i);
          row_sum = row_sum + gradient;
        }
        if constexpr (Score::kBiasGradient && kStays == Stays::kQueries) {
          delta[row] += sum_of(row_sum);  // the rows' deltas are not used otherwise
        }
      }
      multiply<Isa, Update::kAdd>(score_gradients, kTile.k, y1_rows, dx1, width, rows);
      if constexpr (kStays == Stays::kKeys) {
        multiply<Isa, Update::kAdd>(weights, kTile.k, y2_rows, dx2, width, rows);
      }
    });
  }

  template <class Element>
  void store(const float* gradient, Tokens<Element> to, float scale) const {
    for (int row = 0; row < rows; ++row) {
      for (int d = 0; d < dim; ++d) {
        to[first + row][d] = from_float<Element>(gradient[row * width + d] * scale);
      }
    }
  }
};

// `scale` is what multiplies q · k before the score policy's derivative applies.
template <class Isa, class Element, ScheduleFamily Schedules, class Score>
void backward(const BackwardTensors& x, const Schedules& schedules, const Score& scores_of_heads, float scale,
              const Threads& threads) {
  const int num_q = static_cast<int>(x.q.seq()), num_k = static_cast<int>(x.k.seq());
  const int dim = static_cast<int>(x.q.head_dim());
  const std::int64_t batch = x.k.batch(), heads = x.q.heads(), kv_heads = x.k.heads();
  const std::int64_t group = kv_heads > 0 ? heads / kv_heads : 0;

  if constexpr (Score::kRowStatistics) {
    compute_row_terms<Isa, Element>(x, threads);
  }

  const std::int64_t q_tiles = ceil_div(num_q, kBackwardTile.q);
  parallel_for(threads, batch * heads * q_tiles, [&](std::int64_t task) {
    const int q_tile = static_cast<int>(q_tiles - 1 - task % q_tiles);  // under a causal mask, the longest first
    const std::int64_t h = task / q_tiles % heads, b = task / q_tiles / heads;
    GradientTile<Isa, Stays::kQueries> tile(q_tile, num_q, dim);
    load_rows<Isa>(tile.x1, tokens_of<const Element>(x.q, b, h), tile.first, tile.rows, kBackwardTile.q, dim);
    load_rows<Isa>(tile.x2, tokens_of<const Element>(x.dout, b, h), tile.first, tile.rows, kBackwardTile.q, dim);
    tile.template load_terms<Score>(row_terms_of(x, b, h), tile.first, tile.rows, kBackwardTile.q);
    tile.accumulate(schedules.at(static_cast<int>(b), static_cast<int>(h)), scores_of_heads.at(static_cast<int>(h)),
                    tokens_of<const Element>(x.k, b, h / group), tokens_of<const Element>(x.v, b, h / group), {});
    tile.store(tile.dx1, tokens_of<Element>(x.dq, b, h), scale);
    if constexpr (Score::kBiasGradient) {
      const RowTerms sums = row_terms_of(x, b, h);
      for (int i = 0; i < tile.rows; ++i) {
        sums.delta[tile.first + i] = tile.delta[i];
      }
    }
  });
  if constexpr (Score::kBiasGradient) {
    for (std::int64_t h = 0; x.dbias != nullptr && h < heads; ++h) {
      double sum = 0.;  // over all rows, in their order
      for (std::int64_t b = 0; b < batch; ++b) {
        const RowTerms sums = row_terms_of(x, b, h);
        for (int i = 0; i < num_q; ++i) {
          sum += sums.delta[i];
        }
      }
      x.dbias[h] = static_cast<float>(sum);
    }
  }

  const std::int64_t k_tiles = ceil_div(num_k, kBackwardTile.q);
  parallel_for(threads, batch * kv_heads * k_tiles, [&](std::int64_t task) {
    const int k_tile = static_cast<int>(task % k_tiles);
    const std::int64_t h_kv = task / k_tiles % kv_heads, b = task / k_tiles / kv_heads;
    GradientTile<Isa, Stays::kKeys> tile(k_tile, num_k, dim);
    load_rows<Isa>(tile.x1, tokens_of<const Element>(x.k, b, h_kv), tile.first, tile.rows, kBackwardTile.q, dim);
    load_rows<Isa>(tile.x2, tokens_of<const Element>(x.v, b, h_kv), tile.first, tile.rows, kBackwardTile.q, dim);
    for (std::int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
      tile.accumulate(schedules.at(static_cast<int>(b), static_cast<int>(h)).transposed(),
                      scores_of_heads.at(static_cast<int>(h)), tokens_of<const Element>(x.q, b, h),
                      tokens_of<const Element>(x.dout, b, h), row_terms_of(x, b, h));
    }
    tile.store(tile.dx1, tokens_of<Element>(x.dk, b, h_kv), scale);
    tile.store(tile.dx2, tokens_of<Element>(x.dv, b, h_kv), 1.f);
  });
}

}  // namespace fastattn::cpu

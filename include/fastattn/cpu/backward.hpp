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
  TensorView q, k, v, out, dout;
  TensorView dq, dk, dv;  // one without data is not wanted
  const float* lse;       // like the forward's; null for a score that has none
  const float* dlse;      // may be null
  float* dbias;           // [heads], may be null; for a score with a bias
  float* row_terms;       // workspace: two floats per query row
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

// Rows that stay and rows that stream, for a schedule that leaves the choice. 192 of the former are 3% faster but
// outgrow the L2 cache at head_dim 256.
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
template <class Isa, TileShape kTile, Stays kStays>
struct GradientTile {
  static constexpr int kRows = padded_rows<Isa>(kTile.q), kTerms = max_of(kTile.q, kTile.k);
  static_assert(kTile.k % Vector<Isa>::kWidth == 0);
  static_assert(4 * (kRows + kTile.k) * kMaxHeadDim + 2 * kRows * kTile.k + 2 * kTerms <= kScratchFloats);

  int tile, rows, dim, width;
  TileTokens<kTile.q> tokens;
  float *x1, *x2, *dx1, *dx2, *weights, *score_gradients, *stream1, *stream2, *stream1_columns, *stream2_columns, *lse2,
      *delta;

  // `schedule` has the rows that stay for its queries, here and below.
  template <TileSchedule Schedule>
  GradientTile(const Schedule& schedule, int tile, int dim)
      : tile(tile),
        rows(min_of(kTile.q, schedule.num_q - tile * kTile.q)),
        dim(dim),
        width(round_up<Isa>(dim)),
        tokens(query_tokens<kTile>(schedule, tile)) {
    Scratch scratch;
    x1 = scratch.take(kRows * width);
    x2 = scratch.take(kRows * width);
    dx1 = scratch.take(kRows * width);
    dx2 = scratch.take(kRows * width);
    weights = scratch.take(kRows * kTile.k);
    score_gradients = scratch.take(kRows * kTile.k);
    stream1 = scratch.take(kTile.k * width);
    stream2 = scratch.take(kTile.k * width);
    stream1_columns = scratch.take(kTile.k * dim);
    stream2_columns = scratch.take(kTile.k * dim);
    lse2 = scratch.take(kTerms);
    delta = scratch.take(kTerms);
    for (int i = 0; i < kRows * width; ++i) {
      dx1[i] = dx2[i] = 0.f;
    }
  }

  template <class Element>
  void load(const TensorView& from1, const TensorView& from2, std::int64_t b, std::int64_t h) {
    load_rows<Isa>(x1, rows_of<const Element>(from1, b, h, tokens), dim);
    load_rows<Isa>(x2, rows_of<const Element>(from2, b, h, tokens), dim);
  }

  // The terms of queries; a slot without one has those of a row without keys.
  template <class Score, int kSlots>
  void load_terms(RowTerms terms, const TileTokens<kSlots>& queries) {
    for (int i = 0; i < kSlots; ++i) {
      const bool known = Score::kRowStatistics && queries[i] >= 0;
      lse2[i] = known ? terms.lse2[queries[i]] : kInfinity;
      delta[i] = known ? terms.delta[queries[i]] : 0.f;
    }
  }

  // Adds what the rows of head h in y1 and y2 that `schedule` pairs with this tile contribute.
  template <class Element, TileSchedule Schedule, class Score>
  void accumulate(const Schedule& schedule, const Score& score, const TensorView& y1, const TensorView& y2,
                  std::int64_t b, std::int64_t h, RowTerms terms) {
    using V = Vector<Isa>;
    KeyStream<Element, kTile, Schedule> stream{schedule, y1, y2, b, h};
    for_each_tile(schedule, tile, kTile, [&](int y_tile, auto coverage, std::uint16_t cells) {
      const int count = min_of(kTile.k, schedule.num_k - y_tile * kTile.k), columns = round_up<Isa>(count);
      const Panels<Isa> y1_rows{stream1, count, width}, y1_columns{stream1_columns, dim, columns};
      const Panels<Isa> y2_rows{stream2, count, width}, y2_columns{stream2_columns, dim, columns};
      stream.move_to(y_tile);
      pack_columns(y1_columns, stream.rows1);
      pack_columns(y2_columns, stream.rows2);
      pack_rows(y1_rows, stream.rows1, dim);
      if constexpr (kStays == Stays::kKeys) {
        pack_rows(y2_rows, stream.rows2, dim);
        load_terms<Score>(terms, stream.tokens);
      }
      stream.move_to(y_tile + 1);  // runs ascend: most likely the next one
      prefetch<Isa>(stream.rows1, dim);
      prefetch<Isa>(stream.rows2, dim);

      multiply<Isa, Update::kOverwrite>(x1, width, y1_columns, weights, kTile.k, rows);
      multiply<Isa, Update::kOverwrite>(x2, width, y2_columns, score_gradients, kTile.k, rows);
      const auto mask = schedule.tile_mask(tile, y_tile, kTile, cells);
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
  void store(const float* gradient, const TensorView& view, std::int64_t b, std::int64_t h, float scale) const {
    if (view.data == nullptr) {
      return;
    }
    const Rows to = rows_of<Element>(view, b, h, tokens);
    for (int row = 0; row < kTile.q; ++row) {
      for (int d = 0; to[row] != nullptr && d < dim; ++d) {
        to[row][d] = from_float<Element>(gradient[row * width + d] * scale);
      }
    }
  }
};

// `scale` is what multiplies q · k before the score policy's derivative applies.
template <class Isa, class Element, TileShape kTile = kBackwardTile, ScheduleFamily Schedules, class Score>
void backward(const BackwardTensors& x, const Schedules& schedules, const Score& scores_of_heads, float scale,
              const Threads& threads) {
  const ReversibleSchedule auto by_queries = schedules.slots();
  const auto by_keys = by_queries.transposed();
  const int num_q = static_cast<int>(x.q.seq()), dim = static_cast<int>(x.q.head_dim());
  const std::int64_t batch = x.k.batch(), heads = x.q.heads(), kv_heads = x.k.heads();
  const std::int64_t group = kv_heads > 0 ? heads / kv_heads : 0;

  if constexpr (Score::kRowStatistics) {
    compute_row_terms<Isa, Element>(x, threads);
  }

  const bool wants_dq = x.dq.data != nullptr, wants_dbias = x.dbias != nullptr;
  const std::int64_t q_tiles = wants_dq || wants_dbias ? ceil_div(by_queries.num_q, kTile.q) : 0;
  parallel_for(threads, batch * heads * q_tiles, [&](std::int64_t task) {
    const int q_tile = static_cast<int>(q_tiles - 1 - task % q_tiles);  // under a causal mask, the longest first
    const std::int64_t h = task / q_tiles % heads, b = task / q_tiles / heads;
    GradientTile<Isa, kTile, Stays::kQueries> tile(by_queries, q_tile, dim);
    tile.template load<Element>(x.q, x.dout, b, h);
    tile.template load_terms<Score>(row_terms_of(x, b, h), tile.tokens);
    tile.template accumulate<Element>(schedules.at(static_cast<int>(b), static_cast<int>(h)),
                                      scores_of_heads.at(static_cast<int>(h)), x.k, x.v, b, h / group, {});
    tile.template store<Element>(tile.dx1, x.dq, b, h, scale);
    if constexpr (Score::kBiasGradient) {
      const RowTerms sums = row_terms_of(x, b, h);
      for (int i = 0; i < kTile.q; ++i) {
        if (tile.tokens[i] >= 0) {
          sums.delta[tile.tokens[i]] = tile.delta[i];
        }
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

  const bool wants_dk = x.dk.data != nullptr, wants_dv = x.dv.data != nullptr;
  const std::int64_t k_tiles = wants_dk || wants_dv ? ceil_div(by_keys.num_q, kTile.q) : 0;
  parallel_for(threads, batch * kv_heads * k_tiles, [&](std::int64_t task) {
    const int k_tile = static_cast<int>(task % k_tiles);
    const std::int64_t h_kv = task / k_tiles % kv_heads, b = task / k_tiles / kv_heads;
    GradientTile<Isa, kTile, Stays::kKeys> tile(by_keys, k_tile, dim);
    tile.template load<Element>(x.k, x.v, b, h_kv);
    for (std::int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
      tile.template accumulate<Element>(schedules.at(static_cast<int>(b), static_cast<int>(h)).transposed(),
                                        scores_of_heads.at(static_cast<int>(h)), x.q, x.dout, b, h,
                                        row_terms_of(x, b, h));
    }
    tile.template store<Element>(tile.dx1, x.dk, b, h_kv, scale);
    tile.template store<Element>(tile.dx2, x.dv, b, h_kv, 1.f);
  });
}

}  // namespace fastattn::cpu

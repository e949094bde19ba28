// The backward executor: gradients of q, k and v for any schedule, score and element type.
//
// Two passes of one shape. In the first a query tile stays and the key tiles it sees stream past (dq); in the second a
// key tile stays and the query tiles that see it stream past (dk, dv). Either way, with X the rows that stay and Y
// those that stream: S = X₁ Y₁ᵀ, dP = X₂ Y₂ᵀ, and the gradient of X₁ is dS Y₁, that of X₂ is P Y₂. Every gradient tile
// has one owner and one order of summation, so that the result does not depend on the threads; the price is seven
// matrix products instead of five. What is not wanted is left out: a pass, or the products of one.
#pragma once

#include "fastattn/cpu/forward.hpp"

namespace fastattn::cpu {

struct BackwardTensors {
  TensorView q, k, v, out, dout;
  TensorView dq, dk, dv;        // one without data is not wanted
  const float* lse = nullptr;   // like the forward's; null for a score that has none
  const float* dlse = nullptr;  // may be null
  float* dbias = nullptr;       // [heads], may be null; for a score with a bias
  float* dkey_bias = nullptr;   // [batch, heads, seq_k], may be null; for scores that are modified
  ScoreModifier modifier = {};  // of these
  float* row_terms;             // workspace: two floats per query row
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

// Rows that stay and rows that stream, for a schedule that leaves the choice. The packing of what streams is shared by
// those that stay: 192 of them are up to 7% faster, but make half the tasks. Results are the same bit for bit.
inline constexpr TileShape kBackwardTile{96, 64}, kWideBackwardTile{192, 64};

// Are there so many wide tiles that no thread is left without?
FASTATTN_HD bool suits_wide_tiles(const TensorView& q, const TensorView& k) {
  constexpr std::int64_t kEnough = 64, kRows = kWideBackwardTile.q;
  return q.batch() * q.heads() * ceil_div(q.seq(), kRows) >= kEnough &&
         k.batch() * k.heads() * ceil_div(k.seq(), kRows) >= kEnough;
}

FASTATTN_HD constexpr TileShape transposed(TileShape tile) { return {tile.k, tile.q}; }

template <class Isa, class Element>
void compute_row_terms(const BackwardTensors& x, const Threads& threads) {
  constexpr int kRows = 64;
  const int num_q = static_cast<int>(x.q.seq()), dim = static_cast<int>(x.dout.head_dim());
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

// One tile of rows that stay, with its share of the thread's scratch. kModified: the scores are.
template <class Isa, class Element, TileShape kTile, Stays kStays, bool kModified>
struct GradientTile {
  using V = Vector<Isa>;
  static constexpr bool kKeysStay = kStays == Stays::kKeys;
  static constexpr int kRows = padded_rows<Isa>(kTile.q), kTerms = max_of(kTile.q, kTile.k);
  static_assert(kTile.k % V::kWidth == 0);
  static_assert(4 * (kRows + kTile.k) * kMaxHeadDim + 2 * kRows * kTile.k + 3 * kTerms + kRows <= kScratchFloats);

  const BackwardTensors& x;
  std::int64_t b;
  int tile, rows;
  int dim1, dim2, width1, width2;              // of queries and keys, and of values
  bool wants_dx1, wants_dx2, wants_gradients;  // the last of scores
  TileTokens<kTile.q> tokens;
  float *x1, *x2, *dx1, *dx2, *weights, *score_gradients, *stream1, *stream2, *stream1_columns, *stream2_columns, *lse2,
      *delta, *bias;
  float* gradient_sums;         // of scores, in each row since clear_sums(), for a score with a bias or a bias of keys
  bool has_scores[kRows] = {};  // does a row have a share in any?

  // `schedule` has the rows that stay for its queries, here and below.
  template <TileSchedule Schedule>
  GradientTile(const BackwardTensors& x, const Schedule& schedule, std::int64_t b, int tile)
      : x(x),
        b(b),
        tile(tile),
        rows(min_of(kTile.q, schedule.num_q - tile * kTile.q)),
        dim1(static_cast<int>(x.q.head_dim())),
        dim2(static_cast<int>(x.v.head_dim())),
        width1(round_up<Isa>(dim1)),
        width2(round_up<Isa>(dim2)),
        wants_dx1((kKeysStay ? x.dk : x.dq).data != nullptr),
        wants_dx2(kKeysStay && x.dv.data != nullptr),
        wants_gradients(!kKeysStay || wants_dx1 || x.dkey_bias != nullptr),
        tokens(query_tokens<kTile>(schedule, tile)) {
    Scratch scratch;
    x1 = scratch.take(kRows * width1);
    x2 = scratch.take(kRows * width2);
    dx1 = scratch.take(kRows * width1);
    dx2 = scratch.take(kRows * width2);
    weights = scratch.take(kRows * kTile.k);
    score_gradients = scratch.take(kRows * kTile.k);
    stream1 = scratch.take(kTile.k * width1);
    stream2 = scratch.take(kTile.k * width2);
    stream1_columns = scratch.take(kTile.k * dim1);
    stream2_columns = scratch.take(kTile.k * dim2);
    lse2 = scratch.take(kTerms);
    delta = scratch.take(kTerms);
    bias = scratch.take(kTerms);
    gradient_sums = scratch.take(kRows);
    clear(dx1, kRows * width1);
    clear(dx2, kRows * width2);
    clear_sums();
  }

  static void clear(float* values, int count) {
    for (int i = 0; i < count; ++i) {
      values[i] = 0.f;
    }
  }
  void clear_sums() { clear(gradient_sums, kRows); }

  void load(const TensorView& from1, const TensorView& from2, std::int64_t h) {
    load_rows<Isa>(x1, rows_of<const Element>(from1, b, h, tokens), dim1);
    if (wants_gradients) {
      load_rows<Isa>(x2, rows_of<const Element>(from2, b, h, tokens), dim2);
    }
  }

  // The terms of queries; a slot without one has those of a row without keys.
  template <class Score, int kSlots>
  void load_terms(std::int64_t h, const TileTokens<kSlots>& queries) {
    const RowTerms terms = row_terms_of(x, b, h);
    for (int i = 0; i < kSlots; ++i) {
      const bool known = Score::kRowStatistics && queries[i] >= 0;
      lse2[i] = known ? terms.lse2[queries[i]] : kInfinity;
      delta[i] = known ? terms.delta[queries[i]] : 0.f;
    }
  }

  // The biases of keys for query head h, in units of log 2.
  template <int kSlots>
  void load_biases(std::int64_t h, const TileTokens<kSlots>& keys) {
    const KeyBias& all = x.modifier.key_bias;
    const float* const of_head = all.bias == nullptr ? nullptr : all.bias + all.index(b, h) * padded_tokens(x.k.seq());
    for (int i = 0; i < kSlots; ++i) {
      bias[i] = of_head != nullptr && keys[i] >= 0 ? of_head[keys[i]] * kLog2E : 0.f;
    }
  }

  // The scores of a row of products, in units of log 2, and what the cap leaves of their gradients.
  void modify(int row, float* products, float* slopes, int columns) const {
    const V scale(x.modifier.scale_log2());
    const Softcap cap = x.modifier.cap();
    for (int i = 0; i < columns; i += V::kWidth) {
      V score = V::load(products + i), slope(1.f);
      if (x.modifier.softcap == 0.f) {
        score = score * scale;
      } else {
        score = cap(score);
        slope = cap.slope(score);
      }
      (score + (kKeysStay ? V(bias[row]) : V::load(bias + i))).store(products + i);
      slope.store(slopes + i);
    }
  }

  // Adds what the rows that `schedule` pairs with this tile contribute: those of head h_stream in y1 and y2, and the
  // scores of query head h.
  template <TileSchedule Schedule, class Score>
  void accumulate(const Schedule& schedule, const Score& score, const TensorView& y1, const TensorView& y2,
                  std::int64_t h_stream, std::int64_t h) {
    KeyStream<Element, kTile, Schedule> stream{schedule, y1, y2, b, h_stream};
    for_each_tile(schedule, tile, kTile, [&](int y_tile, auto coverage, std::uint16_t cells) {
      // Rows that are not there are zeros, and so are their weights.
      const int columns = round_up<Isa>(min_of(kTile.k, schedule.num_k - y_tile * kTile.k));
      const Panels<Isa> y1_rows{stream1, columns, width1}, y1_columns{stream1_columns, dim1, columns};
      const Panels<Isa> y2_rows{stream2, columns, width2}, y2_columns{stream2_columns, dim2, columns};
      stream.move_to(y_tile);
      pack_columns(y1_columns, stream.rows1, wants_dx1 ? &y1_rows : nullptr);
      if (wants_gradients) {
        pack_columns(y2_columns, stream.rows2, wants_dx2 ? &y2_rows : nullptr);
      } else {
        pack_rows(y2_rows, stream.rows2, dim2);
      }
      if constexpr (kKeysStay) {
        load_terms<Score>(h, stream.tokens);
      } else if constexpr (kModified) {
        load_biases(h, stream.tokens);
      }
      stream.move_to(y_tile + 1);  // runs ascend: most likely the next one
      prefetch<Isa>(stream.rows1, dim1);
      prefetch<Isa>(stream.rows2, dim2);

      multiply<Isa, Update::kOverwrite>(x1, width1, y1_columns, weights, kTile.k, rows);
      if (wants_gradients) {
        multiply<Isa, Update::kOverwrite>(x2, width2, y2_columns, score_gradients, kTile.k, rows);
      }
      const auto mask = schedule.tile_mask(tile, y_tile, kTile, cells);
      for (int row = 0; row < rows; ++row) {
        float *const w = weights + row * kTile.k, *const g = score_gradients + row * kTile.k;
        [[maybe_unused]] float slopes[kTile.k];
        if constexpr (kModified) {
          modify(row, w, slopes, columns);
        }
        if constexpr (coverage() == Coverage::kPartial) {
          mask_row<Isa>(mask.row(row), w, columns);
        }
        V weight_sum(0.f), gradient_sum(0.f);
        for (int i = 0; i < columns; i += V::kWidth) {
          const V row_lse2 = kKeysStay ? V::load(lse2 + i) : V(lse2[row]);
          const V weight = score.weight(row_lse2)(V::load(w + i));
          weight.store(w + i);
          weight_sum = weight_sum + weight;
          if (wants_gradients) {
            const V row_delta = kKeysStay ? V::load(delta + i) : V(delta[row]);
            // 0 · NaN where a score that is masked belongs to a value of NaN
            V gradient = where_zero(weight, V(0.f), score.score_gradient(weight, V::load(g + i), row_delta));
            gradient_sum = gradient_sum + gradient;
            if constexpr (kModified) {
              gradient = gradient * V::load(slopes + i);
            }
            gradient.store(g + i);
          }
        }
        constexpr bool kAll = coverage() == Coverage::kFull && !kModified;
        has_scores[row] = kAll || has_scores[row] || sum_of(weight_sum) != 0.f;
        if constexpr (Score::kBiasGradient || kModified) {
          gradient_sums[row] += sum_of(gradient_sum);
        }
      }
      if (wants_dx1) {
        multiply<Isa, Update::kAdd>(score_gradients, kTile.k, y1_rows, dx1, width1, rows);
      }
      if (wants_dx2) {
        multiply<Isa, Update::kAdd>(weights, kTile.k, y2_rows, dx2, width2, rows);
      }
    });
  }

  // Of all slots, those among them whose tokens are not used.
  template <TileSchedule Schedule>
  void store(const Schedule& schedule, const float* gradient, int width, const TensorView& view, std::int64_t h,
             float scale) const {
    for (int row = 0; row < rows; ++row) {
      const int token = schedule.query_token(tile, row, kTile);
      if (token < 0) {
        continue;
      }
      Element* const to = view.row<Element>(b, token, h);
      for (int d = 0; d < static_cast<int>(view.head_dim()); ++d) {
        // 0 · NaN where nothing is kept and what streamed past is NaN
        to[d] = from_float<Element>(has_scores[row] ? gradient[row * width + d] * scale : 0.f);
      }
    }
  }
  template <TileSchedule Schedule>
  void store_dx1(const Schedule& schedule, const TensorView& view, std::int64_t h, float scale) const {
    if (wants_dx1) {
      store(schedule, dx1, width1, view, h, scale);
    }
  }
  template <TileSchedule Schedule>
  void store_dx2(const Schedule& schedule, const TensorView& view, std::int64_t h) const {
    if (wants_dx2) {
      store(schedule, dx2, width2, view, h, 1.f);
    }
  }

  // The sums of score gradients, of one row each, to a line of tokens.
  template <TileSchedule Schedule>
  void store_sums(const Schedule& schedule, float* to) const {
    for (int row = 0; row < rows; ++row) {
      if (const int token = schedule.query_token(tile, row, kTile); token >= 0) {
        to[token] = gradient_sums[row];
      }
    }
  }
};

// `scale` is what multiplies q · k before the score policy's derivative applies.
template <class Isa, class Element, TileShape kTile = kBackwardTile, bool kModified = false, ScheduleFamily Schedules,
          class Score>
void backward(const BackwardTensors& x, const Schedules& schedules, const Score& scores_of_heads, float scale,
              const Threads& threads) {
  const std::int64_t batch = x.k.batch(), heads = x.q.heads(), kv_heads = x.k.heads();
  const std::int64_t group = kv_heads > 0 ? heads / kv_heads : 0;

  if constexpr (Score::kRowStatistics) {
    compute_row_terms<Isa, Element>(x, threads);
  }

  const bool queries_stay = x.dq.data != nullptr || x.dbias != nullptr;
  const std::int64_t q_tiles = queries_stay ? num_q_tiles(schedules, kTile) : 0;
  parallel_for(threads, batch * heads * q_tiles, [&](std::int64_t task) {
    // Under a causal mask, the longest first.
    const int h = static_cast<int>(task / q_tiles % heads), entry = static_cast<int>(task / q_tiles / heads);
    const SequenceTile at = sequence_tile(schedules, entry, static_cast<int>(q_tiles - 1 - task % q_tiles), kTile);
    const ReversibleSchedule auto schedule = schedules.at(at.sequence, h);
    if (at.q_tile * kTile.q >= schedule.num_q) {
      return;
    }
    const int b = batch_of(schedules, at.sequence);
    GradientTile<Isa, Element, kTile, Stays::kQueries, kModified> tile(x, schedule, b, at.q_tile);
    tile.load(x.q, x.dout, h);
    tile.template load_terms<Score>(h, tile.tokens);
    tile.accumulate(schedule, scores_of_heads.at(h), x.k, x.v, h / group, h);
    tile.store_dx1(schedule, x.dq, h, scale);
    if constexpr (Score::kBiasGradient) {
      tile.store_sums(schedule, row_terms_of(x, b, h).delta);
    }
  });
  if constexpr (Score::kBiasGradient) {
    for (std::int64_t h = 0; x.dbias != nullptr && h < heads; ++h) {
      double sum = 0.;  // over all rows, in their order
      for (std::int64_t b = 0; b < batch; ++b) {
        const RowTerms sums = row_terms_of(x, b, h);
        for (std::int64_t i = 0; i < x.q.seq(); ++i) {
          sum += sums.delta[i];
        }
      }
      x.dbias[h] = static_cast<float>(sum);
    }
  }

  const bool keys_stay = x.dk.data != nullptr || x.dv.data != nullptr || x.dkey_bias != nullptr;
  const std::int64_t k_tiles = keys_stay ? num_k_tiles(schedules, transposed(kTile)) : 0;
  parallel_for(threads, batch * kv_heads * k_tiles, [&](std::int64_t task) {
    const int h_kv = static_cast<int>(task / k_tiles % kv_heads), entry = static_cast<int>(task / k_tiles / kv_heads);
    const SequenceKeyTile at = sequence_key_tile(schedules, entry, static_cast<int>(task % k_tiles), transposed(kTile));
    const auto slots = slots_of(schedules, at.sequence).transposed();
    if (at.k_tile * kTile.q >= slots.num_q) {
      return;
    }
    const int b = batch_of(schedules, at.sequence);
    GradientTile<Isa, Element, kTile, Stays::kKeys, kModified> tile(x, slots, b, at.k_tile);
    tile.load(x.k, x.v, h_kv);
    for (int h = h_kv * static_cast<int>(group); h < (h_kv + 1) * group; ++h) {
      tile.clear_sums();
      if constexpr (kModified) {
        tile.load_biases(h, tile.tokens);
      }
      tile.accumulate(schedules.at(at.sequence, h).transposed(), scores_of_heads.at(h), x.q, x.dout, h, h);
      if (x.dkey_bias != nullptr) {
        tile.store_sums(slots, x.dkey_bias + (b * heads + h) * x.k.seq());
      }
    }
    tile.store_dx1(slots, x.dk, h_kv, scale);
    tile.store_dx2(slots, x.dv, h_kv);
  });
}

}  // namespace fastattn::cpu

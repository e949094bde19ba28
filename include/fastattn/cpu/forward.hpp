// The forward executor: what the Hopper kernel does, tile by tile, for any schedule, score and operands.
#pragma once

#include "fastattn/cpu/matrix_product.hpp"
#include "fastattn/cpu/operands.hpp"
#include "fastattn/cpu/parallel.hpp"
#include "fastattn/schedule/schedule.hpp"
#include "fastattn/score/score.hpp"

namespace fastattn::cpu {

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

template <class Isa, TileShape kTile = kForwardTile, class Operands, ScheduleFamily Schedules, class Score>
void forward(const Operands& x, const Schedules& schedules, const Score& scores_of_heads, const Threads& threads) {
  constexpr int kRows = padded_rows<Isa>(kTile.q);
  static_assert(kTile.k % Vector<Isa>::kWidth == 0);
  static_assert(2 * (kRows + kTile.k) * kMaxHeadDim + kRows * kTile.k <= kScratchFloats);
  const int dim = static_cast<int>(x.q.head_dim()), width = round_up<Isa>(dim);
  const int value_width = round_up<Isa>(static_cast<int>(x.out.head_dim()));
  const std::int64_t heads = x.q.heads(), q_tiles = num_q_tiles(schedules, kTile);

  parallel_for(threads, x.q.batch() * heads * q_tiles, [&](std::int64_t task) {
    // The last query tiles of a head first: under a causal mask they are the longest.
    const int h = static_cast<int>(task / q_tiles % heads), entry = static_cast<int>(task / q_tiles / heads);
    const SequenceTile tile = sequence_tile(schedules, entry, static_cast<int>(q_tiles - 1 - task % q_tiles), kTile);
    const auto schedule = schedules.at(tile.sequence, h);
    const int q_tile = tile.q_tile, b = batch_of(schedules, tile.sequence);
    const int rows = min_of(kTile.q, schedule.num_q - q_tile * kTile.q);
    if (rows <= 0) {
      return;
    }
    const Score score = scores_of_heads.at(h);
    using Head = typename Operands::template Head<Isa, kTile, std::remove_const_t<decltype(schedule)>>;
    Head head(x, schedule, b, h);

    Scratch scratch;
    float* q = scratch.take(kRows * width);
    float* out = scratch.take(kRows * value_width);
    float* scores = scratch.take(kRows * kTile.k);
    float* keys = scratch.take(dim * kTile.k);
    float* values = scratch.take(kTile.k * value_width);
    float decay[kRows] = {};
    typename Score::State state[kTile.q] = {};

    head.load_queries(q, query_tokens<kTile>(schedule, q_tile));
    for (int i = 0; i < kRows * value_width; ++i) {
      out[i] = 0.f;
    }
    for_each_tile(schedule, q_tile, kTile, [&](int k_tile, auto coverage, std::uint16_t cells) {
      const int count = min_of(kTile.k, schedule.num_k - k_tile * kTile.k), columns = Head::columns(count);
      const Panels<Isa> k{keys, dim, columns}, v{values, Head::depth(count), value_width};
      head.load_keys_and_values(k_tile, k, v);

      multiply<Isa, Update::kOverwrite>(q, width, k, scores, kTile.k, rows);
      const auto mask = schedule.tile_mask(q_tile, k_tile, kTile, cells);
      for (int row = 0; row < rows; ++row) {
        float* const row_scores = scores + row * kTile.k;
        head.to_scores(row, row_scores, columns);
        if constexpr (coverage() == Coverage::kPartial) {
          mask_row<Isa>(mask.row(row), row_scores, columns);
        }
        decay[row] = score.absorb(state[row], head.row(row_scores, columns));
        head.to_weights(state[row], row_scores, columns);
      }
      constexpr Update kUpdate = Score::kRescales ? Update::kScaleAndAdd : Update::kAdd;
      multiply<Isa, kUpdate>(scores, kTile.k, v, out, value_width, rows, decay);
    });

    for (int row = 0; row < rows; ++row) {
      if (const int token = schedule.query_token(q_tile, row, kTile); token >= 0) {
        head.store(token, out + row * value_width, score.finish(state[row], Identity{}));
      }
    }
  });
}

}  // namespace fastattn::cpu

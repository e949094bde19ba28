// The executor of estimate_blocks: products of low-bit integers, which floats hold exactly, against a floor.
#pragma once

#include "fastattn/cpu/matrix_product.hpp"
#include "fastattn/operand/low_bit.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/schedule/sink_and_window.hpp"

namespace fastattn::cpu {

inline constexpr int kMaxBlockSide = 128;

// What a key adds to the products of queries with it.
struct KeyTerms {
  float scale[kMaxBlockSide], term[kMaxBlockSide];
};

// Is one of these scores of a query that `keeps` leaves not below the floor? In every term the order of operations is
// the op's definition. The loop has no branch and becomes vectors.
template <class Isa, class Keeps>
bool reaches_floor(const float* sums, const KeyTerms& keys, float query_scale, float floor, int count, Keeps keeps) {
  int reached = 0;
  for (int k = 0; k < count; ++k) {
    const float score = fused_multiply_add(query_scale * keys.scale[k], sums[k], keys.term[k]);
    reached |= static_cast<int>(!(score < floor)) & static_cast<int>(keeps(k));
  }
  return reached != 0;
}

// Behind the `count` entries of a row, which ascend, the other numbers below `width`.
template <class Isa>
void append_others(std::int32_t* row, int count, int width) {
  for (int number = width - 1, place = width - 1, last = count - 1; place >= count; --number) {
    if (last >= 0 && row[last] == number) {
      --last;
    } else {
      row[place--] = number;
    }
  }
}

template <class Isa>
void estimate_blocks(const EstimateBlocks& p, const Threads& threads) {
  constexpr int kRows = padded_rows<Isa>(kMaxBlockSide);
  constexpr int kQueriesAtOnce = 4 * Isa::kRows;  // what is computed of a block before it may turn out to be listed
  static_assert(kMaxHeadDim * (kRows + kMaxBlockSide) + kQueriesAtOnce * kMaxBlockSide <= kScratchFloats);
  static_assert(kMaxHeadDim * Int8::kLargest * Int8::kLargest <= 0x1p24f);  // sums are exact
  const int num_q = static_cast<int>(p.seq_q), num_k = static_cast<int>(p.k.seq());
  const int stride = static_cast<int>(p.query_stride), judged = static_cast<int>(p.q.seq());
  const int blocks_q = ceil_div(num_q, p.block.q), blocks_k = ceil_div(num_k, p.block.k);
  const int dim = static_cast<int>(p.q.head_dim()), width = round_up<Isa>(dim);
  const std::int64_t heads = p.q.heads(), kv_heads = p.k.heads(), groups = num_groups(num_k, p.group);
  const Band band{num_q, num_k, num_k, p.causal ? 0 : num_q};

  parallel_for(threads, p.q.batch() * heads * blocks_q, [&](std::int64_t task) {
    // The last rows of a head first: under a causal mask they are the longest.
    const int row = static_cast<int>(blocks_q - 1 - task % blocks_q);
    const std::int64_t h = task / blocks_q % heads, b = task / blocks_q / heads, own = b * heads + h;
    const std::int64_t kv_head = h / (heads / kv_heads);
    const int first = row * (p.block.q / stride), queries = min_of(p.block.q / stride, judged - first);

    Scratch scratch;
    float* const q = scratch.take(kRows * width);
    float* const sums = scratch.take(kQueriesAtOnce * kMaxBlockSide);
    float* const key_columns = scratch.take(dim * kMaxBlockSide);
    load_rows<Isa>(q, rows_of<const std::int8_t>(p.q, b, h, tokens_of_box<kRows>(first, 0, first + queries)), dim);
    const float* const q_scales = p.q_scales + own * judged + first;
    const float* const floors = p.floor + own * judged + first;

    KeyTerms keys;
    const auto load_keys = [&](int first_key, int count) {
      const Panels<Isa> columns{key_columns, dim, round_up<Isa>(count)};
      const TileTokens tokens = tokens_of_box<kMaxBlockSide>(first_key, 0, first_key + count);
      pack_columns(columns, rows_of<const std::int8_t>(p.k, b, kv_head, tokens));
      const float* const scales = p.k_scales + (b * kv_heads + kv_head) * groups;
      for (int i = 0; i < count; ++i) {
        keys.scale[i] = scales[group_of(first_key + i, p.group)];
        keys.term[i] = p.key_term == nullptr ? 0.f : p.key_term[own * padded_tokens(num_k) + first_key + i];
      }
      return columns;
    };

    const SinkAndWindow near = sink_and_window(row, num_q, num_k, p.block, p.sink, p.window);
    std::int32_t* const listed = p.indices + (own * blocks_q + row) * blocks_k;
    int count = 0;
    for_each_tile(band, row, p.block, [&](int column, auto coverage, std::uint16_t cells) {
      bool reached = near.contains(column);
      if (!reached) {
        const int first_key = column * p.block.k, num_keys = min_of(p.block.k, num_k - first_key);
        const Panels<Isa> columns = load_keys(first_key, num_keys);
        const auto mask = band.tile_mask(row, column, p.block, cells);
        for (int part = 0; part < queries && !reached; part += kQueriesAtOnce) {
          const int end = min_of(part + kQueriesAtOnce, queries);
          multiply<Isa, Update::kOverwrite>(q + part * width, width, columns, sums, kMaxBlockSide, end - part);
          for (int i = part; i < end && !reached; ++i) {
            const auto keeps = [&, row_mask = mask.row(i * stride)](int k) {
              return coverage() == Coverage::kFull || row_mask.keeps(k);
            };
            reached = reaches_floor<Isa>(sums + (i - part) * kMaxBlockSide, keys, p.scale * q_scales[i], floors[i],
                                         num_keys, keeps);
          }
        }
      }
      if (reached) {
        listed[count++] = column;
      }
    });
    p.counts[own * blocks_q + row] = count;
    append_others<Isa>(listed, count, blocks_k);
  });
}

}  // namespace fastattn::cpu

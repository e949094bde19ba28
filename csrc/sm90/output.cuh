// Epilogues: what leaves the chip. Here the output, scaled and rounded, with or without each row's log-sum-exp.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "fastattn/fastattn.hpp"
#include "fastattn/score/score.hpp"
#include "sm90/accumulator.cuh"

namespace fastattn::sm90 {

// Rounds the accumulator of one warpgroup and writes its 64 rows to the tokens token_of(row) of a head, from column
// `first_column` on, by way of rows [first_row, first_row + 64) of `staging`: the lanes of a panel's row write
// its consecutive bytes.
// Rows with token −1 and columns past the head's are not written. Named barrier `barrier` is used, by this warpgroup
// alone.
template <class Element, class Tile, int kCount, class TokenOf>
__device__ void store_rows(const float (&value)[kCount], Tile& staging, int first_row, int thread, int barrier,
                           const TensorView& to, std::int64_t batch, std::int64_t head, int first_column,
                           TokenOf&& token_of) {
  constexpr int kUnits = Tile::kUnits, kElements = 16 / sizeof(Element);
  std::uint32_t rounded[kCount / 2];
  pack<Element>(value, rounded);
  store_packed(rounded, staging, first_row, thread);
  cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, barrier);
  const int unit = thread % kUnits;
#pragma unroll
  for (int i = 0; i < kWarpgroupRows * kUnits / kWarpgroupThreads; ++i) {
    const int row = i * (kWarpgroupThreads / kUnits) + thread / kUnits;
    const int token = token_of(row);
    if (token < 0) {
      continue;
    }
    Element* const address = to.row<Element>(batch, token, head);
    const int shared_row = first_row + row;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int column = first_column + panel * Tile::kPanelColumns + unit * kElements;
      if (column < to.head_dim()) {
        *reinterpret_cast<uint4*>(address + column) =
            *reinterpret_cast<const uint4*>(staging.panel(panel) + Tile::unit_offset(shared_row, unit));
      }
    }
  }
}

template <class Element, bool kWithLse>
struct Output {
  TensorView out;
  float* lse;  // [batch, heads, tokens]; unused without

  // Stores the 64 rows of one warpgroup; `rows` are this thread's two. Named barrier `warpgroup` is used.
  template <class Tile, int kCount, class TokenOf>
  __device__ void store(float (&value)[kCount], const RowResult (&rows)[2], Tile& staging, int warpgroup, int batch,
                        int head, TokenOf&& token_of) const {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] *= rows[i / 2 % 2].output_scale;
    }
    if constexpr (kWithLse) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = token_of(at.row(h));
        if (at.first_column == 0 && token >= 0) {
          lse[(batch * out.heads() + head) * out.seq() + token] = rows[h].lse;
        }
      }
    }
    store_rows<Element>(value, staging, warpgroup * kWarpgroupRows, thread, warpgroup, out, batch, head, 0, token_of);
  }
};

// The output of values with a scale and a mean for each channel, or without, and of tokens that may have another order.
struct QuantizedOutput {
  TensorView out;                  // of 16 bits
  float* lse;                      // [batch, heads, tokens]
  const float *v_scales, *v_mean;  // [batch, kv_heads, head_dim]; null: without
  int heads_per_kv_head;
  Permutation order;

  template <class Tile, int kCount, class TokenOf>
  __device__ void store(float (&value)[kCount], const RowResult (&rows)[2], Tile& staging, int warpgroup, int batch,
                        int head, TokenOf&& token_of) const {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
    const std::int64_t row = std::int64_t{batch} * out.heads() + head;
    const int dim = static_cast<int>(out.head_dim());
    const auto of_channels = [&](const float* x) { return x == nullptr ? nullptr : x + row / heads_per_kv_head * dim; };
    const float *const scales = of_channels(v_scales), *const mean = of_channels(v_mean);
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int channel = at.column(j) + e;
        const float scale = scales == nullptr || channel >= dim ? 1.f : scales[channel];
        const float centre = mean == nullptr || channel >= dim ? 0.f : mean[channel];
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // a row that keeps nothing is 0, whatever the scale
          float& sum = value[4 * j + 2 * h + e];
          sum = rows[h].output_scale == 0.f ? 0.f : sum * (rows[h].output_scale * scale) + centre;
        }
      }
    }
    const std::int32_t* const own_order = order.row(batch, head, out.seq());
    const auto place_of = [&](int row) {
      const int token = token_of(row);
      return token < 0 ? -1 : token_at(own_order, token, static_cast<int>(out.seq()));
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = place_of(at.row(h));
      if (at.first_column == 0 && token >= 0 && lse != nullptr) {
        lse[row * out.seq() + token] = rows[h].lse;
      }
    }
    const int first_row = warpgroup * kWarpgroupRows;
    if (out.dtype == DType::kBFloat16) {
      store_rows<BFloat16>(value, staging, first_row, thread, warpgroup, out, batch, head, 0, place_of);
    } else {
      store_rows<Float16>(value, staging, first_row, thread, warpgroup, out, batch, head, 0, place_of);
    }
  }
};

}  // namespace fastattn::sm90

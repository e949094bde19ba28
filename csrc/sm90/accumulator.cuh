// The 64 × kColumns accumulator of one warpgroup's products, and what is done with it outside the tensor cores.
#pragma once

#include <cstdint>

#include "fastattn/portable.hpp"
#include "fastattn/score/score.hpp"
#include "sm90/shared_tile.cuh"
#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

// Thread t of a warpgroup holds rows row(0) = 16 · warp + lane / 4 and row(1) = row(0) + 8; register 4 · j + 2 · h + e
// is column 8 · j + 2 · (lane % 4) + e of row(h).
struct AccumulatorThread {
  int first_row, first_column;

  __device__ explicit AccumulatorThread(int thread)
      : first_row(thread / 32 * 16 + thread % 32 / 4), first_column(thread % 4 * 2) {}
  __device__ int row(int h) const { return first_row + 8 * h; }
  __device__ int column(int j) const { return first_column + 8 * j; }
};

// Which scores of a tile this thread keeps: a word for each of its rows (see lane_bits).
struct KeptBits {
  std::uint32_t row[2];

  // Writes `dropped` over the other scores.
  template <int kCount>
  __device__ void apply(float (&scores)[kCount], float dropped) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scores[i] = (row[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1) != 0 ? scores[i] : dropped;
    }
  }
};

// Row 0 of the accumulator is `first_row` of the tile. Best asked for while few registers are in use.
template <class TileMask>
__device__ inline KeptBits kept_bits(const TileMask& mask, int first_row, AccumulatorThread at) {
  return {mask.row(first_row + at.row(0)).lane_bits(at.first_column),
          mask.row(first_row + at.row(1)).lane_bits(at.first_column)};
}

// Applies functions of one type to this thread's scores: replace(step) is to put step(function, score) in the place of
// each. A shortcut is taken if it holds for all scores of the warp.
template <class Function, class Replace>
__device__ inline auto apply_to_scores(Replace&& replace) {
  if constexpr (HasShortcut<Function>) {
    constexpr ArgumentBit kShortcut = Function::kShortcut;
    std::uint32_t others = 0;  // the bits that differ from it in some argument: three operands are one instruction
    replace([&](const Function& function, float score) {
      const float argument = function.argument(score);
      others |= kShortcut.value ? ~__float_as_uint(argument) : __float_as_uint(argument);
      return argument;
    });
    if (__all_sync(0xffffffffu, (others >> kShortcut.index & 1) == 0)) {
      return replace([](const Function& function, float argument) { return function.shortcut(argument); });
    }
    return replace([](const Function& function, float argument) { return function.general(argument); });
  } else {
    return replace([](const Function& function, float score) { return function(score); });
  }
}

// A row of this thread as a score policy sees it (see fastattn/score/score.hpp): four lanes share it.
template <int kCount>
struct AccumulatorRow {
  float (&value)[kCount];
  int h;  // the row: 0 or 1, a constant once inlined

  static constexpr int kPairs = kCount / 4;
  static constexpr int kChains = 2;  // independent dependency chains, to cover the latency of max and add

  // The first of two neighbouring scores.
  __device__ float* pair(int j) const { return &value[4 * j + 2 * h]; }

  // Of what this thread holds.
  __device__ float local_max() const {
    float partial[kChains];
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      partial[c] = fmaxf(pair(c)[0], pair(c)[1]);
    }
#pragma unroll
    for (int j = kChains; j < kPairs; ++j) {
      partial[j % kChains] = fmaxf(partial[j % kChains], fmaxf(pair(j)[0], pair(j)[1]));
    }
    return fmaxf(partial[0], partial[1]);
  }

  __device__ float max() const {
    const float local = local_max();
    const float of_two = fmaxf(local, __shfl_xor_sync(0xffffffffu, local, 1));
    return fmaxf(of_two, __shfl_xor_sync(0xffffffffu, of_two, 2));
  }

  template <class Function>
  __device__ float apply(const Function& function) const {
    return apply_to_scores<Function>([&](auto&& step) {
      float partial[kChains] = {};
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int e = 0; e < kChains; ++e) {
          float& score = pair(j)[e];
          score = step(function, score);
          partial[e] += score;
        }
      }
      return partial[0] + partial[1];
    });
  }
};

__device__ inline float larger_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// Adds up the four lanes' shares of a row.
__device__ inline float sum_over_row(float share) {
  share += __shfl_xor_sync(0xffffffffu, share, 1);
  return share + __shfl_xor_sync(0xffffffffu, share, 2);
}

// Rounds an accumulator to the A operand of a following product: its columns become the contracted elements.
template <class Element, int kCount>
__device__ inline void pack(const float (&value)[kCount], std::uint32_t (&operand)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    operand[i] = DeviceElement<Element>::pack(value[2 * i], value[2 * i + 1]);
  }
}

// This thread's scores of both rows, and the weights that they become, rounded, two in a register. For an
// ElementwisePolicy.
template <class Element, int kCount>
struct RoundedRows {
  const float (&score)[kCount];
  std::uint32_t (&weights)[kCount / 2];

  // function.shortcut(function.exponential(score)), and function(score) where that exponential is too large. Above 0,
  // floats compare as integers: three take one instruction, and NaN is larger than any limit.
  template <class Function>
  __device__ void apply(const Function& function) const {
    int largest = 0;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float e[2] = {function.exponential(score[i]), function.exponential(score[i + 1])};
      largest = max_of(largest, max_of(__float_as_int(e[0]), __float_as_int(e[1])));
      weights[i / 2] = DeviceElement<Element>::pack(function.shortcut(e[0]), function.shortcut(e[1]));
    }
    if (__any_sync(0xffffffffu, largest > __float_as_int(Function::kLargest))) {
      mend(function);
    }
  }

 private:
  // The weights of eight scores each, unless all are small.
  template <class Function>
  __device__ void mend(const Function& function) const {
    constexpr int kGroup = 8;
#pragma unroll
    for (int i = 0; i < kCount; i += kGroup) {
      bool are_small = true;
#pragma unroll
      for (int j = i; j < i + kGroup; ++j) {
        are_small = are_small && function.is_small(score[j]);
      }
      if (!__all_sync(0xffffffffu, are_small)) {
#pragma unroll
        for (int j = i; j < i + kGroup; j += 2) {
          weights[j / 2] = DeviceElement<Element>::pack(function(score[j]), function(score[j + 1]));
        }
      }
    }
  }
};

// Writes a packed accumulator to rows [first_row, first_row + 64) of a tile, four 8 × 8 matrices an instruction.
template <class Tile, int kRegisters>
__device__ inline void store_packed(const std::uint32_t (&operand)[kRegisters], Tile& tile, int first_row, int thread) {
  // Lane l addresses row l % 16 of its warp's sixteen, in the left (l < 16) or right half of sixteen columns.
  const int lane = thread % 32, row = first_row + thread / 32 * 16 + lane % 16;
  constexpr int kSteps = Tile::kUnits / 2;  // of sixteen columns, in a panel
  std::uint32_t address = tile.address() + Tile::unit_offset(row, lane / 16);
  // Computed here in every iteration of a loop: hoisted, the addresses would cost registers that the products need.
  asm volatile("" : "+r"(address));
#pragma unroll
  for (int i = 0; i < kRegisters / 4; ++i) {
    const std::uint32_t at = (address ^ i % kSteps * 32) + i / kSteps * Tile::kPanelBytes;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(operand[4 * i]),
                 "r"(operand[4 * i + 1]), "r"(operand[4 * i + 2]), "r"(operand[4 * i + 3])
                 : "memory");
  }
}

}  // namespace fastattn::sm90

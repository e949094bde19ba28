// Epilogues: what leaves the chip. Here the output, scaled and rounded, with or without each row's log-sum-exp.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "fastattn/score/score.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/tma.cuh"

namespace fastattn::sm90 {

template <class Element, bool kWithLse>
struct Output {
  TensorMap out;
  float* lse;  // [batch, heads, num_q]; unused without

  // Stores the 64 rows of one warpgroup by way of its rows of `staging`; `rows` are this thread's two. Named barrier
  // `warpgroup` is used.
  template <class Tile, int kCount>
  __device__ void store(float (&value)[kCount], const RowResult (&rows)[2], Tile& staging, int warpgroup,
                        TensorMap::Origin origin, int num_q, int heads) const {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] *= rows[i / 2 % 2].output_scale;
    }
    if constexpr (kWithLse) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = origin.row + at.row(h);
        if (at.first_column == 0 && row < num_q) {
          lse[(std::int64_t{origin.batch} * heads + origin.head) * num_q + row] = rows[h].lse;
        }
      }
    }
    std::uint32_t rounded[kCount / 2];
    pack<Element>(value, rounded);
    store_packed(rounded, staging, warpgroup * kWarpgroupRows, thread);
    publish_shared();
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, warpgroup);
    if (thread == 0) {
      out.store(staging, warpgroup * kWarpgroupRows, origin);
      wait_for_stores();
    }
  }
};

}  // namespace fastattn::sm90

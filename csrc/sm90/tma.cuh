// The bulk copy engine: tensor maps, tile loads that complete on an mbarrier, and tile stores.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cstdint>
#include <cute/arch/copy_sm90_tma.hpp>

#include "sm90/shared_tile.cuh"

namespace fastattn::sm90 {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Waits for the phase of `parity`; no read of what it guards moves above it (CUTLASS's wait alone does not tell the
// compiler so).
__device__ inline void wait_for(Barrier& barrier, std::uint32_t parity) {
  barrier.wait(parity);
  asm volatile("" ::: "memory");
}

// A [batch, seq, heads, head_dim] tensor as the copy engine sees it: coordinates (column, row, head, batch), boxes of
// one panel of 64 columns by some rows. Elements outside the tensor read as zero and are not written.
struct TensorMap {
  CUtensorMap map;

  // Where a tile's first row lies.
  struct Origin {
    int row, head, batch;
  };

  template <class Tile>
  __device__ void load(Tile& tile, Origin origin, Barrier& barrier) const {
    constexpr auto kHint = static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), kHint, tile.panel(i),
                                   i * kPanelColumns, origin.row, origin.head, origin.batch);
    }
  }

  // Stores 64 rows of `tile`, from `first_row` on. One thread issues it, after the writers' fence and barrier.
  template <class Tile>
  __device__ void store(Tile& tile, int first_row, Origin origin) const {
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      cute::SM90_TMA_STORE_4D::copy(&map, tile.panel(i) + first_row * kPanelRowBytes, i * kPanelColumns, origin.row,
                                    origin.head, origin.batch);
    }
  }
};

// Copies `bytes` contiguous bytes (a multiple of 16) to shared memory, completing on `barrier`.
__device__ inline void load_bytes(void* shared, const void* global, int bytes, Barrier& barrier) {
  cute::SM90_BULK_COPY_G2S::copy(global, reinterpret_cast<std::uint64_t*>(&barrier), shared, bytes);
}

// Makes this thread's shared-memory writes visible to the copy engine and to the tensor cores.
__device__ inline void publish_shared() { cutlass::arch::fence_view_async_shared(); }

// Waits until this thread's stores have read their shared memory.
__device__ inline void wait_for_stores() {
  cute::tma_store_arrive();
  cute::tma_store_wait<0>();
}

}  // namespace fastattn::sm90

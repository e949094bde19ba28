// The bulk copy engine: tensor maps, and tile loads that complete on an mbarrier.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cstdint>
#include <cute/arch/copy_sm90_tma.hpp>
#include <utility>

#include "fastattn/schedule/neighborhood.hpp"
#include "fastattn/schedule/sequences.hpp"
#include "fastattn/schedule/split.hpp"
#include "sm90/shared_tile.cuh"

namespace fastattn::sm90 {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Waits for the phase of `parity`; no read of what it guards moves above it (CUTLASS's wait alone does not tell the
// compiler so).
__device__ inline void wait_for(Barrier& barrier, std::uint32_t parity) {
  barrier.wait(parity);
  asm volatile("" ::: "memory");
}

// A [batch, tokens, heads, head_dim] tensor as the copy engine sees it, from which tiles of kRows tokens are loaded in
// panels. Elements outside the tensor read as zero. `Origin` tells where a tile's first token lies.
template <class Origin>
struct TensorMap;

inline constexpr auto kCacheHint = static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

template <class Schedules>
using QueryOriginOf = decltype(std::declval<const Schedules&>().at(0, 0).query_origin(0, TileShape{}));
template <class Schedules>
using OriginOf = decltype(std::declval<const Schedules&>().at(0, 0).key_origin(0, TileShape{}));

// Consecutive tokens of a sequence: coordinates (column, token, head, batch).
template <>
struct TensorMap<int> {
  CUtensorMap map;

  template <class Tile>
  __device__ void load(Tile& tile, int first_token, int head, int batch, Barrier& barrier) const {
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), kCacheHint, tile.panel(i),
                                   i * Tile::kPanelColumns, first_token, head, batch);
    }
  }
};

// Heads beside each other, of one query after the other: coordinates (column, head, token, batch).
template <>
struct TensorMap<GroupOrigin> {
  CUtensorMap map;

  template <class Tile>
  __device__ void load(Tile& tile, GroupOrigin first, int, int batch, Barrier& barrier) const {
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), kCacheHint, tile.panel(i),
                                   i * Tile::kPanelColumns, first.head, first.query, batch);
    }
  }
};

// Tokens of one of many sequences, of which a tile's rows past the end arrive as zeros although there are tokens: a row
// is counted from the end, so that there is nothing after it. Coordinates (column, row, head, end, kRows). Addresses
// are taken modulo 2^64, and the last coordinate's stride, 2^34 − one token, takes away the kRows tokens that the row
// has too many: kRows · 2^34 = 2^64. (The trick is known from Triton's ragged descriptors.)
template <>
struct TensorMap<SequenceOrigin> {
  static constexpr int kRows = 1 << 30;
  CUtensorMap map;

  template <class Tile>
  __device__ void load(Tile& tile, SequenceOrigin first, int head, int, Barrier& barrier) const {
    const int rows = kRows;
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), kCacheHint, tile.panel(i),
                                   i * Tile::kPanelColumns, rows - first.rows, head, first.token + first.rows, rows);
    }
  }
};

// Transposed tokens, [batch, heads, channels, tokens]: tiles of all channels of consecutive tokens; coordinates (token,
// channel, head, batch).
struct TransposedMap {
  CUtensorMap map;

  template <class Tile>
  __device__ void load(Tile& tile, int first_token, int head, int batch, Barrier& barrier) const {
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), kCacheHint, tile.panel(i),
                                   first_token + i * Tile::kPanelColumns, 0, head, batch);
    }
  }
};

// A box of a grid of tokens: coordinates (column of all heads, innermost to outermost axis, batch). Five dimensions are
// all there are, so that heads share one with their columns: they must lie side by side, and fill their panels.
template <>
struct TensorMap<PerAxis<int>> {
  CUtensorMap map;
  GridBox box;        // of a tile
  PerAxis<int> part;  // tokens that one copy takes: all of the box, unless dilation spreads it too far
  bool has_parts;
  int head_dim;

  template <class Tile>
  __device__ void load(Tile& tile, PerAxis<int> origin, int head, int batch, Barrier& barrier) const {
    const auto copy = [&](std::byte* to, int panel, int x, int y, int z) {
      cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), kCacheHint, to,
                                   head * head_dim + panel * Tile::kPanelColumns, origin[2] + z * box.step[2],
                                   origin[1] + y * box.step[1], origin[0] + x * box.step[0], batch);
    };
    if (!has_parts) {  // without loops, whose branches would make the producer slower than the products
#pragma unroll
      for (int i = 0; i < Tile::kPanels; ++i) {
        copy(tile.panel(i), i, 0, 0, 0);
      }
      return;
    }
    for (int i = 0; i < Tile::kPanels; ++i) {
      std::byte* to = tile.panel(i);
      for (int x = 0; x < box.extent[0]; x += part[0]) {
        for (int y = 0; y < box.extent[1]; y += part[1]) {
          for (int z = 0; z < box.extent[2]; z += part[2], to += product(part) * Tile::kRowBytes) {
            copy(to, i, x, y, z);
          }
        }
      }
    }
  }
};

// Copies `bytes` contiguous bytes (a multiple of 16) to shared memory, completing on `barrier`.
__device__ inline void load_bytes(void* shared, const void* global, int bytes, Barrier& barrier) {
  cute::SM90_BULK_COPY_G2S::copy(global, reinterpret_cast<std::uint64_t*>(&barrier), shared, bytes);
}

// Makes this thread's shared-memory writes visible to the copy engine and to the tensor cores.
__device__ inline void publish_shared() { cutlass::arch::fence_view_async_shared(); }

}  // namespace fastattn::sm90

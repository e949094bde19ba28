// The body of neighborhood_attention_<instruction set>.cpp.
#pragma once

#include "softmax_body.hpp"

namespace fastattn::cpu {

template <class Isa, int kNumAxes>
constexpr NeighborhoodAttentionKernels::In<kNumAxes> neighborhood_kernels() {
  constexpr NeighborhoodTiles kBoxes = kCpuNeighborhoodTiles[kNumAxes - 1];
  constexpr TileShape kTile{product(kBoxes.q), product(kBoxes.k)};
  static_assert(kTile.q == kTile.k);  // the backward's second pass exchanges queries and keys
  return softmax_kernels<Isa, NeighborhoodAttentionKernels::In<kNumAxes>, Tiles{kTile, kTile}>();
}

template <class Isa>
constexpr NeighborhoodAttentionKernels neighborhood_attention_kernels() {
  return {neighborhood_kernels<Isa, 1>(), neighborhood_kernels<Isa, 2>(), neighborhood_kernels<Isa, 3>()};
}

}  // namespace fastattn::cpu

// Terms of keys, which are added to the scores that all queries of a head have with them.
#pragma once

#include <cstdint>

#include "fastattn/fastattn.hpp"
#include "sm90/tma.cuh"

namespace fastattn::sm90 {

// Those of a tile's keys in shared memory.
template <int kKeys>
struct alignas(16) TermTile {
  float term[kKeys];
};

// Those of all, or none.
struct KeyTerms {
  KeyBias of_heads;
  int seq_k;

  __device__ bool exist() const { return of_heads.bias != nullptr; }
  // How many bytes load() copies: all of the tile, or up to the end of its row.
  template <int kKeys>
  __device__ int bytes(const TermTile<kKeys>&, int k_tile) const {
    const int left = static_cast<int>(padded_tokens(seq_k)) - k_tile * kKeys;
    return exist() ? min_of(kKeys, left) * static_cast<int>(sizeof(float)) : 0;
  }
  template <int kKeys>
  __device__ void load(TermTile<kKeys>& tile, int batch, int head, int k_tile, Barrier& barrier) const {
    if (exist()) {
      const float* const row = of_heads.bias + of_heads.index(batch, head) * padded_tokens(seq_k);
      load_bytes(&tile, row + k_tile * kKeys, bytes(tile, k_tile), barrier);
    }
  }
};

// Operands without.
struct NoTerms {
  template <class Tile>
  static __device__ int bytes(const Tile&, int) {
    return 0;
  }
  template <class Tile>
  static __device__ void load(Tile&, int, int, int, Barrier&) {}
};

}  // namespace fastattn::sm90

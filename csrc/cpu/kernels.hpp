// The ops' CPU kernels: for each op a table per instruction set, filled by one translation unit each.
#pragma once

#include "fastattn/fastattn.hpp"
#include "fastattn/operand/element.hpp"
#include "fastattn/plan/neighborhood_tiles.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/schedule/sequences.hpp"
#include "instruction_set.hpp"

namespace fastattn::cpu {

template <class Forward_, class Backward_, class Schedules_ = Band>
struct Kernels {
  using Forward = Forward_;
  using Backward = Backward_;
  using Schedules = Schedules_;
  void (*forward)(const Forward& problem, const Schedules& schedules, const Threads& threads);
  void (*backward)(const Backward& problem, const Schedules& schedules, const Threads& threads);
};

struct AttentionKernels {
  Kernels<Attention, AttentionBackward, Bands> in_bands;
  Kernels<Attention, AttentionBackward, Regions> in_regions;
};
extern const AttentionKernels kAttentionAvx2, kAttentionAvx512;

using VarlenAttentionKernels = Kernels<VarlenAttention, VarlenAttentionBackward, SequenceBands>;
extern const VarlenAttentionKernels kVarlenAttentionAvx2, kVarlenAttentionAvx512;

using BlockSparseAttentionKernels = Kernels<BlockSparseAttention, BlockSparseAttentionBackward, BlockLists>;
extern const BlockSparseAttentionKernels kBlockSparseAttentionAvx2, kBlockSparseAttentionAvx512;

// A neighborhood in the tiles that the CPU's kernels for so many axes are compiled for.
template <PerAxis<int> kExtent>
using BoxOf = FixedBox<kExtent[0], kExtent[1], kExtent[2]>;
template <int kNumAxes>
using CpuNeighborhood = NeighborhoodSchedule<false, BoxOf<kCpuNeighborhoodTiles[kNumAxes - 1].q>,
                                             BoxOf<kCpuNeighborhoodTiles[kNumAxes - 1].k>>;

struct NeighborhoodAttentionKernels {
  template <int kNumAxes>
  using In = Kernels<NeighborhoodAttention, NeighborhoodAttentionBackward, CpuNeighborhood<kNumAxes>>;

  In<1> one_axis;
  In<2> two_axes;
  In<3> three_axes;
};
extern const NeighborhoodAttentionKernels kNeighborhoodAttentionAvx2, kNeighborhoodAttentionAvx512;

using SigmoidAttentionKernels = Kernels<SigmoidAttention, SigmoidAttentionBackward>;
extern const SigmoidAttentionKernels kSigmoidAttentionAvx2, kSigmoidAttentionAvx512;

struct QuantizedAttentionKernels {
  void (*of_band)(const QuantizedAttention& problem, const Band& band, const Threads& threads);
  void (*of_blocks)(const QuantizedAttention& problem, const BlockLists& blocks, const Threads& threads);
};
extern const QuantizedAttentionKernels kQuantizedAttentionAvx2, kQuantizedAttentionAvx512;

struct QuantizeTokensKernels {
  void (*run)(const QuantizeTokens& problem, const Threads& threads);
};
extern const QuantizeTokensKernels kQuantizeTokensAvx2, kQuantizeTokensAvx512;

struct EstimateBlocksKernels {
  void (*run)(const EstimateBlocks& problem, const Threads& threads);
};
extern const EstimateBlocksKernels kEstimateBlocksAvx2, kEstimateBlocksAvx512;

// The table for this machine; null where it lacks AVX2.
template <class Table>
const Table* best_of(const Table& avx2, const Table& avx512) {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return &avx512;
    case InstructionSet::kAvx2:
      return &avx2;
    case InstructionSet::kNone:
      break;
  }
  return nullptr;
}

}  // namespace fastattn::cpu

// The body of quantized_attention_<instruction set>.cpp.
#pragma once

#include "fastattn/cpu/forward.hpp"
#include "fastattn/cpu/quantized_operands.hpp"
#include "fastattn/score/softmax.hpp"
#include "fastattn/score/tile_softmax.hpp"
#include "kernels.hpp"

namespace fastattn::cpu {

// The tiles' keys are those of the GPU's: weights of int8 values are rounded relative to the maximum of a tile.
inline constexpr TileShape kQuantizedTile{64, 128};

template <class Isa, class Schedules>
void quantized_attention(const QuantizedAttention& p, const Schedules& schedules, const Threads& threads) {
  const QuantizedOperands operands{p};
  switch (operands.weights) {
    case WeightFormat::kFloat32:
      return forward<Isa, kQuantizedTile>(operands, schedules, SoftmaxBy<One>{}, threads);
    case WeightFormat::kUInt8:
      return forward<Isa, kQuantizedTile>(operands, schedules, TileSoftmax{UInt8::kLargestLog2}, threads);
    case WeightFormat::kFloat8:
      return forward<Isa, kQuantizedTile>(operands, schedules, SoftmaxBy<One, Float8Weights>{}, threads);
  }
}

template <class Isa>
constexpr QuantizedAttentionKernels quantized_attention_kernels() {
  return {quantized_attention<Isa, Band>, quantized_attention<Isa, BlockLists>};
}

}  // namespace fastattn::cpu

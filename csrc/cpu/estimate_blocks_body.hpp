// The body of estimate_blocks_<instruction set>.cpp.
#pragma once

#include "fastattn/cpu/estimate_blocks.hpp"
#include "kernels.hpp"

namespace fastattn::cpu {

template <class Isa>
constexpr EstimateBlocksKernels estimate_blocks_kernels() {
  return {[](const EstimateBlocks& p, const Threads& threads) {
    if (p.q.format == TokenFormat::kInt8) {
      estimate_blocks<Isa, Int8>(p, threads);
    } else {
      estimate_blocks<Isa, Int4>(p, threads);
    }
  }};
}

}  // namespace fastattn::cpu

// The body of estimate_blocks_<instruction set>.cpp.
#pragma once

#include "fastattn/cpu/estimate_blocks.hpp"
#include "kernels.hpp"

namespace fastattn::cpu {

template <class Isa>
constexpr EstimateBlocksKernels estimate_blocks_kernels() {
  return {estimate_blocks<Isa>};
}

}  // namespace fastattn::cpu

// attention's CPU kernels: one table per instruction set, filled by one translation unit each.
#pragma once

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"

namespace fastattn::cpu {

struct AttentionKernels {
  void (*forward)(const Attention& problem, const Band& band, const Threads& threads);
  void (*backward)(const AttentionBackward& problem, const Band& band, const Threads& threads);
};

extern const AttentionKernels kAttentionAvx2, kAttentionAvx512;

}  // namespace fastattn::cpu

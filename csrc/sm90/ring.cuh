// A ring of shared-memory stages between one producer thread and several consumer warpgroups.
#pragma once

#include <cstdint>

#include "sm90/tma.cuh"

namespace fastattn::sm90 {

// Which stage is next, and the parity of its barriers' current phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int kStages>
struct Ring {
  Barrier full[kStages], empty[kStages];

  __device__ void init(int consumers) {
    for (int i = 0; i < kStages; ++i) {
      full[i].init(1);
      empty[i].init(consumers);
    }
  }
  // Producer: waits until the stage is free and announces `bytes`; copies then complete on the returned barrier.
  __device__ Barrier& begin_fill(RingPosition<kStages> at, int bytes) {
    empty[at.stage].wait(at.parity ^ 1);
    full[at.stage].arrive_and_expect_tx(bytes);
    return full[at.stage];
  }
  // Consumer: waits for the stage's data.
  __device__ void wait(RingPosition<kStages> at) { wait_for(full[at.stage], at.parity); }
  // Consumer, one thread per warpgroup: hands the stage back.
  __device__ void release(RingPosition<kStages> at) { empty[at.stage].arrive(); }
};

}  // namespace fastattn::sm90

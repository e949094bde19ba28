// How work reaches a thread block, and how its producer warp hands tiles on to the consumer warpgroups.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "fastattn/schedule/schedule.hpp"
#include "sm90/tma.cuh"

namespace fastattn::sm90 {

// Hands out works 0 … count − 1 of a launch: block b begins with work b, and whoever is done takes the next one left.
struct WorkQueue {
  static constexpr std::int64_t kMostWorks = 1 << 30;  // and as many more that find none left fit an int

  int count;
  int* taken;  // in global memory: how many were taken that no block began with; null: none are left

  __device__ int first() const { return static_cast<int>(blockIdx.x); }
  // For a whole warp; `count` or more: there is no work left. From the exchange the compiler learns that all lanes hold
  // one value: what follows from it then lives in uniform registers, of which a producer has more than of others.
  __device__ int next() const {
    int index = count;
    if (taken != nullptr && threadIdx.x % 32 == 0) {
      index = static_cast<int>(gridDim.x) + atomicAdd(taken, 1);
    }
    return __shfl_sync(0xffffffffu, index, 0);
  }
};

// Which stage is next, and the parity of its barriers' current phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  std::uint32_t parity = 0;

  // After so many tiles.
  static __device__ RingPosition after(unsigned tiles) {
    return {static_cast<int>(tiles % kStages), tiles / kStages % 2};
  }
  // Where this tile's place is in twice as many stages.
  __device__ int slot() const { return static_cast<int>(parity) * kStages + stage; }
  __device__ RingPosition before() const {
    return stage == 0 ? RingPosition{kStages - 1, parity ^ 1} : RingPosition{stage - 1, parity};
  }
  __device__ RingPosition next() const {
    RingPosition next = *this;
    next.advance();
    return next;
  }

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// How many lanes of a warp hand a stage back. One is enough, since __syncwarp orders the other lanes' reads before it,
// but compute-sanitizer's racecheck does not follow that: for it, every lane speaks for itself.
// Nor does it follow those that arrive at a named barrier without waiting there.
#if defined(FASTATTN_RACECHECK)
inline constexpr int kReleasingLanes = 32;
inline constexpr bool kMayArrive = false;
#else
inline constexpr int kReleasingLanes = 1;
inline constexpr bool kMayArrive = true;
#endif

// How often consumers arrive when they hand a stage back.
constexpr int releases(int warpgroups) { return warpgroups * kWarpgroupWarps * kReleasingLanes; }

// Every thread of a warp: arrives for it, once its lanes have read or written what the barrier guards. Which lane
// speaks for them is told by its number, which takes a register, or by an election, which takes half a per cent of a
// forward's time.
template <bool kByElection = false>
__device__ void release(Barrier& barrier) {
  __syncwarp();
  if (kByElection ? kReleasingLanes > 1 || cute::elect_one_sync() : threadIdx.x % 32 < kReleasingLanes) {
    barrier.arrive();
  }
}

// Tells the other threads of a named barrier that they need not wait for these.
__device__ inline void arrive_at(int threads, int barrier) {
  if constexpr (kMayArrive) {
    cutlass::arch::NamedBarrier::arrive(threads, barrier);
  } else {
    cutlass::arch::NamedBarrier::sync(threads, barrier);
  }
}

struct Nothing {};

// A ring of shared-memory stages. With its data a stage carries a message of the producer's.
template <int kStages, class Message = Nothing>
struct Ring {
  Barrier full[kStages], empty[kStages];
  Message messages[kStages];

  __device__ void init(int consumer_warpgroups) {
    for (int i = 0; i < kStages; ++i) {
      full[i].init(1);
      empty[i].init(releases(consumer_warpgroups));
    }
  }
  // Producer, a whole warp: waits until the stage is free; then one lane calls copy(barrier), to start copies of
  // `bytes` that complete on the barrier.
  template <class Copy>
  __device__ void fill(RingPosition<kStages> at, int bytes, const Message& message, Copy&& copy) {
    empty[at.stage].wait(at.parity ^ 1);
    if (cute::elect_one_sync()) {
      messages[at.stage] = message;
      full[at.stage].arrive_and_expect_tx(bytes);
      copy(full[at.stage]);
    }
  }
  // Consumer: waits for the stage's data.
  __device__ void wait(RingPosition<kStages> at) { wait_for(full[at.stage], at.parity); }
  // Consumer: the same, and the message. To be read before products on the stage are issued: its release follows them.
  __device__ Message next(RingPosition<kStages> at) {
    wait(at);
    return messages[at.stage];
  }
  // Consumer, every thread: hands the stage back.
  __device__ void release(RingPosition<kStages> at) { sm90::release(empty[at.stage]); }
};

// The run of tiles that begins in a stage, told to the consumers by the producer: it alone walks the schedule, because
// a cursor costs registers, which the consumers need for their accumulators, and may have to read memory.
struct alignas(16) Announcement {
  int first, count;  // tiles [first, first + count); a walk of no tiles is one run of none
  int head;          // −1, where works come one after the other: none is left
  std::uint16_t cells;
  Coverage coverage;
  bool last;
};

// Calls fill(announcement) for every run that walk(report) reports as (head, run), the last one marked.
template <class Walk, class Fill>
__device__ void announce(Walk&& walk, Fill&& fill) {
  Announcement pending{0, 0, 0, 0, Coverage::kPartial, false};
  walk([&](int head, TileRun run) {
    if (pending.count > 0) {
      fill(pending);
    }
    pending = {run.first, run.count, head, run.cells, run.coverage, false};
  });
  pending.last = true;
  fill(pending);
}

// body(tile, coverage, cells) for every tile of a run.
template <class Body>
__device__ void for_each_tile(const Announcement& run, Body&& body) {
  fastattn::for_each_tile(TileRun{run.first, run.count, run.coverage, run.cells}, body);
}

}  // namespace fastattn::sm90

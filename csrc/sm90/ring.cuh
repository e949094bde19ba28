// A ring of shared-memory stages between one producer thread and several consumer warpgroups.
#pragma once

#include <cstdint>

#include "fastattn/schedule/schedule.hpp"
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

// How many lanes of a warp hand a stage back. One is enough, since __syncwarp orders the other lanes' reads before it,
// but compute-sanitizer's racecheck does not follow that: for it, every lane speaks for itself.
#if defined(FASTATTN_RACECHECK)
inline constexpr int kReleasingLanes = 32;
#else
inline constexpr int kReleasingLanes = 1;
#endif

template <int kStages>
struct Ring {
  Barrier full[kStages], empty[kStages];

  __device__ void init(int consumer_warpgroups) {
    for (int i = 0; i < kStages; ++i) {
      full[i].init(1);
      empty[i].init(consumer_warpgroups * kWarpgroupWarps * kReleasingLanes);
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
  // Consumer, every thread: hands the stage back.
  __device__ void release(RingPosition<kStages> at) {
    __syncwarp();
    if (threadIdx.x % 32 < kReleasingLanes) {
      empty[at.stage].arrive();
    }
  }
};

// The run of tiles that begins in a stage, told to the consumers by the producer: it alone walks the schedule, because
// a cursor costs registers, which the consumers need for their accumulators, and may have to read memory.
struct alignas(16) Announcement {
  int first, count;  // tiles [first, first + count); a walk of no tiles is one run of none
  int head;
  Coverage coverage;
  bool last;
};

// Calls fill(announcement) for every run that walk(report) reports as (head, run), the last one marked.
template <class Walk, class Fill>
__device__ void announce(Walk&& walk, Fill&& fill) {
  Announcement pending{0, 0, 0, Coverage::kPartial, false};
  walk([&](int head, TileRun run) {
    if (pending.count > 0) {
      fill(pending);
    }
    pending = {run.first, run.count, head, run.coverage, false};
  });
  pending.last = true;
  fill(pending);
}

// body(tile, coverage) for every tile of a run.
template <class Body>
__device__ void for_each_tile(const Announcement& run, Body&& body) {
  fastattn::for_each_tile(TileRun{run.first, run.count, run.coverage}, body);
}

// A ring whose stages carry the announcement of the run they belong to.
template <int kStages>
struct AnnouncingRing : Ring<kStages> {
  Announcement announcements[kStages];

  __device__ Barrier& begin_fill(RingPosition<kStages> at, int bytes, Announcement announcement) {
    this->empty[at.stage].wait(at.parity ^ 1);
    announcements[at.stage] = announcement;
    this->full[at.stage].arrive_and_expect_tx(bytes);
    return this->full[at.stage];
  }
  // Consumer: waits for the first stage of the next run. To be read before the products on that stage are issued: its
  // release follows them.
  __device__ Announcement next_run(RingPosition<kStages> at) {
    this->wait(at);
    return announcements[at.stage];
  }
};

}  // namespace fastattn::sm90

// How the warpgroups of a thread block divide their work.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstddef>

#include "sm90/config.hpp"
#include "sm90/shared_tile.cuh"

namespace fastattn::sm90 {

// The thread block's shared memory, at an address that the compiler cannot look up again: it would do so at the head of
// an inner loop, from a special register, which took 3 % of a backward's time at head_dim 64 (attention.md).
template <class Shared>
__device__ Shared& shared_memory() {
  extern __shared__ std::byte bytes[];
  std::size_t address = __cvta_generic_to_shared(bytes);
  asm volatile("" : "+l"(address));
  return *static_cast<Shared*>(__cvta_shared_to_generic(address));
}

// threadIdx.x, read anew here, so that nothing made of it takes a register before.
__device__ inline unsigned thread_anew() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Which thread of its warpgroup this is, in a register: the compiler does not see through the exchange, and so cannot
// read the index again instead.
__device__ inline int kept_thread() {
  return __shfl_sync(0xffffffffu, threadIdx.x % kWarpgroupThreads, threadIdx.x % 32);
}

// The first warp of the first warpgroup produces: produce(). Its second warp may help: assist(). The other warpgroups
// consume: consume(warpgroup), numbered from 0, with the registers that the first one has no use for. Before, one
// thread makes the barriers in shared memory: init().
template <Config kConfig, class Init, class Produce, class Consume, class Assist>
__device__ void divide_block(Init&& init, Produce&& produce, Consume&& consume, Assist&& assist) {
  if (threadIdx.x == 0) {
    init();
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    if constexpr (kConfig.shares_registers()) {
      cutlass::arch::warpgroup_reg_dealloc<kConfig.producer_registers()>();
    }
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == 0) {
      produce();
    } else if (warp == 1) {
      assist();
    }
  } else {
    if constexpr (kConfig.shares_registers()) {
      cutlass::arch::warpgroup_reg_alloc<kConfig.consumer_registers()>();
    }
    consume(warpgroup - 1);
  }
}
template <Config kConfig, class Init, class Produce, class Consume>
__device__ void divide_block(Init&& init, Produce&& produce, Consume&& consume) {
  divide_block<kConfig>(init, produce, consume, [] {});
}

// The consumers' turns at the tensor cores, one after the other, so that one multiplies while another computes weights.
// Named barrier kFirstBarrier + i is warpgroup i's permission.
template <int kWarpgroups, int kFirstBarrier>
struct WarpgroupTurns {
  static constexpr int kThreads = 2 * kWarpgroupThreads;
  int mine;

  __device__ explicit WarpgroupTurns(int warpgroup) : mine(kFirstBarrier + warpgroup) {
    if (warpgroup == kWarpgroups - 1) {
      pass();  // the first warpgroup goes first
    }
  }
  __device__ void wait() const { cutlass::arch::NamedBarrier::sync(kThreads, mine); }
  __device__ void pass() const {
    int next;
    asm volatile("add.s32 %0, %1, 1;" : "=r"(next) : "r"(mine));  // anew each time: registers are short
    cutlass::arch::NamedBarrier::arrive(kThreads, next < kFirstBarrier + kWarpgroups ? next : kFirstBarrier);
  }
  // Takes the permission that is left over: a block whose barrier is half full never ends.
  __device__ void finish() const {
    if (mine == kFirstBarrier) {
      wait();
    }
  }
};

}  // namespace fastattn::sm90

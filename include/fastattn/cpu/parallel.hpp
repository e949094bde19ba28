// What a CPU kernel asks of the thread it runs on: a share of the tasks and a fixed piece of scratch memory.
#pragma once

#include <cstddef>

#include "fastattn/fastattn.hpp"
#include "fastattn/portable.hpp"

namespace fastattn::cpu {

// body(i) for every i in [0, count), in parallel.
template <class Body>
void parallel_for(const Threads& threads, std::int64_t count, const Body& body) {
  const auto task = [](void* context, std::int64_t i) { (*static_cast<const Body*>(context))(i); };
  threads.run(count, task, const_cast<Body*>(&body));
}

inline constexpr int kMaxHeadDim = 256;

// 1.1 MiB, what the backward's wide tiles take at head_dim 256: about the 1 MiB of L2 cache that server cores have.
inline constexpr int kScratchFloats = 282 * 1024;

// The calling thread's scratch, 64-byte aligned. Nothing in it outlives a task.
float* thread_scratch();

// Hands out the scratch piece by piece.
struct Scratch {
  float* next = thread_scratch();

  FASTATTN_HD float* take(int floats) {
    float* piece = next;
    next += ceil_div(floats, 16) * 16;
    return piece;
  }
};

}  // namespace fastattn::cpu

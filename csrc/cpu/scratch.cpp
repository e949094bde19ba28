#include "fastattn/cpu/parallel.hpp"

namespace fastattn::cpu {

// Not on the heap, so that a kernel cannot fail half-way.
float* thread_scratch() {
  alignas(64) thread_local float scratch[kScratchFloats];
  return scratch;
}

}  // namespace fastattn::cpu

#include "fastattn/cpu/parallel.hpp"

namespace fastattn::cpu {

float* thread_scratch() {
  alignas(64) thread_local float scratch[kScratchFloats];
  return scratch;
}

}  // namespace fastattn::cpu

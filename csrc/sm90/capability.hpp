// Which devices the Hopper kernels run on.
#pragma once

#include "ops/validate.hpp"

namespace fastattn::sm90 {

inline Status check_capability(int device, int major, int minor) {
  return major == 9 && minor == 0 ? Status{}
                                  : failure("the GPU kernels need compute capability 9.0 (Hopper), device %d has %d.%d",
                                            device, major, minor);
}

}  // namespace fastattn::sm90

// A GPU that the Hopper kernels cannot use is refused by name, whatever GPU the tests run on.
#include "sm90/capability.hpp"

#include <string>

#include "check.hpp"

using fastattn::sm90::check_capability;

namespace {

const Test hopper("capability: Hopper and nothing else", [] {
  check(check_capability(0, 9, 0).ok(), "9.0 is Hopper");
  const std::string message = check_capability(1, 8, 0).message;
  check(message == "the GPU kernels need compute capability 9.0 (Hopper), device 1 has 8.0", "got '" + message + "'");
  check(!check_capability(0, 10, 0).ok(), "sm_90a code does not run on later architectures");
  check(!check_capability(0, 12, 0).ok(), "sm_90a code does not run on later architectures");
});

}  // namespace

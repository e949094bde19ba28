#include "instruction_set.hpp"

#include <cstdlib>
#include <cstring>

#include "fastattn/fastattn.hpp"

namespace fastattn {

namespace cpu {

namespace {

InstructionSet detect() {
  const char* cap = std::getenv("FASTATTN_CPU_ISA");
  const bool allow_avx512 = cap == nullptr || std::strcmp(cap, "avx2") != 0;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return InstructionSet::kNone;
  }
  if (allow_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    return InstructionSet::kAvx512;
  }
  return InstructionSet::kAvx2;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet detected = detect();
  return detected;
}

}  // namespace cpu

const char* cpu_instruction_set() {
  switch (cpu::instruction_set()) {
    case cpu::InstructionSet::kAvx512:
      return "avx512";
    case cpu::InstructionSet::kAvx2:
      return "avx2";
    case cpu::InstructionSet::kNone:
      break;
  }
  return "none";
}

}  // namespace fastattn

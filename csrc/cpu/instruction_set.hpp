// Which kernels this machine can run.
#pragma once

namespace fastattn::cpu {

enum class InstructionSet { kNone, kAvx2, kAvx512 };

// The best one the processor has; FASTATTN_CPU_ISA=avx2 caps it, so that both can be tried on one machine.
InstructionSet instruction_set();

}  // namespace fastattn::cpu

// Compiled with the flags of csrc/cpu/attention_avx512.cpp.
#include "vector_check.hpp"

namespace fastattn::cpu {

VectorReport report_avx512() { return report_vector<Avx512>(); }

}  // namespace fastattn::cpu

// Compiled with the flags of csrc/cpu/attention_avx2.cpp.
#include "vector_check.hpp"

namespace fastattn::cpu {

VectorReport report_avx2() { return report_vector<Avx2>(); }

}  // namespace fastattn::cpu

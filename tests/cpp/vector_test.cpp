#include <cstring>
#include <string>

#include "check.hpp"
#include "fastattn/fastattn.hpp"
#include "vector_check.hpp"

using namespace fastattn;

namespace {

void check_report(const cpu::VectorReport& report) {
  check(report.exp2.error < 2e-7, "relative error of exp2 is " + std::to_string(report.exp2.error * 1e7) + "e-7");
  check(report.exp2.special_values, "special values of exp2");
  check(report.agrees_with_scalars, "loads, transposition and reductions");
}

const Test vectors("vector: exp2, conversions and transposition of each instruction set", [] {
  if (std::strcmp(cpu_instruction_set(), "none") != 0) {
    check_report(cpu::report_avx2());
  }
  if (std::strcmp(cpu_instruction_set(), "avx512") == 0) {
    check_report(cpu::report_avx512());
  }
});

}  // namespace

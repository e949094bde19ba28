#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.hpp"
#include "fastattn/fastattn.hpp"

namespace {

struct Entry {
  const char* name;
  void (*run)();
};

std::vector<Entry>& entries() {
  static std::vector<Entry> list;
  return list;
}

int failures = 0;

}  // namespace

Test::Test(const char* name, void (*run)()) { entries().push_back({name, run}); }

void check(bool ok, const std::string& what, std::source_location where) {
  constexpr int kShown = 20;  // a law that breaks tends to break everywhere
  if (!ok && ++failures <= kShown) {
    std::printf("    %s:%u: %s\n", where.file_name(), static_cast<unsigned>(where.line()), what.c_str());
  }
}

// fastattn_tests [part of a test's name]
int main(int argc, char** argv) {
  std::printf("instruction set: %s\n", fastattn::cpu_instruction_set());
  int run = 0;
  for (const Entry& test : entries()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) {
      continue;
    }
    const int failures_before = failures;
    const auto start = std::chrono::steady_clock::now();
    test.run();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%s %6.2f s  %s\n", failures == failures_before ? "ok  " : "FAIL", elapsed.count(), test.name);
    std::fflush(stdout);
    ++run;
  }
  std::printf("%d tests, %d failed checks\n", run, failures);
  return failures != 0 || run == 0;
}

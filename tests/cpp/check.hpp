// Tests without a framework: TEST-like objects register themselves, check() counts what fails and says where.
#pragma once

#include <source_location>
#include <string>

struct Test {
  Test(const char* name, void (*run)());
};

void check(bool ok, const std::string& what, std::source_location where = std::source_location::current());

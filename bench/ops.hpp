// The ops of this program. Each has a file of its own, bench/<op>.cpp, which adds it.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "case.hpp"
#include "device.hpp"
#include "problem.hpp"

namespace bench {

struct Op {
  std::vector<const char*> cpu_cases, cuda_cases;  // `python -m bench` lists the same
  std::vector<const char*> small_cases;  // with ragged tiles: sanitizers are slow, and errors sit at the edges
  bool has_backward;
  std::unique_ptr<Case> (*parse)(const std::string& name);
  std::unique_ptr<Problem> (*problem)(const Device& device, const Case& shape, fastattn::DType dtype);
};

inline std::map<std::string, Op>& ops() {
  static std::map<std::string, Op> all;
  return all;
}

// An op whose cases are of one class and whose problems, made from a device, such a case and a type, of another.
template <class CaseClass, class ProblemClass>
struct AddOp {
  AddOp(const char* name, std::vector<const char*> cpu_cases, std::vector<const char*> cuda_cases,
        std::vector<const char*> small_cases, bool has_backward = true) {
    ops()[name] = {std::move(cpu_cases),
                   std::move(cuda_cases),
                   std::move(small_cases),
                   has_backward,
                   [](const std::string& text) -> std::unique_ptr<Case> { return std::make_unique<CaseClass>(text); },
                   [](const Device& device, const Case& shape, fastattn::DType dtype) -> std::unique_ptr<Problem> {
                     return std::make_unique<ProblemClass>(device, static_cast<const CaseClass&>(shape), dtype);
                   }};
  }
};

}  // namespace bench

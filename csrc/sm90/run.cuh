// Host side: what all ops do on Hopper before they launch a kernel.
#pragma once

#include <cstdint>

#include "fastattn/fastattn.hpp"
#include "ops/validate.hpp"
#include "sm90/launch.cuh"

namespace fastattn::sm90 {

// What only the GPU restricts; for a problem that is valid.
inline Status check_gpu(const char* op, DType dtype) {
  if (dtype == DType::kFloat32) {
    return failure("%s: dtype must be float16 or bfloat16 on the GPU, got float32", op);
  }
  return check_device();
}

inline int heads_per_kv_head(const TensorView& q, const TensorView& k) {
  return static_cast<int>(q.heads() / max_of<std::int64_t>(k.heads(), 1));
}

// Encodes one tensor map after the other; the first failure stays.
struct MapEncoder {
  Status status;

  template <class Box, class Map>
  void operator()(const TensorView& view, const Box& box, Map& map, int row_bytes) {
    status = status.ok() ? encode(view, box, row_bytes, map) : status;
  }
};

// Calls run.operator()<Element>() for a 16-bit element type.
template <class Run>
auto with_element(DType dtype, Run&& run) {
  return dtype == DType::kBFloat16 ? run.template operator()<BFloat16>() : run.template operator()<Float16>();
}

// Judges a problem over elements of `dtype`.
template <class Problem>
Status check_problem(const char* op, const Problem& problem, DType dtype) {
  const Status status = validate(problem);
  return status.ok() ? check_gpu(op, dtype) : status;
}

// Judges a problem, then calls run.operator()<Element>().
template <class Problem, class Run>
Status run_if_valid(const char* op, const Problem& problem, DType dtype, Run&& run) {
  const Status status = check_problem(op, problem, dtype);
  return status.ok() ? with_element(dtype, run) : status;
}

}  // namespace fastattn::sm90

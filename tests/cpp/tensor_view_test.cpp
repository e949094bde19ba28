// Which views have no gaps: those whose memory may serve for something else until they are written.
#include "fastattn/tensor_view.hpp"

#include <cstdint>
#include <utility>

#include "check.hpp"

using fastattn::TensorView;

namespace {

constexpr TensorView view(std::int64_t batch, std::int64_t seq, std::int64_t heads, std::int64_t head_dim) {
  return {.shape = {batch, seq, heads, head_dim}, .stride = {seq * heads * head_dim, heads * head_dim, head_dim, 1}};
}

const Test contiguous("tensor view: contiguous without gaps and in order", [] {
  check(view(2, 3, 4, 8).is_contiguous(), "as it is allocated");
  TensorView rows = view(2, 3, 4, 8);
  rows.stride[1] *= 2;
  check(!rows.is_contiguous(), "every second token");
  TensorView transposed = view(2, 3, 4, 8);
  std::swap(transposed.stride[1], transposed.stride[2]);
  check(!transposed.is_contiguous(), "heads before tokens");
  TensorView one = view(1, 3, 1, 8);
  one.stride[0] = one.stride[2] = 1000;
  check(one.is_contiguous(), "a stride along which there is one entry does not matter");
  TensorView expanded = view(2, 3, 4, 8);
  expanded.stride[0] = 0;
  check(!expanded.is_contiguous(), "the same entry twice");
});

}  // namespace

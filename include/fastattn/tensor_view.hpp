// A tensor somebody else owns: [batch, seq, heads, head_dim], strides in elements, last stride 1.
#pragma once

#include <cstdint>

#include "fastattn/portable.hpp"

namespace fastattn {

enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8 };

constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 || dtype == DType::kFloat8 ? 1 : 2;
}

struct TensorView {
  void* data = nullptr;
  std::int64_t shape[4] = {};
  std::int64_t stride[4] = {};
  DType dtype = DType::kFloat32;

  constexpr std::int64_t batch() const { return shape[0]; }
  constexpr std::int64_t seq() const { return shape[1]; }
  constexpr std::int64_t heads() const { return shape[2]; }
  constexpr std::int64_t head_dim() const { return shape[3]; }
  constexpr std::int64_t size() const { return shape[0] * shape[1] * shape[2] * shape[3]; }
  // Without gaps: in the order of its shape, one element after the other.
  constexpr bool is_contiguous() const {
    std::int64_t expected = 1;
    for (int axis = 3; axis >= 0; --axis) {
      if (shape[axis] != 1 && stride[axis] != expected) {
        return false;
      }
      expected *= shape[axis];
    }
    return true;
  }

  // Row (b, s, h), head_dim elements long.
  template <class Element>
  FASTATTN_HD Element* row(std::int64_t b, std::int64_t s, std::int64_t h) const {
    return static_cast<Element*>(data) + b * stride[0] + s * stride[1] + h * stride[2];
  }
};

}  // namespace fastattn

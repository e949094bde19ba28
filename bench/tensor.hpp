// Tensors of the benchmark: contiguous [batch, seq, heads, head_dim], on the host with a twin on the device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "device.hpp"
#include "fastattn/operand/element.hpp"
#include "fastattn/tensor_view.hpp"

namespace bench {

class Tensor {
 public:
  Tensor(const Device& device, fastattn::DType dtype, std::int64_t batch, std::int64_t seq, std::int64_t heads,
         std::int64_t head_dim)
      : device_(device) {
    view_ = {.data = nullptr,
             .shape = {batch, seq, heads, head_dim},
             .stride = {seq * heads * head_dim, heads * head_dim, head_dim, 1},
             .dtype = dtype};
    host_.resize(static_cast<std::size_t>(view_.size() * size_of(dtype)));
    memory_ = device.allocate(host_.size());
    view_.data = memory_.get();
    poison();
  }

  const fastattn::TensorView& view() const { return view_; }  // on the device

  // Draws from a million normal values: as random as it must be, and quick for tens of millions of elements.
  void fill_normal(std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> values(1 << 20);
    std::ranges::generate(values, [&] { return normal(random); });
    fill([&](std::int64_t) { return values[random() % values.size()]; });
  }

  // Element i is value(i).
  template <class Value>
  void fill(Value&& value) {
    for (std::int64_t i = 0; i < view_.size(); ++i) {
      store(i, value(i));
    }
    device_.copy_in(view_.data, host_.data(), host_.size());
  }

  // All bits set is NaN in every type: what an op leaves unwritten shows.
  void poison() {
    host_.assign(host_.size(), std::byte{0xff});
    device_.copy_in(view_.data, host_.data(), host_.size());
  }

  void fetch() { device_.copy_out(host_.data(), view_.data, host_.size()); }

  double at(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d) const {
    return load(b * view_.stride[0] + s * view_.stride[1] + h * view_.stride[2] + d);
  }

  bool has_nan() const {
    for (std::int64_t i = 0; i < view_.size(); ++i) {
      if (const double x = load(i); x != x) {
        return true;
      }
    }
    return false;
  }

 private:
  template <class Element>
  const Element* elements() const {
    return reinterpret_cast<const Element*>(host_.data());
  }

  double load(std::int64_t i) const {
    switch (view_.dtype) {
      case fastattn::DType::kFloat16:
        return fastattn::to_float(elements<fastattn::Float16>()[i]);
      case fastattn::DType::kBFloat16:
        return fastattn::to_float(elements<fastattn::BFloat16>()[i]);
      default:
        return elements<float>()[i];
    }
  }

  template <class Element>
  void store_as(std::int64_t i, float x) {
    reinterpret_cast<Element*>(host_.data())[i] = fastattn::from_float<Element>(x);
  }

  void store(std::int64_t i, float x) {
    switch (view_.dtype) {
      case fastattn::DType::kFloat16:
        return store_as<fastattn::Float16>(i, x);
      case fastattn::DType::kBFloat16:
        return store_as<fastattn::BFloat16>(i, x);
      default:
        return store_as<float>(i, x);
    }
  }

  const Device& device_;
  fastattn::TensorView view_;
  std::vector<std::byte> host_;
  std::shared_ptr<void> memory_;
};

}  // namespace bench

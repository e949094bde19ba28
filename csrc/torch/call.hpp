// What every op's binding shares: judging torch's tensors, showing them to the core, and the places where it runs.
//
// A binding holds implementations only; python/fastattn declares the schemas and everything else torch wants to know.
// It is written on LibTorch's stable ABI, so that one library serves every torch from 2.11 on. What is checked here is
// what only torch knows (rank, dtype, device, contiguity); the core checks the rest. Either refusal is an exception.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastattn/fastattn.hpp"

namespace fastattn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline void require(const Status& status) { require(status.ok(), status.message); }

// Tensors as the core sees them.

inline std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << '[';
  for (std::size_t i = 0; i < values.size(); ++i) {
    text << (i == 0 ? "" : ", ") << values[i];
  }
  text << ']';
  return text.str();
}

inline std::string name_of(const torch::stable::Device& device) {
  const std::string type = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another kind";
  return device.is_cpu() ? type : type + ":" + std::to_string(device.index());
}

// Of a type that Call has let pass.
inline DType dtype_of(ScalarType type) {
  return type == ScalarType::Float           ? DType::kFloat32
         : type == ScalarType::Half          ? DType::kFloat16
         : type == ScalarType::Char          ? DType::kInt8
         : type == ScalarType::Float8_e4m3fn ? DType::kFloat8
                                             : DType::kBFloat16;
}

inline bool has_low_bits(ScalarType type) { return type == ScalarType::Char || type == ScalarType::Float8_e4m3fn; }

// [batch, seq, heads, head_dim], or that without a batch, which becomes 1.
inline TensorView view(const Tensor& tensor) {
  TensorView view{.data = tensor.data_ptr(), .shape = {1}};
  const auto missing = 4 - tensor.dim();
  std::ranges::copy(tensor.sizes(), view.shape + missing);
  std::ranges::copy(tensor.strides(), view.stride + missing);
  view.dtype = dtype_of(tensor.scalar_type());
  return view;
}

inline std::int64_t head_dim_of(const Tensor& tensor) { return tensor.sizes()[tensor.dim() - 1]; }
inline std::int64_t heads_of(const Tensor& tensor) { return tensor.sizes()[tensor.dim() - 2]; }

inline bool last_dim_is_contiguous(const Tensor& tensor) {
  return tensor.numel() == 0 || head_dim_of(tensor) == 1 || tensor.stride(tensor.dim() - 1) == 1;
}

// An uninitialised, contiguous tensor where `like` is. torch::stable::new_empty finds its way through the dispatcher by
// name: a call of one token on a CPU, which makes two, took 9.4 µs with it and takes 8.3.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  std::array<std::int64_t, 8> strides;
  require(shape.size() <= strides.size(), "a tensor of ", shape.size(), " dimensions");
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<std::int64_t>(shape[i], 1);
  }
  std::int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type)), device_type,
                               like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor allocate_like(const Tensor& tensor) { return allocate(tensor, tensor.sizes(), tensor.scalar_type()); }

// What a backward returns for `tensor`: no elements where that is not wanted.
inline Tensor allocate_gradient(const Tensor& tensor, bool wanted) {
  return wanted ? allocate_like(tensor) : allocate(tensor, std::array{std::int64_t{0}}, tensor.scalar_type());
}

// Of such a gradient. One without elements has no data to the core.
inline TensorView gradient_view(const Tensor& gradient) { return gradient.numel() > 0 ? view(gradient) : TensorView{}; }

inline Tensor compact_copy(const Tensor& tensor) {
  Tensor copy = allocate_like(tensor);
  return torch::stable::copy_(copy, tensor);
}

// Options as the core sees them.

inline Window window_of(const char* op, bool causal, const std::optional<std::vector<std::int64_t>>& sides) {
  Window window;
  if (sides) {
    require(sides->size() == 2, op, ": window must be (left, right), got ", list(*sides));
    window = {(*sides)[0], (*sides)[1]};
  }
  if (causal) {
    window.right = window.right == kUnbounded ? 0 : std::min<std::int64_t>(window.right, 0);
  }
  return window;
}

inline float scale_of(std::optional<double> scale, const Tensor& q) {
  return static_cast<float>(scale ? *scale : 1 / std::sqrt(std::max(1., static_cast<double>(head_dim_of(q)))));
}

// Memory for one call, aligned as the core asks (AttentionBackward::workspace); null if it is of no bytes.
class Workspace {
 public:
  Workspace(const Tensor& like, std::size_t bytes) {
    if (bytes > 0) {
      const std::array shape{static_cast<std::int64_t>(bytes + kAlignment)};
      memory_ = allocate(like, shape, ScalarType::Byte);
    }
  }

  void* address() const {
    const auto address = memory_ ? reinterpret_cast<std::uintptr_t>(memory_->mutable_data_ptr()) : 0;
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr std::uintptr_t kAlignment = 256;
  std::optional<Tensor> memory_;
};

// One call of an op: judges its tensors by name. The tensors returned can be handed to the core as they are.
template <class Place>
class Call {
 public:
  // `first` is the tensor whose device decides, `name` its name.
  Call(const char* op, const Tensor& first, const char* name = "q") : op_(op), first_(name), device_(first.device()) {}

  Tensor input(const char* name, const Tensor& tensor) const {
    check(name, tensor);
    return addressable(name, tensor);
  }

  // Without a batch.
  Tensor packed_input(const char* name, const Tensor& tensor) const {
    check_packed(name, tensor);
    return addressable(name, tensor);
  }

  // Queries or keys of 8 bits.
  Tensor low_bit_input(const char* name, const Tensor& tensor) const {
    check_axes(name, tensor);
    require(has_low_bits(tensor.scalar_type()), op_, ": ", name, " must be int8 or float8_e4m3fn, got ",
            tensor.scalar_type());
    return addressable(name, tensor);
  }

  // Autograd makes gradients in any layout, expanded ones among them.
  Tensor gradient(const char* name, const Tensor& tensor) const {
    check(name, tensor);
    return addressable_copy(tensor);
  }
  Tensor packed_gradient(const char* name, const Tensor& tensor) const {
    check_packed(name, tensor);
    return addressable_copy(tensor);
  }

  // Which gradients a backward is to compute.
  void check_wanted(const std::vector<bool>& wanted, std::size_t gradients) const {
    require(wanted.size() == gradients, op_, ": wanted must have one value for each of ", gradients, " gradients, got ",
            wanted.size());
  }

  // An array of this very type and shape; `axes` is what the shape means.
  Tensor array(const char* name, const Tensor& tensor, ScalarType type, const char* axes,
               const std::vector<std::int64_t>& shape) const {
    require(std::ranges::equal(tensor.sizes(), shape) && tensor.scalar_type() == type, op_, ": ", name, " must be ",
            type, " ", axes, " = ", list(shape), ", got ", tensor.scalar_type(), " ", list(tensor.sizes()));
    check_device(name, tensor);
    return torch::stable::contiguous(tensor);
  }

  // The order of the tokens of a tensor of `batch` entries and `heads` heads. `tensor` is kept for the core to read.
  Permutation permutation(const char* name, std::optional<Tensor>& tensor, std::int64_t batch, std::int64_t tokens,
                          std::int64_t heads) const {
    if (!tensor) {
      return {};
    }
    const Permutation permutation{nullptr, shared_extent(*tensor, 0, batch), shared_extent(*tensor, 1, heads)};
    tensor = array(name, *tensor, ScalarType::Int, "[batch or 1, heads or 1, tokens]",
                   {permutation.batch, permutation.heads, tokens});
    return {tensor->const_data_ptr<std::int32_t>(), permutation.batch, permutation.heads};
  }

  // One float for each row of q.
  Tensor row_statistics(const char* name, const Tensor& tensor, const Tensor& q) const {
    const auto shape = q.sizes();
    return array(name, tensor, ScalarType::Float, "[batch, heads, seq_q]", {shape[0], shape[2], shape[1]});
  }

  // A term for each key, as the core reads it: rows of whole units of a copy. `tensor` is kept for the core to read.
  KeyBias key_bias(const char* name, std::optional<Tensor>& tensor, const Tensor& q, const Tensor& k) const {
    if (!tensor) {
      return {};
    }
    const std::int64_t keys = k.sizes()[1];
    const std::int64_t batch = shared_extent(*tensor, 0, q.sizes()[0]), heads = shared_extent(*tensor, 1, q.sizes()[2]);
    tensor = array(name, *tensor, ScalarType::Float, "[batch or 1, heads or 1, seq_k]", {batch, heads, keys});
    const bool aligned = reinterpret_cast<std::uintptr_t>(tensor->data_ptr()) % 16 == 0;
    if (!aligned || keys != padded_tokens(keys)) {
      Tensor padded = allocate(*tensor, std::array{batch, heads, padded_tokens(keys)}, ScalarType::Float);
      Tensor part = torch::stable::narrow(padded, 2, 0, keys);
      torch::stable::copy_(part, *tensor);
      tensor = padded;
    }
    return {tensor->const_data_ptr<float>(), batch, heads};
  }

  // Integers that may be missing; null then. `tensor` is kept for the core to read.
  const std::int32_t* integers(const char* name, std::optional<Tensor>& tensor, const char* axes,
                               std::int64_t count) const {
    if (!tensor) {
      return nullptr;
    }
    tensor = array(name, *tensor, ScalarType::Int, axes, {count});
    return tensor->const_data_ptr<std::int32_t>();
  }

  // The sides of windows of each head's own.
  void set_head_windows(std::optional<Tensor>& left, std::optional<Tensor>& right, const Tensor& q,
                        Attention& problem) const {
    problem.head_left = integers("window_left", left, "[heads]", heads_of(q));
    problem.head_right = integers("window_right", right, "[heads]", heads_of(q));
  }

  // One float for each head of q; null if there are none.
  const float* head_values(const char* name, const std::optional<Tensor>& tensor, const Tensor& q) const {
    if (!tensor) {
      return nullptr;
    }
    const std::int64_t heads = heads_of(q);
    require(tensor->dim() == 1 && tensor->sizes()[0] == heads && tensor->scalar_type() == ScalarType::Float &&
                (heads <= 1 || tensor->stride(0) == 1),
            op_, ": ", name, " must be contiguous Float [heads] = [", heads, "], got ", tensor->scalar_type(), " ",
            list(tensor->sizes()));
    check_device(name, *tensor);
    return tensor->const_data_ptr<float>();
  }

 private:
  // 1 where all of an axis of [batch, heads, …] share one entry, else all there are.
  static std::int64_t shared_extent(const Tensor& tensor, int axis, std::int64_t all) {
    return tensor.dim() == 3 && tensor.sizes()[axis] == 1 ? 1 : all;
  }

  void check(const char* name, const Tensor& tensor) const {
    check_axes(name, tensor);
    check_dtype(name, tensor);
  }

  void check_packed(const char* name, const Tensor& tensor) const {
    require(tensor.dim() == 3, op_, ": ", name, " must have 3 dimensions, [tokens, heads, head_dim], got ",
            list(tensor.sizes()));
    check_device(name, tensor);
    check_dtype(name, tensor);
  }

  void check_dtype(const char* name, const Tensor& tensor) const {
    const ScalarType type = tensor.scalar_type();
    require(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op_, ": ", name,
            " must be float32, float16 or bfloat16, got ", type);
  }

  void check_axes(const char* name, const Tensor& tensor) const {
    require(tensor.dim() == 4, op_, ": ", name, " must have 4 dimensions, [batch, seq, heads, head_dim], got ",
            list(tensor.sizes()));
    check_device(name, tensor);
  }

  Tensor addressable(const char* name, const Tensor& tensor) const {
    require(last_dim_is_contiguous(tensor), op_, ": ", name, " must be contiguous in its last dimension, got strides ",
            list(tensor.strides()));
    return Place::addresses(tensor) ? tensor : compact_copy(tensor);
  }

  static Tensor addressable_copy(const Tensor& tensor) {
    return last_dim_is_contiguous(tensor) && Place::addresses(tensor) ? tensor : compact_copy(tensor);
  }

  void check_device(const char* name, const Tensor& tensor) const {
    require(tensor.device() == device_, op_, ": ", name, " must be on the device of ", first_, ", ", name_of(device_),
            ", got ", name_of(tensor.device()));
  }

  const char *op_, *first_;
  torch::stable::Device device_;
};

// Where an op runs. `executor` is what the core takes; `addresses` tells whether its kernels can read a tensor in
// place.

struct TorchThreads final : Threads {
  void run(std::int64_t count, Task task, void* context) const override {
    // Tasks differ in size (think causal): each worker takes the next one when it is free.
    std::atomic<std::int64_t> next{0};
    const std::int64_t workers = std::min<std::int64_t>(count, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, workers, 1, [&](std::int64_t, std::int64_t) {
      for (std::int64_t i = next++; i < count; i = next++) {
        task(context, i);
      }
    });
  }
};

struct Cpu {
  static constexpr std::size_t kForwardWorkspace = 0;

  explicit Cpu(const Tensor&) {}
  static bool addresses(const Tensor&) { return true; }

  TorchThreads executor;
};

// The stream that torch is using on this device. Throws where fastattn or torch has no CUDA.
Stream current_cuda_stream(std::int32_t device);

struct Cuda {
  static constexpr std::size_t kForwardWorkspace = fastattn::kForwardWorkspace;

  explicit Cuda(const Tensor& q) : executor(current_cuda_stream(q.get_device_index())), device(q.get_device_index()) {}

  // TMA reads 16-byte units. Other layouts are copied once.
  static bool addresses(const Tensor& tensor) {
    const std::int64_t bytes = tensor.element_size();
    bool aligned = reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) % 16 == 0;
    for (std::int64_t i = 0; i < tensor.dim() - 1; ++i) {
      const std::int64_t stride = tensor.stride(i) * bytes;
      aligned = aligned && (tensor.sizes()[i] <= 1 || (stride > 0 && stride % 16 == 0));
    }
    return aligned;
  }

  Stream executor;
  torch::stable::accelerator::DeviceGuard device;
};

}  // namespace fastattn::binding

// The torch ops: implementations only. python/fastattn declares their schemas and everything else torch wants to know.
//
// Written on LibTorch's stable ABI, so that one library serves every torch from 2.11 on. What is checked here is what
// only torch knows (rank, dtype, device, contiguity); the core checks the rest. Either refusal becomes an exception.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fastattn/fastattn.hpp"

// Defined in libtorch_cuda, absent from a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device, void** stream);

namespace fastattn {
namespace {

using torch::headeronly::DeviceType;
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

void require(const Status& status) { require(status.ok(), status.message); }

// Tensors as the core sees them.

std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << '[';
  for (std::size_t i = 0; i < values.size(); ++i) {
    text << (i == 0 ? "" : ", ") << values[i];
  }
  text << ']';
  return text.str();
}

std::string name_of(const torch::stable::Device& device) {
  const std::string type = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another kind";
  return device.is_cpu() ? type : type + ":" + std::to_string(device.index());
}

TensorView view(const Tensor& tensor) {
  TensorView view{.data = tensor.data_ptr()};
  std::ranges::copy(tensor.sizes(), view.shape);
  std::ranges::copy(tensor.strides(), view.stride);
  const ScalarType type = tensor.scalar_type();
  view.dtype = type == ScalarType::Float  ? DType::kFloat32
               : type == ScalarType::Half ? DType::kFloat16
                                          : DType::kBFloat16;
  return view;
}

bool last_dim_is_contiguous(const Tensor& tensor) {
  return tensor.numel() == 0 || tensor.sizes()[3] == 1 || tensor.stride(3) == 1;
}

Tensor compact_copy(const Tensor& tensor) {
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  return torch::stable::copy_(copy, tensor);
}

// One call of an op: judges its tensors by name. The tensors returned can be handed to the core as they are.
template <class Place>
class Call {
 public:
  Call(const char* op, const Tensor& q) : op_(op), device_(q.device()) {}

  Tensor input(const char* name, const Tensor& tensor) const {
    check(name, tensor);
    require(last_dim_is_contiguous(tensor), op_, ": ", name, " must be contiguous in its last dimension, got strides ",
            list(tensor.strides()));
    return Place::addresses(tensor) ? tensor : compact_copy(tensor);
  }

  // Autograd makes gradients in any layout, expanded ones among them.
  Tensor gradient(const char* name, const Tensor& tensor) const {
    check(name, tensor);
    return last_dim_is_contiguous(tensor) && Place::addresses(tensor) ? tensor : compact_copy(tensor);
  }

  // One float for each row of q.
  Tensor row_statistics(const char* name, const Tensor& tensor, const Tensor& q) const {
    const auto shape = q.sizes();
    const std::vector<std::int64_t> expected = {shape[0], shape[2], shape[1]};
    require(std::ranges::equal(tensor.sizes(), expected) && tensor.scalar_type() == ScalarType::Float, op_, ": ", name,
            " must be Float [batch, heads, seq_q] = ", list(expected), ", got ", tensor.scalar_type(), " ",
            list(tensor.sizes()));
    check_device(name, tensor);
    return torch::stable::contiguous(tensor);
  }

 private:
  void check(const char* name, const Tensor& tensor) const {
    require(tensor.dim() == 4, op_, ": ", name, " must have 4 dimensions, [batch, seq, heads, head_dim], got ",
            list(tensor.sizes()));
    check_device(name, tensor);
    const ScalarType type = tensor.scalar_type();
    require(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op_, ": ", name,
            " must be float32, float16 or bfloat16, got ", type);
  }

  void check_device(const char* name, const Tensor& tensor) const {
    require(tensor.device() == device_, op_, ": ", name, " must be on the device of q, ", name_of(device_), ", got ",
            name_of(tensor.device()));
  }

  const char* op_;
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
  explicit Cpu(const Tensor&) {}
  static bool addresses(const Tensor&) { return true; }

  TorchThreads executor;
};

Stream current_cuda_stream(std::int32_t device) {
  require(built_with_cuda(), "fastattn is built without CUDA; pass CPU tensors");
  auto* get_stream = &aoti_torch_get_current_cuda_stream;
  if (get_stream == nullptr) {  // a torch that loads libtorch_cuda apart from libtorch
    if (void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY)) {
      get_stream = reinterpret_cast<decltype(get_stream)>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
      dlclose(library);
    }
  }
  require(get_stream != nullptr, "this torch has no CUDA; pass CPU tensors");
  Stream stream;
  require(get_stream(device, &stream.handle) == AOTI_TORCH_SUCCESS, "torch gave no current stream of cuda:", device);
  return stream;
}

struct Cuda {
  explicit Cuda(const Tensor& q) : executor(current_cuda_stream(q.get_device_index())), device(q.get_device_index()) {}

  // TMA reads 16-byte units. Other layouts are copied once.
  static bool addresses(const Tensor& tensor) {
    const std::int64_t bytes = tensor.element_size();
    bool aligned = reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) % 16 == 0;
    for (std::int64_t i = 0; i < 3; ++i) {
      const std::int64_t stride = tensor.stride(i) * bytes;
      aligned = aligned && (tensor.sizes()[i] <= 1 || (stride > 0 && stride % 16 == 0));
    }
    return aligned;
  }

  Stream executor;
  torch::stable::accelerator::DeviceGuard device;
};

// attention

Window window_of(const char* op, bool causal, const std::optional<std::vector<std::int64_t>>& sides) {
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

float scale_of(std::optional<double> scale, const Tensor& q) {
  return static_cast<float>(scale ? *scale : 1 / std::sqrt(std::max(1., static_cast<double>(q.sizes()[3]))));
}

template <class Place>
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<double> scale, bool causal,
                                     std::optional<std::vector<std::int64_t>> window) {
  constexpr const char* kOp = "attention";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  const Place place(q);
  const std::int64_t rows[] = {q.sizes()[0], q.sizes()[2], q.sizes()[1]};
  const Tensor out = torch::stable::new_empty(q, q.sizes());
  const Tensor lse = torch::stable::new_empty(q, rows, ScalarType::Float);
  require(fastattn::attention({.q = view(q),
                               .k = view(k),
                               .v = view(v),
                               .out = view(out),
                               .lse = lse.mutable_data_ptr<float>(),
                               .scale = scale_of(scale, q),
                               .window = window_of(kOp, causal, window)},
                              place.executor));
  return {out, lse};
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                                                      Tensor v, Tensor out, Tensor lse, std::optional<double> scale,
                                                      bool causal, std::optional<std::vector<std::int64_t>> window) {
  constexpr const char* kOp = "attention_backward";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  out = call.input("out", out);
  dout = call.gradient("dout", dout);
  lse = call.row_statistics("lse", lse, q);
  if (dlse) {
    dlse = call.row_statistics("dlse", *dlse, q);
  }
  const Place place(q);
  const Tensor dq = torch::stable::new_empty(q, q.sizes());
  const Tensor dk = torch::stable::new_empty(k, k.sizes());
  const Tensor dv = torch::stable::new_empty(v, v.sizes());
  AttentionBackward problem{.forward = {.q = view(q),
                                        .k = view(k),
                                        .v = view(v),
                                        .out = view(out),
                                        .lse = lse.mutable_data_ptr<float>(),
                                        .scale = scale_of(scale, q),
                                        .window = window_of(kOp, causal, window)},
                            .dout = view(dout),
                            .dlse = dlse ? dlse->const_data_ptr<float>() : nullptr,
                            .dq = view(dq),
                            .dk = view(dk),
                            .dv = view(dv)};
  constexpr std::uintptr_t kAlignment = 256;  // asked for by AttentionBackward::workspace
  const std::int64_t bytes[] = {
      static_cast<std::int64_t>(attention_backward_workspace(problem, place.executor) + kAlignment)};
  const Tensor workspace = torch::stable::new_empty(q, bytes, ScalarType::Byte);
  const auto address = reinterpret_cast<std::uintptr_t>(workspace.mutable_data_ptr());
  problem.workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  require(fastattn::attention_backward(problem, place.executor));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention<Cpu>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention<Cuda>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cuda>));
}

}  // namespace fastattn

// What Python asks of the build, through ctypes.
extern "C" [[gnu::visibility("default")]] const char* fastattn_cpu_instruction_set() {
  return fastattn::cpu_instruction_set();
}
extern "C" [[gnu::visibility("default")]] bool fastattn_built_with_cuda() { return fastattn::built_with_cuda(); }

// Host side of the Hopper kernels: tensor maps, the choice of a configuration, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "fastattn/fastattn.hpp"
#include "ops/validate.hpp"
#include "sm90/capability.hpp"
#include "sm90/config.hpp"
#include "sm90/tma.cuh"

namespace fastattn::sm90 {

inline Status check(cudaError_t error, const char* what) {
  return error == cudaSuccess ? Status{} : failure("%s: %s", what, cudaGetErrorString(error));
}

// Is the current device one that these kernels run on?
inline Status check_device() {
  int device = 0, major = 0, minor = 0;
  if (const Status status = check(cudaGetDevice(&device), "cudaGetDevice"); !status.ok()) {
    return status;
  }
  // Binds the device's context to this thread: the driver's encoder needs one, and a thread of autograd's may have
  // none.
  if (const Status status = check(cudaSetDevice(device), "cudaSetDevice"); !status.ok()) {
    return status;
  }
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return check_capability(device, major, minor);
}

// SMs of the current device.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Enqueues zeros.
inline Status clear(void* memory, std::size_t bytes, Stream stream) {
  return check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream.handle)), "cudaMemsetAsync");
}

// Describes `view` to the copy engine in tiles of `rows` consecutive tokens, or of boxes of a grid, with panels whose
// rows are `row_bytes` long.
Status encode(const TensorView& view, int rows, int row_bytes, TensorMap<int>& map);
Status encode(const TensorView& view, int rows, int row_bytes, TensorMap<SequenceOrigin>& map);
Status encode(const TensorView& view, GroupBox box, int row_bytes, TensorMap<GroupOrigin>& map);
Status encode(const TensorView& view, const GridBox& box, int row_bytes, TensorMap<PerAxis<int>>& map);
// The same of [batch, heads, channels, tokens], in tiles of `rows` channels.
Status encode(const TensorView& view, int rows, int row_bytes, TransposedMap& map);

// Picks the first configuration that has_room(it) and suits(it), or the last one of its head_dim with room, and calls
// launch.operator()<its index>().
template <const auto& kConfigs, class HasRoom, class Suits, class Launch>
Status dispatch(const char* op, std::int64_t head_dim, HasRoom&& has_room, Suits&& suits, Launch&& launch) {
  constexpr std::size_t kCount = std::size(kConfigs);
  const auto fits = [&](std::size_t i) {
    const auto is_last = [&] {
      return i + 1 == kCount || kConfigs[i + 1].head_dim > kConfigs[i].head_dim || !has_room(kConfigs[i + 1]);
    };
    return has_room(kConfigs[i]) && (is_last() || suits(kConfigs[i]));
  };
  Status status;
  const bool found = [&]<std::size_t... i>(std::index_sequence<i...>) {
    return ((fits(i) && (status = launch.template operator()<i>(), true)) || ...);
  }(std::make_index_sequence<kCount>{});
  return found ? status
               : failure("%s: head_dim must be at most %d on the GPU, got %lld", op, kConfigs[kCount - 1].head_dim,
                         static_cast<long long>(head_dim));
}

// The same where each head_dim has one configuration.
template <const auto& kConfigs, class Launch>
Status dispatch(const char* op, std::int64_t head_dim, Launch&& launch) {
  const auto has_room = [head_dim](const auto& config) { return head_dim <= config.head_dim; };
  return dispatch<kConfigs>(op, head_dim, has_room, [](const auto&) { return true; }, launch);
}

// Launches `blocks` thread blocks of a kernel that uses `shared_bytes` of dynamic shared memory.
template <class Params>
Status launch(void (*kernel)(Params), std::int64_t blocks, int threads, std::size_t shared_bytes, Stream stream,
              const Params& params) {
  if (blocks == 0) {
    return {};
  }
  if (blocks > 0x7fffffff) {
    return failure("the problem needs %lld thread blocks, at most 2147483647 fit a launch",
                   static_cast<long long>(blocks));
  }
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      return check(error, "cudaFuncSetAttribute");
    }
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(params);
  return check(cudaGetLastError(), "kernel launch");
}

// The same of a kernel that waits by itself (cudaGridDependencySynchronize) for the one before it in the stream, so
// that its launch takes place while that one is still running.
template <class Params>
Status launch_early(void (*kernel)(Params), std::int64_t blocks, int threads, Stream stream, const Params& params) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &early;
  config.numAttrs = 1;
  return check(cudaLaunchKernelEx(&config, kernel, params), "kernel launch");
}

}  // namespace fastattn::sm90

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "sm90/launch.cuh"

namespace fastattn::sm90 {

namespace {

// The driver's encoder, found through the runtime so that the library loads without libcuda.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)
             : nullptr;
}

}  // namespace

Status encode(const TensorView& view, int rows, TensorMap& map) {
  static const auto encoder = find_encoder();
  if (encoder == nullptr) {
    return failure("the CUDA driver has no cuTensorMapEncodeTiled: version 12.0 or newer is needed");
  }
  if (view.size() == 0) {
    return {};  // never loaded from nor stored to
  }
  constexpr std::uint64_t kElementBytes = 2;
  constexpr int kOrder[4] = {3, 1, 2, 0};  // fastest first: head_dim, seq, heads, batch
  cuuint64_t extent[4], stride[3];
  for (int i = 0; i < 4; ++i) {
    extent[i] = static_cast<cuuint64_t>(view.shape[kOrder[i]]);
  }
  for (int i = 0; i < 3; ++i) {
    // The stride of an axis of length 1 means nothing and may be anything; the encoder still wants a multiple of 16
    // bytes.
    const int axis = kOrder[i + 1];
    stride[i] = view.shape[axis] == 1 ? 16 : static_cast<cuuint64_t>(view.stride[axis]) * kElementBytes;
  }
  const cuuint32_t box[4] = {kPanelColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      view.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encoder(&map.map, type, 4, view.data, extent, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return failure(
        "no tensor map for shape [%lld, %lld, %lld, %lld], strides [%lld, %lld, %lld, %lld]: GPU tensors need a "
        "16-byte aligned base and strides of a multiple of 8 elements (CUresult %d)",
        static_cast<long long>(view.shape[0]), static_cast<long long>(view.shape[1]),
        static_cast<long long>(view.shape[2]), static_cast<long long>(view.shape[3]),
        static_cast<long long>(view.stride[0]), static_cast<long long>(view.stride[1]),
        static_cast<long long>(view.stride[2]), static_cast<long long>(view.stride[3]), static_cast<int>(result));
  }
  return {};
}

}  // namespace fastattn::sm90

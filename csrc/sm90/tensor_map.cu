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

// A tensor as the copy engine addresses it, fastest dimension first.
struct Layout {
  int rank;
  cuuint64_t extent[5], stride[4];  // strides in elements, of every dimension but the first
  cuuint32_t box[5], step[5];
};

Status encode(const TensorView& view, Layout layout, CUtensorMap& map) {
  static const auto encoder = find_encoder();
  if (encoder == nullptr) {
    return failure("the CUDA driver has no cuTensorMapEncodeTiled: version 12.0 or newer is needed");
  }
  if (view.size() == 0) {
    return {};  // never loaded from
  }
  const auto element_bytes = static_cast<std::uint64_t>(size_of(view.dtype));
  for (int i = 0; i < layout.rank - 1; ++i) {
    // The stride of an axis of length 1 means nothing and may be anything; the encoder still wants a multiple of 16
    // bytes.
    layout.stride[i] = layout.extent[i + 1] == 1 ? 16 : layout.stride[i] * element_bytes;
  }
  const CUtensorMapDataType type = element_bytes == 1               ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : view.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle =
      layout.box[0] * element_bytes == kWidePanelRow ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result = encoder(&map, type, layout.rank, view.data, layout.extent, layout.stride, layout.box,
                                  layout.step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return failure(
        "no tensor map for shape [%lld, %lld, %lld, %lld], strides [%lld, %lld, %lld, %lld]: GPU tensors need a "
        "16-byte aligned base and strides of a multiple of 16 bytes (CUresult %d)",
        static_cast<long long>(view.shape[0]), static_cast<long long>(view.shape[1]),
        static_cast<long long>(view.shape[2]), static_cast<long long>(view.shape[3]),
        static_cast<long long>(view.stride[0]), static_cast<long long>(view.stride[1]),
        static_cast<long long>(view.stride[2]), static_cast<long long>(view.stride[3]), static_cast<int>(result));
  }
  return {};
}

cuuint32_t panel_columns(DType dtype, int row_bytes) { return static_cast<cuuint32_t>(row_bytes / size_of(dtype)); }

// A tensor whose dimensions are, from the fastest on, those of `order`; boxes of `rows` of the second one, and of so
// many of the third.
Status encode(const TensorView& view, const int (&order)[4], int rows, int row_bytes, CUtensorMap& map, int third = 1) {
  Layout layout{
      .rank = 4,
      .extent = {},
      .stride = {},
      .box = {panel_columns(view.dtype, row_bytes), static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(third), 1},
      .step = {1, 1, 1, 1}};
  for (int i = 0; i < 4; ++i) {
    layout.extent[i] = static_cast<cuuint64_t>(view.shape[order[i]]);
    if (i > 0) {
      layout.stride[i - 1] = static_cast<cuuint64_t>(view.stride[order[i]]);
    }
  }
  return encode(view, layout, map);
}

// How many of `extent` tokens, `step` apart, one copy can take: it spans at most 256.
int part_of(int extent, int step) {
  int part = extent;
  while (part * step > 256) {
    part /= 2;
  }
  return part;
}

}  // namespace

Status encode(const TensorView& view, int rows, int row_bytes, TensorMap<int>& map) {
  constexpr int kOrder[4] = {3, 1, 2, 0};  // head_dim, tokens, heads, batch
  return encode(view, kOrder, rows, row_bytes, map.map);
}

Status encode(const TensorView& view, GroupBox box, int row_bytes, TensorMap<GroupOrigin>& map) {
  constexpr int kOrder[4] = {3, 2, 1, 0};  // head_dim, heads, tokens, batch
  return encode(view, kOrder, box.heads, row_bytes, map.map, box.queries);
}

Status encode(const TensorView& view, int rows, int row_bytes, TensorMap<SequenceOrigin>& map) {
  constexpr auto kRows = static_cast<cuuint64_t>(TensorMap<SequenceOrigin>::kRows);
  const auto token = static_cast<cuuint64_t>(view.stride[1]);
  const cuuint64_t wrap = (std::uint64_t{1} << 34) / static_cast<std::uint64_t>(size_of(view.dtype));
  const Layout layout{.rank = 5,
                      .extent = {static_cast<cuuint64_t>(view.head_dim()), kRows, static_cast<cuuint64_t>(view.heads()),
                                 static_cast<cuuint64_t>(view.seq() + 1), kRows + 1},
                      .stride = {token, static_cast<cuuint64_t>(view.stride[2]), token, wrap - token},
                      .box = {panel_columns(view.dtype, row_bytes), static_cast<cuuint32_t>(rows), 1, 1, 1},
                      .step = {1, 1, 1, 1, 1}};
  return encode(view, layout, map.map);
}

Status encode(const TensorView& view, int rows, int row_bytes, TransposedMap& map) {
  constexpr int kOrder[4] = {3, 2, 1, 0};  // tokens, channels, heads, batch
  return encode(view, kOrder, rows, row_bytes, map.map);
}

Status encode(const TensorView& view, const GridBox& box, int row_bytes, TensorMap<PerAxis<int>>& map) {
  if (view.heads() > 1 && view.stride[2] != view.head_dim()) {
    return failure("GPU tensors over a grid need heads side by side: a stride of head_dim, %lld, got %lld",
                   static_cast<long long>(view.head_dim()), static_cast<long long>(view.stride[2]));
  }
  map.box = box;
  map.has_parts = false;
  map.head_dim = static_cast<int>(view.head_dim());
  Layout layout{
      .rank = 2 + kAxes, .extent = {}, .stride = {}, .box = {panel_columns(view.dtype, row_bytes)}, .step = {1}};
  layout.extent[0] = static_cast<cuuint64_t>(view.heads() * view.head_dim());
  cuuint64_t stride = static_cast<cuuint64_t>(view.stride[1]);
  for (int axis = kAxes - 1, i = 1; axis >= 0; --axis, ++i) {
    map.part[axis] = part_of(box.extent[axis], box.step[axis]);
    map.has_parts |= map.part[axis] < box.extent[axis];
    layout.extent[i] = static_cast<cuuint64_t>(box.length[axis]);
    layout.stride[i - 1] = stride;
    layout.step[i] = static_cast<cuuint32_t>(box.step[axis]);
    layout.box[i] = static_cast<cuuint32_t>(map.part[axis]) * layout.step[i];
    stride *= layout.extent[i];
  }
  layout.extent[kAxes + 1] = static_cast<cuuint64_t>(view.batch());
  layout.stride[kAxes] = static_cast<cuuint64_t>(view.stride[0]);
  layout.box[kAxes + 1] = layout.step[kAxes + 1] = 1;
  return encode(view, layout, map.map);
}

}  // namespace fastattn::sm90

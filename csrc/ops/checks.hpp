// What the judgements of several ops share: tensors, shapes, windows and lists of blocks.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/validate.hpp"

namespace fastattn {

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt8:
      return "int8";
    case DType::kFloat8:
      return "float8_e4m3fn";
  }
  return "an unknown dtype";
}

using Long = long long;

// A tensor by the name its messages use.
struct Named {
  const char* name;
  const TensorView& view;
};

inline bool has_low_bits(const TensorView& view) { return view.dtype == DType::kInt8 || view.dtype == DType::kFloat8; }

inline Status check_dtype(const char* op, Named tensor) {
  const DType dtype = tensor.view.dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    return failure("%s: %s must be float32, float16 or bfloat16, got %s", op, tensor.name, name_of(dtype));
  }
  return {};
}

inline Status check_head_dim(const char* op, std::int64_t head_dim, const char* name = "head_dim") {
  if (head_dim < kHeadDimStep || head_dim > kMaxHeadDim || head_dim % kHeadDimStep != 0) {
    return failure("%s: %s must be a multiple of 8 between 8 and 256, got %lld", op, name, Long{head_dim});
  }
  return {};
}

inline Status check_scale(const char* op, float scale) {
  if (!std::isfinite(scale) || scale <= 0.f) {
    return failure("%s: scale must be finite and positive, got %g", op, static_cast<double>(scale));
  }
  return {};
}

inline Status check_seq(const char* op, Named tensor) {
  if (tensor.view.seq() > kMaxSeq) {
    return failure("%s: %s must be shorter than 2^30, got %lld", op, tensor.name, Long{tensor.view.seq()});
  }
  return {};
}

inline Status check_layout(const char* op, Named tensor, DType dtype) {
  const TensorView& view = tensor.view;
  for (int axis = 0; axis < 4; ++axis) {
    if (view.shape[axis] < 0) {
      return failure("%s: %s has a negative size, %lld, at axis %d", op, tensor.name, Long{view.shape[axis]}, axis);
    }
  }
  if (view.dtype != dtype) {
    return failure("%s: %s must have the dtype of q, %s, got %s", op, tensor.name, name_of(dtype), name_of(view.dtype));
  }
  if (view.size() > 0 && view.data == nullptr) {
    return failure("%s: %s has no data", op, tensor.name);
  }
  if (view.size() > 0 && view.stride[3] != 1) {
    return failure("%s: %s must be contiguous in its last dimension, got stride %lld", op, tensor.name,
                   Long{view.stride[3]});
  }
  return {};
}

inline Status check_shape(const char* op, Named tensor, Named like) {
  const std::int64_t *got = tensor.view.shape, *want = like.view.shape;
  for (int axis = 0; axis < 4; ++axis) {
    if (got[axis] != want[axis]) {
      return failure("%s: %s must have the shape of %s, [%lld, %lld, %lld, %lld], got [%lld, %lld, %lld, %lld]", op,
                     tensor.name, like.name, Long{want[0]}, Long{want[1]}, Long{want[2]}, Long{want[3]}, Long{got[0]},
                     Long{got[1]}, Long{got[2]}, Long{got[3]});
    }
  }
  return {};
}

inline Status check_window_side(const char* op, const char* side, std::int64_t width) {
  if (width < kUnbounded) {
    return failure("%s: window.%s must be at least 0, or -1 for no bound, got %lld", op, side, Long{width});
  }
  return {};
}

// The tensor is laid out as the kernels want it and has the shape of `like`.
inline Status check_like(const char* op, Named tensor, Named like, DType dtype) {
  const Status status = check_layout(op, tensor, dtype);
  return status.ok() ? check_shape(op, tensor, like) : status;
}

// What every op has: queries, keys and the scale.
template <class Problem>
Status check_queries_and_keys(const char* op, const Problem& problem) {
  const TensorView &q = problem.q, &k = problem.k;
  for (const Named tensor : {Named{"q", q}, Named{"k", k}}) {
    if (Status status = check_layout(op, tensor, q.dtype); !status.ok()) {
      return status;
    }
  }
  if (Status status = check_head_dim(op, q.head_dim()); !status.ok()) {
    return status;
  }
  if (k.head_dim() != q.head_dim()) {
    return failure("%s: k must have the head_dim of q, %lld, got %lld", op, Long{q.head_dim()}, Long{k.head_dim()});
  }
  if (k.batch() != q.batch()) {
    return failure("%s: k must have the batch size of q, %lld, got %lld", op, Long{q.batch()}, Long{k.batch()});
  }
  if (q.heads() > 0 && (k.heads() == 0 || q.heads() % k.heads() != 0)) {
    return failure("%s: the heads of q must be a multiple of those of k, got %lld and %lld", op, Long{q.heads()},
                   Long{k.heads()});
  }
  for (const Named tensor : {Named{"q", q}, Named{"k", k}}) {
    if (Status status = check_seq(op, tensor); !status.ok()) {
      return status;
    }
  }
  return check_scale(op, problem.scale);
}

template <class Problem>
Status check_window(const char* op, const Problem& problem) {
  if (Status status = check_window_side(op, "left", problem.window.left); !status.ok()) {
    return status;
  }
  return check_window_side(op, "right", problem.window.right);
}

inline Status check_block_rows(const char* op, const char* name, const BlockRows& rows, std::int64_t num_rows,
                               int width) {
  if (num_rows > kMaxSeq) {
    return failure("%s: blocks.%s must be fewer than 2^30 over all heads, got %lld", op, name, Long{num_rows});
  }
  if (num_rows > 0 && (rows.counts == nullptr || (width > 0 && rows.indices == nullptr))) {
    return failure("%s: blocks.%s is needed and has no data", op, name);
  }
  return {};
}

// Lists may have blocks of 192 queries, for the tiles that suit head_dim 64.
inline Status check_block_size(const char* op, TileShape block, int most_queries) {
  const auto allowed = [](int size, int most) { return size % 64 == 0 && 64 <= size && size <= most; };
  return allowed(block.q, most_queries) && allowed(block.k, 128)
             ? Status{}
             : failure("%s: a block must have %s queries and 64 or 128 keys, got %d x %d", op,
                       most_queries == 192 ? "64, 128 or 192" : "64 or 128", block.q, block.k);
}

// The shape of the lists. Their contents are in the device's memory, and trusted.
template <class Problem>
Status check_blocks(const char* op, const Problem& problem, const BlockLists& blocks) {
  const auto& [first, batch, heads] = blocks;
  if (first.num_q != problem.q.seq() || first.num_k != problem.k.seq()) {
    return failure("%s: blocks must be of %lld queries and %lld keys, as q and k are, got %d and %d", op,
                   Long{problem.q.seq()}, Long{problem.k.seq()}, first.num_q, first.num_k);
  }
  if (Status status = check_block_size(op, first.block, 192); !status.ok()) {
    return status;
  }
  if ((batch != 1 && batch != problem.q.batch()) || (heads != 1 && heads != problem.q.heads())) {
    return failure("%s: blocks must be of 1 or %lld batch entries and 1 or %lld heads, got %d and %d", op,
                   Long{problem.q.batch()}, Long{problem.q.heads()}, batch, heads);
  }
  for (const int side : {first.left, first.right}) {
    if (side < 0 || side > kMaxSeq) {
      return failure("%s: the sides of blocks' band must be between 0 and 2^30 - 1, got %d and %d", op, first.left,
                     first.right);
    }
  }
  return check_block_rows(op, "rows", first.rows, std::int64_t{batch} * heads * first.blocks_q(), first.blocks_k());
}

}  // namespace fastattn

#include "validate.hpp"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>
#include <iterator>

#include "fastattn/plan/neighborhood_tiles.hpp"

namespace fastattn {

namespace {

const char* name_of(DType dtype) {
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

bool has_low_bits(const TensorView& view) { return view.dtype == DType::kInt8 || view.dtype == DType::kFloat8; }

Status check_dtype(const char* op, Named tensor) {
  const DType dtype = tensor.view.dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    return failure("%s: %s must be float32, float16 or bfloat16, got %s", op, tensor.name, name_of(dtype));
  }
  return {};
}

Status check_head_dim(const char* op, std::int64_t head_dim, const char* name = "head_dim") {
  if (head_dim < kHeadDimStep || head_dim > kMaxHeadDim || head_dim % kHeadDimStep != 0) {
    return failure("%s: %s must be a multiple of 8 between 8 and 256, got %lld", op, name, Long{head_dim});
  }
  return {};
}

Status check_scale(const char* op, float scale) {
  if (!std::isfinite(scale) || scale <= 0.f) {
    return failure("%s: scale must be finite and positive, got %g", op, static_cast<double>(scale));
  }
  return {};
}

Status check_seq(const char* op, Named tensor) {
  if (tensor.view.seq() > kMaxSeq) {
    return failure("%s: %s must be shorter than 2^30, got %lld", op, tensor.name, Long{tensor.view.seq()});
  }
  return {};
}

Status check_layout(const char* op, Named tensor, DType dtype) {
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

Status check_shape(const char* op, Named tensor, Named like) {
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

Status check_window_side(const char* op, const char* side, std::int64_t width) {
  if (width < kUnbounded) {
    return failure("%s: window.%s must be at least 0, or -1 for no bound, got %lld", op, side, Long{width});
  }
  return {};
}

// The tensor is laid out as the kernels want it and has the shape of `like`.
Status check_like(const char* op, Named tensor, Named like, DType dtype) {
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

// Those, and values of the same dtype.
template <class Problem>
Status check_inputs(const char* op, const Problem& problem) {
  if (Status status = check_dtype(op, {"q", problem.q}); !status.ok()) {
    return status;
  }
  if (Status status = check_queries_and_keys(op, problem); !status.ok()) {
    return status;
  }
  return check_like(op, {"v", problem.v}, {"k", problem.k}, problem.q.dtype);
}

template <class Problem>
Status check_output(const char* op, const Problem& problem) {
  return check_like(op, {"out", problem.out}, {"q", problem.q}, problem.q.dtype);
}

// The same of an op whose values may have a width of their own, which its output then has.
template <class Problem>
Status check_inputs_and_output(const char* op, const Problem& problem) {
  const std::int64_t value_dim = problem.v.head_dim();
  Problem as_wide_as_queries = problem;
  as_wide_as_queries.v.shape[3] = as_wide_as_queries.out.shape[3] = problem.q.head_dim();
  if (Status status = check_inputs(op, as_wide_as_queries); !status.ok()) {
    return status;
  }
  if (Status status = check_head_dim(op, value_dim, "the head_dim of v"); !status.ok()) {
    return status;
  }
  if (problem.out.head_dim() != value_dim) {
    return failure("%s: out must have the head_dim of v, %lld, got %lld", op, Long{value_dim},
                   Long{problem.out.head_dim()});
  }
  return check_output(op, as_wide_as_queries);
}

template <class Problem>
Status check_window(const char* op, const Problem& problem) {
  if (Status status = check_window_side(op, "left", problem.window.left); !status.ok()) {
    return status;
  }
  return check_window_side(op, "right", problem.window.right);
}

// The gradients of a backward: that of the output, and those of the inputs that are wanted.
template <class Backward>
Status check_gradients(const char* op, const Backward& problem) {
  const auto& forward = forward_of(problem);
  TensorView out = forward.q;
  out.shape[3] = forward.v.head_dim();
  if (Status status = check_like(op, {"dout", problem.dout}, {"out", out}, forward.q.dtype); !status.ok()) {
    return status;
  }
  const struct {
    Named gradient, of;
  } pairs[] = {{{"dq", problem.dq}, {"q", forward.q}},
               {{"dk", problem.dk}, {"k", forward.k}},
               {{"dv", problem.dv}, {"v", forward.v}}};
  for (const auto& [gradient, of] : pairs) {
    if (gradient.view.data == nullptr) {
      continue;
    }
    if (Status status = check_like(op, gradient, of, forward.q.dtype); !status.ok()) {
      return status;
    }
  }
  return {};
}

// Those, and what the forward of a softmax left.
template <class Backward>
Status check_gradients_and_lse(const char* op, const Backward& problem) {
  if (Status status = check_gradients(op, problem); !status.ok()) {
    return status;
  }
  if (num_rows(forward_of(problem)) > 0 && forward_of(problem).lse == nullptr) {
    return failure("%s: lse is needed and has no data", op);
  }
  return {};
}

// What the gradients of a softmax take beside the inputs.
template <class Backward>
Status check_softmax_gradients(const char* op, const Backward& problem) {
  const Status status = check_output(op, problem.forward);
  return status.ok() ? check_gradients_and_lse(op, problem) : status;
}

// Of rectangles and segments the contents are in the device's memory; whatever they are, they mean something.
Status check_regions(const char* op, const Attention& problem) {
  const auto& [sides, batch, count] = problem.rectangles;
  if (count < 0 || count > Rectangles::kMost) {
    return failure("%s: rectangles must be at most %d, got %lld", op, Rectangles::kMost, Long{count});
  }
  if (num_rows(problem) > 0 && count > 0 && sides == nullptr) {
    return failure("%s: rectangles is needed and has no data", op);
  }
  const auto& [q, k] = problem.segments;
  if (num_rows(problem) > 0 && problem.k.seq() > 0 && (q.ids == nullptr) != (k.ids == nullptr)) {
    return failure("%s: segments must be of queries and of keys, got those of %s alone", op,
                   k.ids == nullptr ? "queries" : "keys");
  }
  const struct {
    const char* name;
    std::int64_t batch;
  } shared[] = {{"rectangles", batch}, {"segments_q", q.batch}, {"segments_k", k.batch}};
  for (const auto& [name, entries] : shared) {
    if (entries != 1 && entries != problem.q.batch()) {
      return failure("%s: %s must be of 1 or %lld batch entries, got %lld", op, name, Long{problem.q.batch()},
                     Long{entries});
    }
  }
  if (problem.has_regions() && problem.modifier().exists()) {
    return failure("%s: %s cannot be combined with %s yet", op, count > 0 ? "rectangles" : "segments",
                   problem.softcap != 0.f ? "softcap" : "key_bias");
  }
  return {};
}

Status check_attention(const char* op, const Attention& problem) {
  if (Status status = check_inputs_and_output(op, problem); !status.ok()) {
    return status;
  }
  if (Status status = check_window(op, problem); !status.ok()) {
    return status;
  }
  if (!std::isfinite(problem.softcap) || problem.softcap < 0.f) {
    return failure("%s: softcap must be finite and positive, or 0 for none, got %g", op,
                   static_cast<double>(problem.softcap));
  }
  const auto& [bias, batch, heads] = problem.key_bias;
  if (bias != nullptr && ((batch != 1 && batch != problem.q.batch()) || (heads != 1 && heads != problem.q.heads()))) {
    return failure("%s: key_bias must be of 1 or %lld batch entries and 1 or %lld heads, got %lld and %lld", op,
                   Long{problem.q.batch()}, Long{problem.q.heads()}, Long{batch}, Long{heads});
  }
  return check_regions(op, problem);
}

Status check_varlen(const char* op, const VarlenAttention& problem) {
  const Attention& attention = problem.attention;
  const Sequences& sequences = problem.sequences;
  if (Status status = check_attention(op, attention); !status.ok()) {
    return status;
  }
  if (attention.q.batch() != 1) {
    return failure("%s: the batch size must be 1, got %lld", op, Long{attention.q.batch()});
  }
  if (attention.key_bias.bias != nullptr) {
    return failure("%s: there is no key_bias, give seqused_k or windows instead", op);
  }
  if (attention.has_regions()) {
    return failure("%s: there are no rectangles and no segments", op);
  }
  if (sequences.count < 1 || sequences.count > kMaxSeq) {
    return failure("%s: there must be between 1 and 2^30 - 1 sequences, got %lld", op, Long{sequences.count});
  }
  if (sequences.cu_seqlens_q == nullptr || sequences.cu_seqlens_k == nullptr) {
    return failure("%s: cu_seqlens_%s has no data", op, sequences.cu_seqlens_q == nullptr ? "q" : "k");
  }
  if (sequences.max_seqlen_q < 0 || sequences.max_seqlen_k < 0) {
    return failure("%s: max_seqlen_q and max_seqlen_k must be at least 0, got %lld and %lld", op,
                   Long{sequences.max_seqlen_q}, Long{sequences.max_seqlen_k});
  }
  return {};
}

Status check_block_rows(const char* op, const char* name, const BlockRows& rows, std::int64_t num_rows, int width) {
  if (num_rows > kMaxSeq) {
    return failure("%s: blocks.%s must be fewer than 2^30 over all heads, got %lld", op, name, Long{num_rows});
  }
  if (num_rows > 0 && (rows.counts == nullptr || (width > 0 && rows.indices == nullptr))) {
    return failure("%s: blocks.%s is needed and has no data", op, name);
  }
  return {};
}

// Lists may have blocks of 192 queries, for the tiles that suit head_dim 64.
Status check_block_size(const char* op, TileShape block, int most_queries) {
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

Status check_block_sparse(const char* op, const BlockSparseAttention& problem) {
  const Status status = check_inputs(op, problem);
  return status.ok() ? check_blocks(op, problem, problem.blocks) : status;
}

Status check_axis(const char* op, const NeighborhoodAxis& axis, int a) {
  if (axis.length < 0 || axis.length > kMaxSeq) {
    return failure("%s: length must be between 0 and 2^30 - 1, got %d for axis %d of 3", op, axis.length, a);
  }
  if (axis.window < 1 && axis.window != -1) {
    return failure("%s: window must be at least 1, or -1 for the whole axis, got %d for axis %d of 3", op, axis.window,
                   a);
  }
  const int most = axis.window == -1 ? static_cast<int>(kMaxSeq) : min_of(axis.window, static_cast<int>(kMaxSeq));
  if (axis.stride < 1 || axis.stride > most) {
    return failure("%s: stride must be between 1 and %s, %d, got %d for axis %d of 3", op,
                   axis.window == -1 ? "the limit" : "the window", most, axis.stride, a);
  }
  if (axis.dilation < 1) {
    return failure("%s: dilation must be at least 1, got %d for axis %d of 3", op, axis.dilation, a);
  }
  return {};
}

// Slots of a problem whose tokens are fewer than 2^30, none of its axes empty.
std::int64_t num_slots(const PerAxis<NeighborhoodAxis>& axes, const PerAxis<int>& extent) {
  std::int64_t slots = 1;
  for (int a = 0; a < kAxes; ++a) {
    const int groups = min_of(axes[a].dilation, axes[a].length);
    slots *= std::int64_t{groups} * ceil_div(ceil_div(axes[a].length, groups), extent[a]) * extent[a];
  }
  return slots;
}

Status check_neighborhood(const char* op, const NeighborhoodAttention& problem) {
  if (Status status = check_inputs(op, problem); !status.ok()) {
    return status;
  }
  const PerAxis<NeighborhoodAxis>& axes = problem.axes;
  std::int64_t tokens = 1;
  for (int a = 0; a < kAxes; ++a) {
    if (Status status = check_axis(op, axes[a], a); !status.ok()) {
      return status;
    }
    tokens = min_of(tokens * axes[a].length, kMaxSeq + 1);
  }
  for (const Named tensor : {Named{"q", problem.q}, Named{"k", problem.k}}) {
    if (tensor.view.seq() != tokens) {
      return failure("%s: %s must have the tokens of the axes, %d x %d x %d, got %lld", op, tensor.name, axes[0].length,
                     axes[1].length, axes[2].length, Long{tensor.view.seq()});
    }
  }
  // In the tiles of all kernels: what is allowed does not depend on where it runs.
  const int rank = num_axes(axes) - 1;
  for (const NeighborhoodTiles& tiles : {kCpuNeighborhoodTiles[rank], kGpuNeighborhoodTiles[rank]}) {
    for (const PerAxis<int>& extent : {tiles.q, tiles.k}) {
      const std::int64_t slots = tokens > 0 ? num_slots(axes, extent) : 0;
      if (slots > kMaxSeq) {
        return failure(
            "%s: in tiles of %d x %d x %d, each of one dilation group, tokens take %lld places; it must be "
            "fewer than 2^30",
            op, extent[0], extent[1], extent[2], Long{slots});
      }
    }
  }
  return {};
}

Status check_sigmoid(const char* op, const SigmoidAttention& problem) {
  if (Status status = check_inputs(op, problem); !status.ok()) {
    return status;
  }
  if (Status status = check_window(op, problem); !status.ok()) {
    return status;
  }
  return std::isfinite(problem.bias)
             ? Status{}
             : failure("%s: bias must be finite, got %g", op, static_cast<double>(problem.bias));
}

Status check_format(const char* op, TokenFormat format) {
  switch (format) {
    case TokenFormat::kInt8:
    case TokenFormat::kInt4:
    case TokenFormat::kInt4InByte:
    case TokenFormat::kFloat8:
      return {};
  }
  return failure("%s: format must be one of TokenFormat's, got %d", op, static_cast<int>(format));
}

Status check_group(const char* op, std::int64_t group) {
  return std::ranges::find(kTokenGroups, group) != std::end(kTokenGroups)
             ? Status{}
             : failure("%s: group must be 1, 8, 16 or 32, got %lld", op, Long{group});
}

Status check_group(const char* op, const QuantizeTokens& problem) {
  if (problem.transpose) {
    return problem.group == kAllTokens
               ? Status{}
               : failure("%s: with transpose a scale is of all tokens and group must be left out, got %lld", op,
                         Long{problem.group});
  }
  return check_group(op, problem.group);
}

// The scales of queries and keys of 8 bits.
template <class Problem>
Status check_scales(const char* op, const Problem& problem) {
  const bool lacks_q = problem.q.size() > 0 && problem.q_scales == nullptr;
  if (lacks_q || (problem.k.size() > 0 && problem.k_scales == nullptr)) {
    return failure("%s: %s has no data", op, lacks_q ? "q_scales" : "k_scales");
  }
  return {};
}

Status check_permutation(const char* op, const char* name, const Permutation& permutation, Named of) {
  const auto& [order, batch, heads] = permutation;
  if (order != nullptr && ((batch != 1 && batch != of.view.batch()) || (heads != 1 && heads != of.view.heads()))) {
    return failure("%s: %s must be of 1 or %lld batch entries and 1 or %lld heads, got %lld and %lld", op, name,
                   Long{of.view.batch()}, Long{of.view.heads()}, Long{batch}, Long{heads});
  }
  return {};
}

// Values of 8 bits, transposed, or of more, as they are.
Status check_values(const char* op, const QuantizedAttention& problem) {
  const TensorView &k = problem.k, &v = problem.v;
  if (!has_low_bits(v)) {
    for (const Status& status : {check_dtype(op, {"v", v}), check_like(op, {"v", v}, {"k", k}, v.dtype)}) {
      if (!status.ok()) {
        return status;
      }
    }
    return problem.v_scales == nullptr && problem.v_mean == nullptr
               ? Status{}
               : failure("%s: %s must be null for v of %s", op, problem.v_scales == nullptr ? "v_mean" : "v_scales",
                         name_of(v.dtype));
  }
  if (Status status = check_layout(op, {"v", v}, v.dtype); !status.ok()) {
    return status;
  }
  const std::int64_t shape[4] = {k.batch(), k.heads(), k.head_dim(), padded_tokens(k.seq())};
  std::int64_t stride = 1;
  for (int axis = 3; axis >= 0; --axis) {
    if (v.shape[axis] != shape[axis]) {
      return failure("%s: v of 8 bits must be contiguous [%lld, %lld, %lld, %lld], got [%lld, %lld, %lld, %lld]", op,
                     Long{shape[0]}, Long{shape[1]}, Long{shape[2]}, Long{shape[3]}, Long{v.shape[0]}, Long{v.shape[1]},
                     Long{v.shape[2]}, Long{v.shape[3]});
    }
    if (v.size() > 0 && shape[axis] > 1 && v.stride[axis] != stride) {
      return failure("%s: v of 8 bits must be contiguous, got stride %lld at axis %d", op, Long{v.stride[axis]}, axis);
    }
    stride *= shape[axis];
  }
  return v.size() > 0 && problem.v_scales == nullptr ? failure("%s: v_scales has no data", op) : Status{};
}

}  // namespace

Status failure(const char* format, ...) {
  Status status;
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message, sizeof status.message, format, arguments);
  va_end(arguments);
  return status;
}

Status no_cpu_kernels(const char* op) {
  return failure("%s: the CPU kernels need a processor with AVX2, FMA and F16C", op);
}

Status built_without_cuda(const char* op) {
  return failure("%s: this fastattn is built without CUDA; its tensors must be on the CPU", op);
}

bool built_with_cuda() { return FASTATTN_WITH_CUDA; }

Status validate(const Attention& problem) { return check_attention("attention", problem); }

Status validate(const VarlenAttention& problem) { return check_varlen("varlen_attention", problem); }

Status validate(const VarlenAttentionBackward& problem) {
  const char* op = "varlen_attention_backward";
  const Status status = check_varlen(op, problem.forward);
  return status.ok() ? check_gradients_and_lse(op, problem) : status;
}

Status validate(const AttentionBackward& problem) {
  const char* op = "attention_backward";
  if (Status status = check_attention(op, problem.forward); !status.ok()) {
    return status;
  }
  if (problem.dkey_bias != nullptr && problem.forward.key_bias.bias == nullptr) {
    return failure("%s: dkey_bias must be left out where there is no key_bias", op);
  }
  return check_gradients_and_lse(op, problem);
}

Status validate(const BlockSparseAttention& problem) {
  const char* op = "block_sparse_attention";
  const Status status = check_block_sparse(op, problem);
  return status.ok() ? check_output(op, problem) : status;
}

Status validate(const BlockSparseAttentionBackward& problem) {
  const char* op = "block_sparse_attention_backward";
  if (Status status = check_block_sparse(op, problem.forward); !status.ok()) {
    return status;
  }
  const auto& [first, batch, heads] = problem.forward.blocks;
  if (Status status = check_block_rows(op, "columns", first.columns, std::int64_t{batch} * heads * first.blocks_k(),
                                       first.blocks_q());
      !status.ok()) {
    return status;
  }
  return check_softmax_gradients(op, problem);
}

Status validate(const NeighborhoodAttention& problem) {
  const char* op = "neighborhood_attention";
  const Status status = check_neighborhood(op, problem);
  return status.ok() ? check_output(op, problem) : status;
}

Status validate(const NeighborhoodAttentionBackward& problem) {
  const char* op = "neighborhood_attention_backward";
  const Status status = check_neighborhood(op, problem.forward);
  return status.ok() ? check_softmax_gradients(op, problem) : status;
}

Status validate(const SigmoidAttention& problem) {
  const Status status = check_sigmoid("sigmoid_attention", problem);
  return status.ok() ? check_output("sigmoid_attention", problem) : status;
}

Status validate(const SigmoidAttentionBackward& problem) {
  const char* op = "sigmoid_attention_backward";
  const Status status = check_sigmoid(op, problem.forward);
  return status.ok() ? check_gradients(op, problem) : status;
}

Status validate(const QuantizedAttention& problem) {
  const char* op = "quantized_attention";
  const Named q{"q", problem.q};
  if (!has_low_bits(problem.q)) {
    return failure("%s: q must be int8 or float8_e4m3fn, got %s", op, name_of(problem.q.dtype));
  }
  if (Status status = check_queries_and_keys(op, problem); !status.ok()) {
    return status;
  }
  if (Status status = check_values(op, problem); !status.ok()) {
    return status;
  }
  const Named out{"out", problem.out};
  if (!has_low_bits(problem.v) && problem.out.dtype != problem.v.dtype) {
    return failure("%s: out must have the dtype of v, %s, got %s", op, name_of(problem.v.dtype),
                   name_of(problem.out.dtype));
  }
  if (problem.blocks && (problem.window.left != kUnbounded || problem.window.right != kUnbounded)) {
    return failure("%s: window must be left out where blocks are given", op);
  }
  for (const Status& status : {check_dtype(op, out), check_like(op, out, q, problem.out.dtype),
                               problem.blocks ? check_blocks(op, problem, *problem.blocks) : check_window(op, problem),
                               check_permutation(op, "order", problem.order, q)}) {
    if (!status.ok()) {
      return status;
    }
  }
  return check_scales(op, problem);
}

Status validate(const QuantizeTokens& problem) {
  const char* op = "quantize_tokens";
  const Named x{"x", problem.x};
  for (const Status& status :
       {check_dtype(op, x), check_layout(op, x, problem.x.dtype), check_head_dim(op, problem.x.head_dim()),
        check_seq(op, x), check_format(op, problem.format), check_group(op, problem)}) {
    if (!status.ok()) {
      return status;
    }
  }
  if (Status status = check_permutation(op, "permutation", problem.permutation, x); !status.ok()) {
    return status;
  }
  if (problem.x.size() > 0 && (problem.values == nullptr || problem.scales == nullptr)) {
    return failure("%s: %s has no data", op, problem.values == nullptr ? "values" : "scales");
  }
  return {};
}

Status validate(const EstimateBlocks& problem) {
  const char* op = "estimate_blocks";
  if (problem.q.dtype != DType::kInt8) {
    return failure("%s: q must be int8, got %s", op, name_of(problem.q.dtype));
  }
  for (const Status& status : {check_queries_and_keys(op, problem), check_scales(op, problem),
                               check_group(op, problem.group), check_block_size(op, problem.block, 128)}) {
    if (!status.ok()) {
      return status;
    }
  }
  if (problem.query_stride < 1 || problem.block.q % problem.query_stride != 0) {
    return failure("%s: query_stride must divide the queries of a block, %d, got %lld", op, problem.block.q,
                   Long{problem.query_stride});
  }
  if (problem.seq_q < 0 || problem.seq_q > kMaxSeq) {
    return failure("%s: seq_q must be between 0 and 2^30 - 1, got %lld", op, Long{problem.seq_q});
  }
  if (problem.q.seq() != ceil_div(problem.seq_q, problem.query_stride)) {
    return failure("%s: q must hold %lld of %lld queries with query_stride %lld, got %lld", op,
                   Long{ceil_div(problem.seq_q, problem.query_stride)}, Long{problem.seq_q}, Long{problem.query_stride},
                   Long{problem.q.seq()});
  }
  if (problem.sink < 0 || problem.window < 0) {
    return failure("%s: %s must not be negative, got %lld", op, problem.sink < 0 ? "sink" : "window",
                   Long{problem.sink < 0 ? problem.sink : problem.window});
  }
  const bool has_rows = num_rows(problem) > 0;
  const char* const missing = has_rows && problem.floor == nullptr                            ? "floor"
                              : has_rows && problem.counts == nullptr                         ? "counts"
                              : has_rows && problem.k.seq() > 0 && problem.indices == nullptr ? "indices"
                                                                                              : nullptr;
  if (missing != nullptr) {
    return failure("%s: %s is needed and has no data", op, missing);
  }
  return {};
}

}  // namespace fastattn

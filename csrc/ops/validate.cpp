// The attentions over elements of 16 and 32 bits, and what every refusal is made with.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>
#include <iterator>

#include "fastattn/plan/neighborhood_tiles.hpp"
#include "ops/checks.hpp"

namespace fastattn {

namespace {

// Queries and keys, and values of the same dtype.
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

}  // namespace fastattn

// The ops that make and take elements of 8 or 4 bits.
#include <algorithm>
#include <cstdint>
#include <iterator>

#include "ops/checks.hpp"

namespace fastattn {

namespace {

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

// torch.ops.fastattn.quantized_attention.
#include <optional>
#include <tuple>
#include <vector>

#include "block_list.hpp"
#include "call.hpp"

namespace fastattn::binding {
namespace {

constexpr const char* kOp = "quantized_attention";

template <class Place>
const float* floats(const Call<Place>& call, const char* name, std::optional<Tensor>& tensor, const char* axes,
                    const Shape& shape) {
  if (!tensor) {
    return nullptr;
  }
  tensor = call.array(name, *tensor, ScalarType::Float, axes, shape);
  return tensor->const_data_ptr<float>();
}

template <class Place>
std::tuple<Tensor, Tensor> quantized_attention(Tensor q, Tensor q_scales, Tensor k, Tensor k_scales, Tensor v,
                                               std::optional<Tensor> v_scales, std::optional<Tensor> v_mean,
                                               std::optional<Tensor> key_term, std::optional<Tensor> counts,
                                               std::optional<Tensor> indices, std::optional<Tensor> full,
                                               std::optional<Tensor> order, std::optional<Shape> block_size,
                                               bool causal, std::optional<Shape> window, std::optional<double> scale,
                                               std::optional<ScalarType> dtype) {
  const Call<Place> call(kOp, q);
  q = call.low_bit_input("q", q);
  k = call.low_bit_input("k", k);
  const bool low_bit_values = v.dim() == 4 && has_low_bits(v.scalar_type());
  v = low_bit_values ? torch::stable::contiguous(call.low_bit_input("v", v)) : call.input("v", v);
  require(low_bit_values == v_scales.has_value(), kOp, ": v_scales must be given where v has 8 bits, and only there");
  require(low_bit_values || !v_mean, kOp, ": v_mean must be given only where v has 8 bits");
  const ScalarType out_type = dtype.value_or(low_bit_values ? ScalarType::BFloat16 : v.scalar_type());
  require(out_type == ScalarType::Float || out_type == ScalarType::Half || out_type == ScalarType::BFloat16, kOp,
          ": dtype must be float32, float16 or bfloat16, got ", out_type);
  require(low_bit_values || out_type == v.scalar_type(), kOp, ": dtype must be that of v, ", v.scalar_type(),
          ", or left out, got ", out_type);
  const std::int64_t batch = q.sizes()[0], seq_q = q.sizes()[1], heads = q.sizes()[2], dim = q.sizes()[3];
  const std::int64_t k_batch = k.sizes()[0], seq_k = k.sizes()[1], kv_heads = k.sizes()[2];

  QuantizedAttention problem;
  problem.q = view(q);
  problem.k = view(k);
  problem.v = view(v);
  q_scales = call.array("q_scales", q_scales, ScalarType::Float, "[batch, heads, seq_q]", {batch, heads, seq_q});
  k_scales = call.array("k_scales", k_scales, ScalarType::Float, "[batch, kv_heads, groups of 32 keys]",
                        {k_batch, kv_heads, num_groups(seq_k, kKeyGroup)});
  problem.q_scales = q_scales.const_data_ptr<float>();
  problem.k_scales = k_scales.const_data_ptr<float>();
  problem.v_scales = floats(call, "v_scales", v_scales, "[batch, kv_heads, head_dim]", {k_batch, kv_heads, dim});
  problem.v_mean = floats(call, "v_mean", v_mean, "[batch, kv_heads, head_dim]", {k_batch, kv_heads, dim});
  problem.key_term =
      floats(call, "key_term", key_term, "[batch, heads, padded seq_k]", {batch, heads, padded_tokens(seq_k)});
  problem.scale = scale_of(scale, q);

  require(counts.has_value() == indices.has_value() && counts.has_value() == block_size.has_value(), kOp,
          ": counts, indices and block_size must be given together");
  require(!full || counts, kOp, ": full must be given only where counts is");
  require(!window || !counts, kOp, ": window must be left out where counts is given");
  std::optional<List> rows;
  if (counts) {
    const Grid grid = grid_of(kOp, q, k, *counts, *block_size);
    rows = list_of(call, kRows, *counts, *indices, full, grid.of_rows());
    problem.blocks = lists_of(q, k, grid, *block_size, causal, rows->rows(), {});
  } else {
    problem.window = window_of(kOp, causal, window);
  }
  problem.order = call.permutation("order", order, batch, seq_q, heads);

  const Place place(q);
  const Tensor out = allocate(q, Shape{batch, seq_q, heads, dim}, out_type);
  const Tensor lse = allocate(q, Shape{batch, heads, seq_q}, ScalarType::Float);
  problem.out = view(out);
  problem.lse = lse.mutable_data_ptr<float>();
  const Workspace workspace(q, quantized_attention_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::quantized_attention(problem, place.executor));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("quantized_attention", TORCH_BOX(&quantized_attention<Cpu>)); }

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("quantized_attention", TORCH_BOX(&quantized_attention<Cuda>)); }

}  // namespace fastattn::binding

// torch.ops.fastattn.estimate_blocks.
#include <optional>
#include <tuple>
#include <vector>

#include "call.hpp"

namespace fastattn::binding {
namespace {

constexpr const char* kOp = "estimate_blocks";

using Shape = std::vector<std::int64_t>;

// What the type of quantized values and their shape say of them.
QuantizedTokens tokens_of(const char* name, const Tensor& values, std::int64_t group) {
  const ScalarType type = values.scalar_type();
  require(values.dim() == 4, kOp, ": ", name, " must have 4 dimensions, [batch, seq, heads, head_dim], got ",
          list(values.sizes()));
  require(type == ScalarType::Char || type == ScalarType::Byte, kOp, ": ", name,
          " must be int8, or uint8 with two 4-bit values in a byte, got ", type);
  require(group > 0, kOp, ": group must be 1, 8, 16 or 32, got ", group);
  const auto shape = values.sizes();
  const bool packed = type == ScalarType::Byte;
  return {.batch = shape[0],
          .tokens = shape[1],
          .heads = shape[2],
          .head_dim = packed ? 2 * shape[3] : shape[3],
          .format = packed ? TokenFormat::kInt4 : TokenFormat::kInt8,
          .group = group};
}

template <class Place>
std::tuple<Tensor, Tensor> estimate_blocks(Tensor q, Tensor q_scales, Tensor k, Tensor k_scales, Tensor floor,
                                           std::optional<Tensor> key_term, std::int64_t group, Shape block_size,
                                           std::int64_t sink, std::int64_t window, bool causal, double scale) {
  const Call<Place> call(kOp, q);
  EstimateBlocks problem{.q = tokens_of("q", q, 1),
                         .k = tokens_of("k", k, group),
                         .scale = static_cast<float>(scale),
                         .sink = sink,
                         .window = window,
                         .causal = causal};
  const std::int64_t batch = problem.q.batch, heads = problem.q.heads, seq_q = problem.q.tokens,
                     seq_k = problem.k.tokens;
  const auto floats = [&](const char* name, const Tensor& tensor, const char* axes, const Shape& shape) {
    return call.array(name, tensor, ScalarType::Float, axes, shape);
  };
  q = torch::stable::contiguous(q);
  k = call.array("k", k, k.scalar_type(), "[batch, seq_k, kv_heads, head_dim]", {k.sizes().begin(), k.sizes().end()});
  q_scales = floats("q_scales", q_scales, "[batch, heads, seq_q]", {batch, heads, seq_q});
  k_scales = floats("k_scales", k_scales, "[batch, kv_heads, groups]",
                    {problem.k.batch, problem.k.heads, num_groups(seq_k, group)});
  floor = floats("floor", floor, "[batch, heads, seq_q]", {batch, heads, seq_q});
  if (key_term) {
    key_term = floats("key_term", *key_term, "[batch, heads, seq_k]", {batch, heads, seq_k});
    problem.key_term = key_term->const_data_ptr<float>();
  }
  require(block_size.size() == 2 && std::ranges::min(block_size) > 0 && std::ranges::max(block_size) <= 128, kOp,
          ": block_size must be (queries, keys), each 64 or 128, got ", list(block_size));
  problem.block = {static_cast<int>(block_size[0]), static_cast<int>(block_size[1])};
  const Place place(q);

  const std::int64_t rows = ceil_div(seq_q, block_size[0]), columns = ceil_div(seq_k, block_size[1]);
  const Tensor counts = torch::stable::new_empty(q, Shape{batch, heads, rows}, ScalarType::Int);
  const Tensor indices = torch::stable::new_empty(q, Shape{batch, heads, rows, columns}, ScalarType::Int);
  problem.q.values = q.const_data_ptr();
  problem.q.scales = q_scales.const_data_ptr<float>();
  problem.k.values = k.const_data_ptr();
  problem.k.scales = k_scales.const_data_ptr<float>();
  problem.floor = floor.const_data_ptr<float>();
  problem.counts = counts.mutable_data_ptr<std::int32_t>();
  problem.indices = indices.mutable_data_ptr<std::int32_t>();
  require(fastattn::estimate_blocks(problem, place.executor));
  return {counts, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("estimate_blocks", TORCH_BOX(&estimate_blocks<Cpu>)); }

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("estimate_blocks", TORCH_BOX(&estimate_blocks<Cuda>)); }

}  // namespace fastattn::binding

// torch.ops.fastattn.estimate_blocks.
#include <optional>
#include <tuple>
#include <vector>

#include "call.hpp"

namespace fastattn::binding {
namespace {

constexpr const char* kOp = "estimate_blocks";

using Shape = std::vector<std::int64_t>;

// Tokens as quantize_tokens leaves them, not packed.
template <class Place>
Tensor integers(const Call<Place>& call, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Char, kOp, ": ", name, " must be int8 (4-bit values: quantize with packed=False), got ",
          type);
  return call.low_bit_input(name, tensor);
}

template <class Place>
std::tuple<Tensor, Tensor> estimate_blocks(Tensor q, Tensor q_scales, Tensor k, Tensor k_scales, Tensor floor,
                                           std::optional<Tensor> key_term, std::int64_t group, std::int64_t seq_q,
                                           std::int64_t query_stride, Shape block_size, std::int64_t sink,
                                           std::int64_t window, bool causal, double scale) {
  const Call<Place> call(kOp, q);
  q = integers(call, "q", q);
  k = integers(call, "k", k);
  require(group >= 1 && group <= 32, kOp, ": group must be 1, 8, 16 or 32, got ", group);
  const std::int64_t batch = q.sizes()[0], judged = q.sizes()[1], heads = q.sizes()[2];
  const std::int64_t seq_k = k.sizes()[1], kv_heads = k.sizes()[2];
  EstimateBlocks problem{.q = view(q),
                         .k = view(k),
                         .group = group,
                         .scale = static_cast<float>(scale),
                         .query_stride = query_stride,
                         .seq_q = seq_q,
                         .sink = sink,
                         .window = window,
                         .causal = causal};
  const auto floats = [&](const char* name, const Tensor& tensor, const char* axes, const Shape& shape) {
    return call.array(name, tensor, ScalarType::Float, axes, shape);
  };
  q_scales = floats("q_scales", q_scales, "[batch, heads, queries of q]", {batch, heads, judged});
  k_scales =
      floats("k_scales", k_scales, "[batch, kv_heads, groups]", {k.sizes()[0], kv_heads, num_groups(seq_k, group)});
  floor = floats("floor", floor, "[batch, heads, queries of q]", {batch, heads, judged});
  if (key_term) {
    key_term = floats("key_term", *key_term, "[batch, heads, padded seq_k]", {batch, heads, padded_tokens(seq_k)});
    problem.key_term = key_term->const_data_ptr<float>();
  }
  require(block_size.size() == 2 && std::ranges::min(block_size) > 0 && std::ranges::max(block_size) <= 128, kOp,
          ": block_size must be (queries, keys), each 64 or 128, got ", list(block_size));
  require(query_stride >= 1 && block_size[0] % query_stride == 0, kOp,
          ": query_stride must divide the queries of a block, ", block_size[0], ", got ", query_stride);
  problem.block = {static_cast<int>(block_size[0]), static_cast<int>(block_size[1])};
  const Place place(q);

  const std::int64_t rows = ceil_div(judged, block_size[0] / query_stride), columns = ceil_div(seq_k, block_size[1]);
  const Tensor counts = allocate(q, Shape{batch, heads, rows}, ScalarType::Int);
  const Tensor indices = allocate(q, Shape{batch, heads, rows, columns}, ScalarType::Int);
  problem.q_scales = q_scales.const_data_ptr<float>();
  problem.k_scales = k_scales.const_data_ptr<float>();
  problem.floor = floor.const_data_ptr<float>();
  problem.counts = counts.mutable_data_ptr<std::int32_t>();
  problem.indices = indices.mutable_data_ptr<std::int32_t>();
  const Workspace workspace(q, estimate_blocks_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::estimate_blocks(problem, place.executor));
  return {counts, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("estimate_blocks", TORCH_BOX(&estimate_blocks<Cpu>)); }

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("estimate_blocks", TORCH_BOX(&estimate_blocks<Cuda>)); }

}  // namespace fastattn::binding

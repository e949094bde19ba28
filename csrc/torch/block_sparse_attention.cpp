// torch.ops.fastattn.block_sparse_attention and block_sparse_attention_backward.
#include <optional>
#include <tuple>
#include <vector>

#include "call.hpp"
#include "fastattn/portable.hpp"

namespace fastattn::binding {
namespace {

using Shape = std::vector<std::int64_t>;

// The shape of the lists: [batch or 1, heads or 1], and the blocks on each axis of the scores.
struct Grid {
  std::int64_t batch, heads, rows, columns;

  Shape of_rows() const { return {batch, heads, rows, columns}; }
  Shape of_columns() const { return {batch, heads, columns, rows}; }
};

Grid grid_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& counts, const Shape& block_size) {
  require(block_size.size() == 2 && std::ranges::min(block_size) > 0, op,
          ": block_size must be (queries, keys), each 64 or 128, got ", list(block_size));
  const auto extent = [&](int axis, std::int64_t of_q) {
    return counts.dim() == 3 && counts.sizes()[axis] == 1 ? 1 : of_q;
  };
  return {extent(0, q.sizes()[0]), extent(1, q.sizes()[2]), ceil_div(q.sizes()[1], block_size[0]),
          ceil_div(k.sizes()[1], block_size[1])};
}

// What a list's tensors and their axes are called in messages.
struct Names {
  const char *counts, *indices, *full;
  const char *counts_axes, *axes;
};

constexpr Names kRows{"counts", "indices", "full", "[batch or 1, heads or 1, query blocks]",
                      "[batch or 1, heads or 1, query blocks, key blocks]"};
constexpr Names kColumns{"column_counts", "column_indices", "column_full", "[batch or 1, heads or 1, key blocks]",
                         "[batch or 1, heads or 1, key blocks, query blocks]"};

// The tensors of a list, for as long as the core reads them.
struct List {
  Tensor counts, indices;
  std::optional<Tensor> full;

  BlockRows rows() const {
    return {counts.const_data_ptr<std::int32_t>(), indices.const_data_ptr<std::int32_t>(),
            full ? full->const_data_ptr<bool>() : nullptr};
  }
};

// `shape` is that of the indices.
template <class Place>
List list_of(const Call<Place>& call, const Names& names, const Tensor& counts, const Tensor& indices,
             const std::optional<Tensor>& full, const Shape& shape) {
  List list{call.array(names.counts, counts, ScalarType::Int, names.counts_axes, {shape[0], shape[1], shape[2]}),
            call.array(names.indices, indices, ScalarType::Int, names.axes, shape), std::nullopt};
  if (full) {
    list.full = call.array(names.full, *full, ScalarType::Bool, names.axes, shape);
  }
  return list;
}

BlockLists lists_of(const Tensor& q, const Tensor& k, const Grid& grid, const Shape& block_size, bool causal,
                    const BlockRows& rows, const BlockRows& columns) {
  const auto integer = [](std::int64_t x) { return static_cast<int>(x); };
  const int num_q = integer(q.sizes()[1]), num_k = integer(k.sizes()[1]);
  return {.first = {.num_q = num_q,
                    .num_k = num_k,
                    .left = num_k,
                    .right = causal ? 0 : num_q,
                    .block = {integer(block_size[0]), integer(block_size[1])},
                    .rows = rows,
                    .columns = columns},
          .batch = integer(grid.batch),
          .heads = integer(grid.heads)};
}

template <class Place>
std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices,
                                                  std::optional<Tensor> full, Shape block_size, bool causal,
                                                  std::optional<double> scale) {
  constexpr const char* kOp = "block_sparse_attention";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  const Grid grid = grid_of(kOp, q, k, counts, block_size);
  const List rows = list_of(call, kRows, counts, indices, full, grid.of_rows());
  const Place place(q);
  const Tensor out = torch::stable::new_empty(q, q.sizes());
  const Tensor lse = torch::stable::new_empty(q, Shape{q.sizes()[0], q.sizes()[2], q.sizes()[1]}, ScalarType::Float);
  const Workspace workspace(q, Place::kForwardWorkspace);
  require(fastattn::block_sparse_attention({.q = view(q),
                                            .k = view(k),
                                            .v = view(v),
                                            .out = view(out),
                                            .lse = lse.mutable_data_ptr<float>(),
                                            .scale = scale_of(scale, q),
                                            .blocks = lists_of(q, k, grid, block_size, causal, rows.rows(), {}),
                                            .workspace = workspace.address()},
                                           place.executor));
  return {out, lse};
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor counts,
    Tensor indices, std::optional<Tensor> full, Tensor column_counts, Tensor column_indices,
    std::optional<Tensor> column_full, Shape block_size, bool causal, std::optional<double> scale) {
  constexpr const char* kOp = "block_sparse_attention_backward";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  out = call.input("out", out);
  dout = call.gradient("dout", dout);
  lse = call.row_statistics("lse", lse, q);
  if (dlse) {
    dlse = call.row_statistics("dlse", *dlse, q);
  }
  const Grid grid = grid_of(kOp, q, k, counts, block_size);
  const List rows = list_of(call, kRows, counts, indices, full, grid.of_rows());
  const List columns = list_of(call, kColumns, column_counts, column_indices, column_full, grid.of_columns());
  require(full.has_value() == column_full.has_value(), kOp,
          ": column_full must be given where full is, and only there");
  const Place place(q);
  const Tensor dq = torch::stable::new_empty(q, q.sizes());
  const Tensor dk = torch::stable::new_empty(k, k.sizes());
  const Tensor dv = torch::stable::new_empty(v, v.sizes());
  BlockSparseAttentionBackward problem{
      .forward = {.q = view(q),
                  .k = view(k),
                  .v = view(v),
                  .out = view(out),
                  .lse = lse.mutable_data_ptr<float>(),
                  .scale = scale_of(scale, q),
                  .blocks = lists_of(q, k, grid, block_size, causal, rows.rows(), columns.rows())},
      .dout = view(dout),
      .dlse = dlse ? dlse->const_data_ptr<float>() : nullptr,
      .dq = view(dq),
      .dk = view(dk),
      .dv = view(dv)};
  const Workspace workspace(q, block_sparse_attention_backward_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::block_sparse_attention_backward(problem, place.executor));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention<Cpu>));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention<Cuda>));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward<Cuda>));
}

}  // namespace fastattn::binding

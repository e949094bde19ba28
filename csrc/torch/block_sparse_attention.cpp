// torch.ops.fastattn.block_sparse_attention and block_sparse_attention_backward.
#include <optional>
#include <tuple>
#include <vector>

#include "block_list.hpp"
#include "call.hpp"

namespace fastattn::binding {
namespace {

template <class Place>
std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices,
                                                  std::optional<Tensor> full, Shape block_size, bool causal,
                                                  std::optional<double> scale, bool) {
  constexpr const char* kOp = "block_sparse_attention";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  const Grid grid = grid_of(kOp, q, k, counts, block_size);
  const List rows = list_of(call, kRows, counts, indices, full, grid.of_rows());
  const Place place(q);
  const Tensor out = allocate_like(q);
  const Tensor lse = allocate(q, Shape{q.sizes()[0], q.sizes()[2], q.sizes()[1]}, ScalarType::Float);
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
    std::optional<Tensor> column_full, Shape block_size, bool causal, std::optional<double> scale, bool deterministic,
    std::vector<bool> wanted) {
  constexpr const char* kOp = "block_sparse_attention_backward";
  const Call<Place> call(kOp, q);
  call.check_wanted(wanted, 3);
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
  const Tensor dq = allocate_gradient(q, wanted[0]);
  const Tensor dk = allocate_gradient(k, wanted[1]);
  const Tensor dv = allocate_gradient(v, wanted[2]);
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
      .dq = gradient_view(dq),
      .dk = gradient_view(dk),
      .dv = gradient_view(dv),
      .deterministic = deterministic};
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

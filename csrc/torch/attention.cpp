// torch.ops.fastattn.attention and attention_backward.
#include <optional>
#include <tuple>

#include "call.hpp"

namespace fastattn::binding {
namespace {

template <class Place>
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<double> scale, bool causal,
                                     std::optional<std::vector<std::int64_t>> window) {
  constexpr const char* kOp = "attention";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  const Place place(q);
  const std::int64_t rows[] = {q.sizes()[0], q.sizes()[2], q.sizes()[1]};
  const Tensor out = torch::stable::new_empty(q, q.sizes());
  const Tensor lse = torch::stable::new_empty(q, rows, ScalarType::Float);
  const Workspace workspace(q, Place::kForwardWorkspace);
  require(fastattn::attention({.q = view(q),
                               .k = view(k),
                               .v = view(v),
                               .out = view(out),
                               .lse = lse.mutable_data_ptr<float>(),
                               .scale = scale_of(scale, q),
                               .window = window_of(kOp, causal, window),
                               .workspace = workspace.address()},
                              place.executor));
  return {out, lse};
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                                                      Tensor v, Tensor out, Tensor lse, std::optional<double> scale,
                                                      bool causal, std::optional<std::vector<std::int64_t>> window) {
  constexpr const char* kOp = "attention_backward";
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
  const Place place(q);
  const Tensor dq = torch::stable::new_empty(q, q.sizes());
  const Tensor dk = torch::stable::new_empty(k, k.sizes());
  const Tensor dv = torch::stable::new_empty(v, v.sizes());
  AttentionBackward problem{.forward = {.q = view(q),
                                        .k = view(k),
                                        .v = view(v),
                                        .out = view(out),
                                        .lse = lse.mutable_data_ptr<float>(),
                                        .scale = scale_of(scale, q),
                                        .window = window_of(kOp, causal, window)},
                            .dout = view(dout),
                            .dlse = dlse ? dlse->const_data_ptr<float>() : nullptr,
                            .dq = view(dq),
                            .dk = view(dk),
                            .dv = view(dv)};
  const Workspace workspace(q, attention_backward_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::attention_backward(problem, place.executor));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention<Cpu>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention<Cuda>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cuda>));
}

}  // namespace fastattn::binding

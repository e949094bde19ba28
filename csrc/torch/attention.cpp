// torch.ops.fastattn.attention and attention_backward.
#include <array>
#include <optional>
#include <tuple>

#include "call.hpp"

namespace fastattn::binding {
namespace {

template <class Place>
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                     std::optional<Tensor> key_bias, std::optional<Tensor> window_left,
                                     std::optional<Tensor> window_right, std::optional<double> scale, bool causal,
                                     std::optional<std::vector<std::int64_t>> window, double softcap) {
  constexpr const char* kOp = "attention";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  const Place place(q);
  const std::int64_t rows[] = {q.sizes()[0], q.sizes()[2], q.sizes()[1]};
  const Tensor out = allocate(q, std::array{q.sizes()[0], q.sizes()[1], q.sizes()[2], v.sizes()[3]}, q.scalar_type());
  const Tensor lse = allocate(q, rows, ScalarType::Float);
  const Workspace workspace(q, Place::kForwardWorkspace);
  Attention problem{.q = view(q),
                    .k = view(k),
                    .v = view(v),
                    .out = view(out),
                    .lse = lse.mutable_data_ptr<float>(),
                    .scale = scale_of(scale, q),
                    .window = window_of(kOp, causal, window),
                    .softcap = static_cast<float>(softcap),
                    .key_bias = call.key_bias("key_bias", key_bias, q, k),
                    .workspace = workspace.address()};
  call.set_head_windows(window_left, window_right, q, problem);
  if (sinks) {
    call.check_head_values("sinks", *sinks, q);
    problem.sinks = sinks->const_data_ptr<float>();
  }
  require(fastattn::attention(problem, place.executor));
  return {out, lse};
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                                                      Tensor v, Tensor out, Tensor lse,
                                                      std::optional<Tensor> window_left,
                                                      std::optional<Tensor> window_right, std::optional<double> scale,
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
  const Tensor dq = allocate_like(q);
  const Tensor dk = allocate_like(k);
  const Tensor dv = allocate_like(v);
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
  call.set_head_windows(window_left, window_right, q, problem.forward);
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

// torch.ops.fastattn.sigmoid_attention and sigmoid_attention_backward.
#include <cmath>
#include <optional>
#include <tuple>

#include "call.hpp"

namespace fastattn::binding {
namespace {

// The problem without its output. `bias` holds one float for each head and is added to the constant, which is
// −ln(seq_k) if neither is given.
template <class Place>
SigmoidAttention problem_of(const char* op, const Call<Place>& call, const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& bias, std::optional<double> constant_bias,
                            std::optional<double> scale, bool causal,
                            const std::optional<std::vector<std::int64_t>>& window) {
  SigmoidAttention problem{.q = view(q),
                           .k = view(k),
                           .v = view(v),
                           .out = {},
                           .scale = scale_of(scale, q),
                           .window = window_of(op, causal, window),
                           .bias = 0.f,
                           .head_bias = call.head_values("bias", bias, q)};
  const double usual = bias || k.sizes()[1] == 0 ? 0. : -std::log(static_cast<double>(k.sizes()[1]));
  problem.bias = static_cast<float>(constant_bias.value_or(usual));
  return problem;
}

template <class Place>
Tensor sigmoid_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, std::optional<double> constant_bias,
                         std::optional<double> scale, bool causal, std::optional<std::vector<std::int64_t>> window,
                         bool) {
  constexpr const char* kOp = "sigmoid_attention";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  const Place place(q);
  SigmoidAttention problem = problem_of(kOp, call, q, k, v, bias, constant_bias, scale, causal, window);
  const Tensor out = allocate_like(q);
  problem.out = view(out);
  const Workspace workspace(q, Place::kForwardWorkspace);
  problem.workspace = workspace.address();
  require(fastattn::sigmoid_attention(problem, place.executor));
  return out;
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                                      std::optional<Tensor> bias,
                                                                      std::optional<double> constant_bias,
                                                                      std::optional<double> scale, bool causal,
                                                                      std::optional<std::vector<std::int64_t>> window,
                                                                      bool deterministic, std::vector<bool> wanted) {
  constexpr const char* kOp = "sigmoid_attention_backward";
  const Call<Place> call(kOp, q);
  call.check_wanted(wanted, 4);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  dout = call.gradient("dout", dout);
  const Place place(q);
  const Tensor dq = allocate_gradient(q, wanted[0]);
  const Tensor dk = allocate_gradient(k, wanted[1]);
  const Tensor dv = allocate_gradient(v, wanted[2]);
  const bool wants_dbias = bias && wanted[3];
  const std::int64_t biases[] = {wants_dbias ? q.sizes()[2] : 0};
  const Tensor dbias = allocate(q, biases, ScalarType::Float);
  SigmoidAttentionBackward problem{
      .forward = problem_of(kOp, call, q, k, v, bias, constant_bias, scale, causal, window),
      .dout = view(dout),
      .dq = gradient_view(dq),
      .dk = gradient_view(dk),
      .dv = gradient_view(dv),
      .dbias = wants_dbias ? dbias.mutable_data_ptr<float>() : nullptr,
      .deterministic = deterministic};
  const Workspace workspace(q, sigmoid_attention_backward_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::sigmoid_attention_backward(problem, place.executor));
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("sigmoid_attention", TORCH_BOX(&sigmoid_attention<Cpu>));
  m.impl("sigmoid_attention_backward", TORCH_BOX(&sigmoid_attention_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("sigmoid_attention", TORCH_BOX(&sigmoid_attention<Cuda>));
  m.impl("sigmoid_attention_backward", TORCH_BOX(&sigmoid_attention_backward<Cuda>));
}

}  // namespace fastattn::binding

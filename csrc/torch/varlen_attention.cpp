// torch.ops.fastattn.varlen_attention and varlen_attention_backward.
#include <array>
#include <optional>
#include <tuple>

#include "call.hpp"

namespace fastattn::binding {
namespace {

// A problem without its results. Tensors are kept for the core to read.
template <class Place>
VarlenAttention problem_of(const char* op, const Call<Place>& call, const Tensor& q, const Tensor& k, const Tensor& v,
                           Tensor& cu_seqlens_q, Tensor& cu_seqlens_k, std::optional<Tensor>& seqused_q,
                           std::optional<Tensor>& seqused_k, std::optional<Tensor>& window_left,
                           std::optional<Tensor>& window_right, std::optional<std::int64_t> max_seqlen_q,
                           std::optional<std::int64_t> max_seqlen_k, std::optional<double> scale, bool causal,
                           const std::optional<std::vector<std::int64_t>>& window, double softcap) {
  require(cu_seqlens_q.dim() == 1 && cu_seqlens_q.numel() >= 2, op,
          ": cu_seqlens_q must be Int [sequences + 1], of at least one, got ", cu_seqlens_q.scalar_type(), " ",
          list(cu_seqlens_q.sizes()));
  const std::int64_t count = cu_seqlens_q.numel() - 1;
  cu_seqlens_q = call.array("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, "[sequences + 1]", {count + 1});
  cu_seqlens_k = call.array("cu_seqlens_k", cu_seqlens_k, ScalarType::Int, "[sequences + 1]", {count + 1});
  VarlenAttention problem{.attention = {.q = view(q),
                                        .k = view(k),
                                        .v = view(v),
                                        .out = {},
                                        .scale = scale_of(scale, q),
                                        .window = window_of(op, causal, window),
                                        .softcap = static_cast<float>(softcap)},
                          .sequences = {.count = count,
                                        .cu_seqlens_q = cu_seqlens_q.const_data_ptr<std::int32_t>(),
                                        .cu_seqlens_k = cu_seqlens_k.const_data_ptr<std::int32_t>(),
                                        .seqused_q = call.integers("seqused_q", seqused_q, "[sequences]", count),
                                        .seqused_k = call.integers("seqused_k", seqused_k, "[sequences]", count),
                                        .max_seqlen_q = max_seqlen_q.value_or(q.sizes()[0]),
                                        .max_seqlen_k = max_seqlen_k.value_or(k.sizes()[0])}};
  call.set_head_windows(window_left, window_right, q, problem.attention);
  return problem;
}

template <class Place>
std::tuple<Tensor, Tensor> varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                            std::optional<Tensor> seqused_q, std::optional<Tensor> seqused_k,
                                            std::optional<Tensor> sinks, std::optional<Tensor> window_left,
                                            std::optional<Tensor> window_right,
                                            std::optional<std::int64_t> max_seqlen_q,
                                            std::optional<std::int64_t> max_seqlen_k, std::optional<double> scale,
                                            bool causal, std::optional<std::vector<std::int64_t>> window,
                                            double softcap, bool) {
  constexpr const char* kOp = "varlen_attention";
  const Call<Place> call(kOp, q);
  q = call.packed_input("q", q);
  k = call.packed_input("k", k);
  v = call.packed_input("v", v);
  const Place place(q);
  VarlenAttention problem =
      problem_of(kOp, call, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, window_left, window_right,
                 max_seqlen_q, max_seqlen_k, scale, causal, window, softcap);
  const std::int64_t tokens = q.sizes()[0], heads = heads_of(q);
  const Tensor out = allocate(q, std::array{tokens, heads, head_dim_of(v)}, q.scalar_type());
  const Tensor lse = allocate(q, std::array{heads, tokens}, ScalarType::Float);
  const Workspace workspace(q, Place::kForwardWorkspace);
  problem.attention.out = view(out);
  problem.attention.lse = lse.mutable_data_ptr<float>();
  problem.attention.sinks = call.head_values("sinks", sinks, q);
  problem.attention.workspace = workspace.address();
  require(fastattn::varlen_attention(problem, place.executor));
  return {out, lse};
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,
    Tensor cu_seqlens_k, std::optional<Tensor> seqused_q, std::optional<Tensor> seqused_k,
    std::optional<Tensor> window_left, std::optional<Tensor> window_right, std::optional<std::int64_t> max_seqlen_q,
    std::optional<std::int64_t> max_seqlen_k, std::optional<double> scale, bool causal,
    std::optional<std::vector<std::int64_t>> window, double softcap, bool deterministic, std::vector<bool> wanted) {
  constexpr const char* kOp = "varlen_attention_backward";
  const Call<Place> call(kOp, q);
  call.check_wanted(wanted, 3);
  q = call.packed_input("q", q);
  k = call.packed_input("k", k);
  v = call.packed_input("v", v);
  out = call.packed_input("out", out);
  dout = call.packed_gradient("dout", dout);
  const std::vector<std::int64_t> rows{heads_of(q), q.sizes()[0]};
  lse = call.array("lse", lse, ScalarType::Float, "[heads, tokens_q]", rows);
  if (dlse) {
    dlse = call.array("dlse", *dlse, ScalarType::Float, "[heads, tokens_q]", rows);
  }
  const Place place(q);
  const Tensor dq = allocate_gradient(q, wanted[0]);
  const Tensor dk = allocate_gradient(k, wanted[1]);
  const Tensor dv = allocate_gradient(v, wanted[2]);
  VarlenAttentionBackward problem{
      .forward = problem_of(kOp, call, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, window_left,
                            window_right, max_seqlen_q, max_seqlen_k, scale, causal, window, softcap),
      .dout = view(dout),
      .dlse = dlse ? dlse->const_data_ptr<float>() : nullptr,
      .dq = gradient_view(dq),
      .dk = gradient_view(dk),
      .dv = gradient_view(dv),
      .deterministic = deterministic};
  problem.forward.attention.out = view(out);
  problem.forward.attention.lse = lse.mutable_data_ptr<float>();
  const Workspace workspace(q, varlen_attention_backward_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::varlen_attention_backward(problem, place.executor));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention<Cpu>));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention<Cuda>));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward<Cuda>));
}

}  // namespace fastattn::binding

// torch.ops.fastattn.varlen_attention.
#include <array>
#include <optional>
#include <tuple>

#include "call.hpp"

namespace fastattn::binding {
namespace {

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
  require(cu_seqlens_q.dim() == 1 && cu_seqlens_q.numel() >= 2, kOp,
          ": cu_seqlens_q must be Int [sequences + 1], of at least one, got ", cu_seqlens_q.scalar_type(), " ",
          list(cu_seqlens_q.sizes()));
  const std::int64_t count = cu_seqlens_q.numel() - 1;
  cu_seqlens_q = call.array("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, "[sequences + 1]", {count + 1});
  cu_seqlens_k = call.array("cu_seqlens_k", cu_seqlens_k, ScalarType::Int, "[sequences + 1]", {count + 1});
  const Place place(q);
  const std::int64_t tokens = q.sizes()[0], heads = heads_of(q);
  const Tensor out = allocate(q, std::array{tokens, heads, head_dim_of(v)}, q.scalar_type());
  const Tensor lse = allocate(q, std::array{heads, tokens}, ScalarType::Float);
  const Workspace workspace(q, Place::kForwardWorkspace);
  VarlenAttention problem{.attention = {.q = view(q),
                                        .k = view(k),
                                        .v = view(v),
                                        .out = view(out),
                                        .lse = lse.mutable_data_ptr<float>(),
                                        .scale = scale_of(scale, q),
                                        .window = window_of(kOp, causal, window),
                                        .softcap = static_cast<float>(softcap),
                                        .sinks = call.head_values("sinks", sinks, q),
                                        .workspace = workspace.address()},
                          .sequences = {.count = count,
                                        .cu_seqlens_q = cu_seqlens_q.const_data_ptr<std::int32_t>(),
                                        .cu_seqlens_k = cu_seqlens_k.const_data_ptr<std::int32_t>(),
                                        .seqused_q = call.integers("seqused_q", seqused_q, "[sequences]", count),
                                        .seqused_k = call.integers("seqused_k", seqused_k, "[sequences]", count),
                                        .max_seqlen_q = max_seqlen_q.value_or(tokens),
                                        .max_seqlen_k = max_seqlen_k.value_or(k.sizes()[0])}};
  call.set_head_windows(window_left, window_right, q, problem.attention);
  require(fastattn::varlen_attention(problem, place.executor));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("varlen_attention", TORCH_BOX(&varlen_attention<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("varlen_attention", TORCH_BOX(&varlen_attention<Cuda>)); }

}  // namespace fastattn::binding

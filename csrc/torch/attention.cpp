// torch.ops.fastattn.attention and attention_backward.
#include <array>
#include <optional>
#include <tuple>

#include "call.hpp"

namespace fastattn::binding {
namespace {

// An array with a batch in front, of which one entry may be for all: how many there are.
std::int64_t entries_of(const Tensor& tensor, const Tensor& q) {
  return tensor.dim() > 0 && tensor.sizes()[0] == 1 ? 1 : q.sizes()[0];
}

// Tensors are kept for the core to read.
template <class Place>
Rectangles rectangles_of(const Call<Place>& call, std::optional<Tensor>& tensor, const Tensor& q) {
  if (!tensor) {
    return {};
  }
  const std::int64_t batch = entries_of(*tensor, q), most = Rectangles::kMost;
  const std::int64_t count = tensor->dim() > 1 ? std::clamp<std::int64_t>(tensor->sizes()[1], 1, most) : most;
  tensor =
      call.array("rectangles", *tensor, ScalarType::Int, "[batch or 1, 1 to 4, 4]", {batch, count, Rectangles::kSides});
  return {tensor->template const_data_ptr<std::int32_t>(), batch, count};
}

template <class Place>
SegmentIds segments_of(const Call<Place>& call, const char* name, const char* axes, std::optional<Tensor>& ids,
                       const Tensor& q, const Tensor& of) {
  if (!ids) {
    return {};
  }
  const std::int64_t batch = entries_of(*ids, q);
  ids = call.array(name, *ids, ScalarType::Int, axes, {batch, of.sizes()[1]});
  return {ids->template const_data_ptr<std::int32_t>(), batch};
}

// A problem without its results. Tensors are kept for the core to read.
template <class Place>
Attention problem_of(const char* op, const Call<Place>& call, const Tensor& q, const Tensor& k, const Tensor& v,
                     std::optional<Tensor>& key_bias, std::optional<Tensor>& window_left,
                     std::optional<Tensor>& window_right, std::optional<Tensor>& rectangles,
                     std::optional<Tensor>& segments_q, std::optional<Tensor>& segments_k, std::optional<double> scale,
                     bool causal, const std::optional<std::vector<std::int64_t>>& window, double softcap) {
  Attention problem{.q = view(q),
                    .k = view(k),
                    .v = view(v),
                    .out = {},
                    .scale = scale_of(scale, q),
                    .window = window_of(op, causal, window),
                    .softcap = static_cast<float>(softcap),
                    .key_bias = call.key_bias("key_bias", key_bias, q, k)};
  call.set_head_windows(window_left, window_right, q, problem);
  problem.rectangles = rectangles_of(call, rectangles, q);
  problem.segments.q = segments_of(call, "segments_q", "[batch or 1, seq_q]", segments_q, q, q);
  problem.segments.k = segments_of(call, "segments_k", "[batch or 1, seq_k]", segments_k, q, k);
  return problem;
}

template <class Place>
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                     std::optional<Tensor> key_bias, std::optional<Tensor> window_left,
                                     std::optional<Tensor> window_right, std::optional<Tensor> rectangles,
                                     std::optional<Tensor> segments_q, std::optional<Tensor> segments_k,
                                     std::optional<double> scale, bool causal,
                                     std::optional<std::vector<std::int64_t>> window, double softcap, bool) {
  constexpr const char* kOp = "attention";
  const Call<Place> call(kOp, q);
  q = call.input("q", q);
  k = call.input("k", k);
  v = call.input("v", v);
  const Place place(q);
  const std::int64_t rows[] = {q.sizes()[0], q.sizes()[2], q.sizes()[1]};
  const Tensor out = allocate(q, std::array{q.sizes()[0], q.sizes()[1], q.sizes()[2], v.sizes()[3]}, q.scalar_type());
  const Tensor lse = allocate(q, rows, ScalarType::Float);
  Attention problem = problem_of(kOp, call, q, k, v, key_bias, window_left, window_right, rectangles, segments_q,
                                 segments_k, scale, causal, window, softcap);
  problem.out = view(out);
  problem.lse = lse.mutable_data_ptr<float>();
  problem.sinks = call.head_values("sinks", sinks, q);
  const Workspace workspace(q, attention_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::attention(problem, place.executor));
  return {out, lse};
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    std::optional<Tensor> key_bias, std::optional<Tensor> window_left, std::optional<Tensor> window_right,
    std::optional<Tensor> rectangles, std::optional<Tensor> segments_q, std::optional<Tensor> segments_k,
    std::optional<double> scale, bool causal, std::optional<std::vector<std::int64_t>> window, double softcap,
    bool deterministic, std::vector<bool> wanted) {
  constexpr const char* kOp = "attention_backward";
  const Call<Place> call(kOp, q);
  call.check_wanted(wanted, 4);
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
  const Tensor dq = allocate_gradient(q, wanted[0]);
  const Tensor dk = allocate_gradient(k, wanted[1]);
  const Tensor dv = allocate_gradient(v, wanted[2]);
  const Tensor dkey_bias = key_bias && wanted[3]
                               ? allocate(q, std::array{q.sizes()[0], q.sizes()[2], k.sizes()[1]}, ScalarType::Float)
                               : allocate(q, std::array{std::int64_t{0}}, ScalarType::Float);
  AttentionBackward problem{.forward = problem_of(kOp, call, q, k, v, key_bias, window_left, window_right, rectangles,
                                                  segments_q, segments_k, scale, causal, window, softcap),
                            .dout = view(dout),
                            .dlse = dlse ? dlse->const_data_ptr<float>() : nullptr,
                            .dq = gradient_view(dq),
                            .dk = gradient_view(dk),
                            .dv = gradient_view(dv),
                            .dkey_bias = dkey_bias.numel() > 0 ? dkey_bias.mutable_data_ptr<float>() : nullptr,
                            .deterministic = deterministic};
  problem.forward.out = view(out);
  problem.forward.lse = lse.mutable_data_ptr<float>();
  const Workspace workspace(q, attention_backward_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::attention_backward(problem, place.executor));
  return {dq, dk, dv, dkey_bias};
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

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

template <class Place>
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                     std::optional<Tensor> key_bias, std::optional<Tensor> window_left,
                                     std::optional<Tensor> window_right, std::optional<Tensor> rectangles,
                                     std::optional<Tensor> segments_q, std::optional<Tensor> segments_k,
                                     std::optional<double> scale, bool causal,
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
  Attention problem{.q = view(q),
                    .k = view(k),
                    .v = view(v),
                    .out = view(out),
                    .lse = lse.mutable_data_ptr<float>(),
                    .scale = scale_of(scale, q),
                    .window = window_of(kOp, causal, window),
                    .softcap = static_cast<float>(softcap),
                    .key_bias = call.key_bias("key_bias", key_bias, q, k),
                    .sinks = call.head_values("sinks", sinks, q)};
  call.set_head_windows(window_left, window_right, q, problem);
  problem.rectangles = rectangles_of(call, rectangles, q);
  problem.segments.q = segments_of(call, "segments_q", "[batch or 1, seq_q]", segments_q, q, q);
  problem.segments.k = segments_of(call, "segments_k", "[batch or 1, seq_k]", segments_k, q, k);
  const Workspace workspace(q, attention_workspace(problem, place.executor));
  problem.workspace = workspace.address();
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

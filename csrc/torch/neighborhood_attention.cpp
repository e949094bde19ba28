// torch.ops.fastattn.neighborhood_attention and neighborhood_attention_backward.
#include <limits>
#include <optional>
#include <tuple>

#include "call.hpp"

namespace fastattn::binding {
namespace {

// A tensor map has five dimensions: heads and their dims share one.
struct CudaGrid : Cuda {
  using Cuda::Cuda;

  static bool addresses(const Tensor& tensor) {
    return Cuda::addresses(tensor) && (tensor.sizes()[2] <= 1 || tensor.stride(2) == tensor.sizes()[3]);
  }
};

using Shape = std::vector<std::int64_t>;

// The lengths of q's axes: its tokens are [batch, X1(, X2(, X3)), heads, head_dim].
Shape lengths_of(const char* op, const Tensor& q) {
  require(4 <= q.dim() && q.dim() <= 3 + kAxes, op,
          ": q must have 4 to 6 dimensions, [batch, X1(, X2(, X3)), heads, head_dim], got ", list(q.sizes()));
  return {q.sizes().begin() + 1, q.sizes().end() - 2};
}

// The tensor with the axes from `first` on as one: in place if they lie in memory like one, else in a copy.
Tensor flatten(const char* op, const char* name, const Tensor& tensor, const Shape& lengths, std::int64_t first) {
  const auto sizes = tensor.sizes();
  const auto begin = sizes.begin() + std::min<std::int64_t>(first, tensor.dim());
  const auto count = std::min<std::ptrdiff_t>(std::ssize(lengths), sizes.end() - begin);
  require(std::ranges::equal(std::ranges::subrange(begin, begin + count), lengths), op, ": ", name,
          " must have the axes of q, ", list(lengths), ", got ", list(sizes));
  Shape shape(sizes.begin(), begin);
  std::int64_t tokens = 1;
  for (const std::int64_t length : lengths) {
    tokens *= length;
  }
  shape.push_back(tokens);
  shape.insert(shape.end(), begin + count, sizes.end());
  return torch::stable::reshape(tensor, shape);
}

// What the op takes for each axis.
struct Options {
  Shape window, stride, dilation;
  std::vector<bool> causal;

  PerAxis<NeighborhoodAxis> axes(const char* op, const Shape& lengths) const {
    const std::size_t count = lengths.size();
    const auto check_count = [&](const char* name, std::size_t got) {
      require(got == count, op, ": ", name, " must have one value for each of the ", count, " axes, got ", got);
    };
    check_count("window", window.size());
    check_count("stride", stride.size());
    check_count("dilation", dilation.size());
    check_count("causal", causal.size());
    const auto integer = [&](const char* name, std::int64_t x) {
      constexpr std::int64_t kMost = std::numeric_limits<int>::max();
      require(-kMost <= x && x <= kMost, op, ": ", name, " must be less than 2^31, got ", x);
      return static_cast<int>(x);
    };
    PerAxis<NeighborhoodAxis> axes{{1}, {1}, {1}};
    for (std::size_t i = 0; i < count; ++i) {
      axes[kAxes - static_cast<int>(count - i)] = {.length = integer("the length of an axis", lengths[i]),
                                                   .window = integer("window", window[i]),
                                                   .stride = integer("stride", stride[i]),
                                                   .dilation = integer("dilation", dilation[i]),
                                                   .causal = causal[i]};
    }
    return axes;
  }
};

template <class Place>
std::tuple<Tensor, Tensor> neighborhood_attention(Tensor q, Tensor k, Tensor v, Shape window, Shape stride,
                                                  Shape dilation, std::vector<bool> causal, std::optional<double> scale,
                                                  bool) {
  constexpr const char* kOp = "neighborhood_attention";
  const Call<Place> call(kOp, q);
  const Shape lengths = lengths_of(kOp, q);
  const Tensor out = allocate_like(q);
  Shape rows{q.sizes()[0], q.sizes()[q.dim() - 2]};
  rows.insert(rows.end(), lengths.begin(), lengths.end());
  const Tensor lse = allocate(q, rows, ScalarType::Float);
  q = call.input("q", flatten(kOp, "q", q, lengths, 1));
  k = call.input("k", flatten(kOp, "k", k, lengths, 1));
  v = call.input("v", flatten(kOp, "v", v, lengths, 1));
  const Place place(q);
  const Workspace workspace(q, Place::kForwardWorkspace);
  require(fastattn::neighborhood_attention({.q = view(q),
                                            .k = view(k),
                                            .v = view(v),
                                            .out = view(flatten(kOp, "out", out, lengths, 1)),
                                            .lse = lse.mutable_data_ptr<float>(),
                                            .scale = scale_of(scale, q),
                                            .axes = Options{window, stride, dilation, causal}.axes(kOp, lengths),
                                            .workspace = workspace.address()},
                                           place.executor));
  return {out, lse};
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor> neighborhood_attention_backward(Tensor dout, std::optional<Tensor> dlse, Tensor q,
                                                                   Tensor k, Tensor v, Tensor out, Tensor lse,
                                                                   Shape window, Shape stride, Shape dilation,
                                                                   std::vector<bool> causal,
                                                                   std::optional<double> scale, bool deterministic,
                                                                   std::vector<bool> wanted) {
  constexpr const char* kOp = "neighborhood_attention_backward";
  const Call<Place> call(kOp, q);
  call.check_wanted(wanted, 3);
  const Shape lengths = lengths_of(kOp, q);
  const Tensor dq = allocate_gradient(q, wanted[0]);
  const Tensor dk = allocate_gradient(k, wanted[1]);
  const Tensor dv = allocate_gradient(v, wanted[2]);
  q = call.input("q", flatten(kOp, "q", q, lengths, 1));
  k = call.input("k", flatten(kOp, "k", k, lengths, 1));
  v = call.input("v", flatten(kOp, "v", v, lengths, 1));
  out = call.input("out", flatten(kOp, "out", out, lengths, 1));
  dout = call.gradient("dout", flatten(kOp, "dout", dout, lengths, 1));
  lse = call.row_statistics("lse", flatten(kOp, "lse", lse, lengths, 2), q);
  if (dlse) {
    dlse = call.row_statistics("dlse", flatten(kOp, "dlse", *dlse, lengths, 2), q);
  }
  const Place place(q);
  const auto flat_view = [&](const char* name, const Tensor& gradient) {
    return gradient.numel() > 0 ? view(flatten(kOp, name, gradient, lengths, 1)) : TensorView{};
  };
  NeighborhoodAttentionBackward problem{
      .forward = {.q = view(q),
                  .k = view(k),
                  .v = view(v),
                  .out = view(out),
                  .lse = lse.mutable_data_ptr<float>(),
                  .scale = scale_of(scale, q),
                  .axes = Options{window, stride, dilation, causal}.axes(kOp, lengths)},
      .dout = view(dout),
      .dlse = dlse ? dlse->const_data_ptr<float>() : nullptr,
      .dq = flat_view("dq", dq),
      .dk = flat_view("dk", dk),
      .dv = flat_view("dv", dv),
      .deterministic = deterministic};
  const Workspace workspace(q, neighborhood_attention_backward_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::neighborhood_attention_backward(problem, place.executor));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("neighborhood_attention", TORCH_BOX(&neighborhood_attention<Cpu>));
  m.impl("neighborhood_attention_backward", TORCH_BOX(&neighborhood_attention_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("neighborhood_attention", TORCH_BOX(&neighborhood_attention<CudaGrid>));
  m.impl("neighborhood_attention_backward", TORCH_BOX(&neighborhood_attention_backward<CudaGrid>));
}

}  // namespace fastattn::binding

// torch.ops.fastattn.quantize_tokens.
#include <optional>
#include <string>
#include <tuple>

#include "call.hpp"

namespace fastattn::binding {
namespace {

constexpr const char* kOp = "quantize_tokens";

// A format, and the type of a tensor that holds it.
struct Format {
  TokenFormat format;
  ScalarType type;
};

Format format_of(const std::string& name, bool packed) {
  require(name == "int8" || name == "int4" || name == "fp8", kOp,
          ": format must be \"int8\", \"int4\" or \"fp8\", got \"", name, "\"");
  require(packed || name == "int4", kOp, ": packed must be left out where format is not \"int4\", got \"", name, "\"");
  return name == "int8"  ? Format{TokenFormat::kInt8, ScalarType::Char}
         : name == "fp8" ? Format{TokenFormat::kFloat8, ScalarType::Float8_e4m3fn}
         : packed        ? Format{TokenFormat::kInt4, ScalarType::Byte}
                         : Format{TokenFormat::kInt4InByte, ScalarType::Char};
}

template <class Place>
std::tuple<Tensor, Tensor, Tensor> quantize_tokens(Tensor x, std::optional<Tensor> permutation, std::string format,
                                                   std::optional<std::int64_t> group, bool smooth, bool transpose,
                                                   bool packed) {
  const Call<Place> call(kOp, x, "x");
  x = call.input("x", x);
  const auto [token_format, type] = format_of(format, packed);
  const std::int64_t batch = x.sizes()[0], tokens = x.sizes()[1], heads = x.sizes()[2], dim = x.sizes()[3];
  QuantizeTokens problem;
  problem.x = view(x);
  problem.format = token_format;
  problem.transpose = transpose;
  problem.group = group.value_or(transpose ? kAllTokens : 1);
  require(problem.group >= 0, kOp, ": group must not be negative, got ", problem.group);
  problem.permutation = call.permutation("permutation", permutation, batch, tokens, heads);
  const Place place(x);

  using Shape = std::vector<std::int64_t>;
  const auto bytes = [&](std::int64_t count) { return count * bits_of(token_format) / 8; };
  const std::int64_t groups = transpose ? dim : num_groups(tokens, std::max<std::int64_t>(problem.group, 1));
  const Tensor values = allocate(
      x, transpose ? Shape{batch, heads, dim, bytes(padded_tokens(tokens))} : Shape{batch, tokens, heads, bytes(dim)},
      type);
  const Tensor scales = allocate(x, Shape{batch, heads, groups}, ScalarType::Float);
  const Tensor mean = allocate(x, Shape{batch, heads, smooth ? dim : 0}, ScalarType::Float);
  problem.values = values.mutable_data_ptr();
  problem.scales = scales.mutable_data_ptr<float>();
  problem.mean = smooth ? mean.mutable_data_ptr<float>() : nullptr;
  const Workspace workspace(x, quantize_tokens_workspace(problem, place.executor));
  problem.workspace = workspace.address();
  require(fastattn::quantize_tokens(problem, place.executor));
  return {values, scales, mean};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("quantize_tokens", TORCH_BOX(&quantize_tokens<Cpu>)); }

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("quantize_tokens", TORCH_BOX(&quantize_tokens<Cuda>)); }

}  // namespace fastattn::binding

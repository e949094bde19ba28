// quantized_attention: cases of attention and of block_sparse_attention, with formats behind.
#include <cstdint>
#include <memory>
#include <optional>
#include <regex>
#include <stdexcept>
#include <string>

#include "band_case.hpp"
#include "listed_case.hpp"
#include "ops.hpp"

namespace bench {
namespace {

using fastattn::DType;
using fastattn::TokenFormat;

// `_int8_fp8` is int8 queries and keys, fp8 values. What is timed begins with the tokens as they are; with `_kernel`
// behind that, with operands that are made before.
struct QuantizedCase final : Case {
  static constexpr const char* kForm =
      "b1_s4096[x8192]_h8[_kv2]_d64[_causal|_window512|_blocks128x128_keep30[_causal]]_int8_fp8[_kernel]";

  explicit QuantizedCase(const std::string& name) : QuantizedCase(name, parts_of(name)) {}

  bool keeps(std::int64_t b, std::int64_t head, std::int64_t q, std::int64_t k) const override {
    return of->keeps(b, head, q, k);
  }
  double density() const override { return of->density(); }
  // Above what each costs normal tokens, and well below any mistake.
  double rounding() const override {
    return qk == TokenFormat::kInt4InByte ? 0.3 : qk == TokenFormat::kFloat8 ? 0.08 : pv == "fp8" ? 0.06 : 0.03;
  }

  std::shared_ptr<const Case> of;  // the same without formats
  TokenFormat qk;
  std::string pv;
  bool kernel;

 private:
  static std::smatch parts_of(const std::string& name) {
    static const std::regex grammar(R"((.+)_(int8|int4|fp8)_(int8|fp8|bf16)(_kernel)?)");
    std::smatch parts;
    if (!std::regex_match(name, parts, grammar)) {
      throw std::invalid_argument("case '" + name + "' is not of the form " + kForm);
    }
    return parts;
  }
  static std::shared_ptr<const Case> case_of(const std::string& name) {
    if (name.find("_blocks") != std::string::npos) {
      return std::make_shared<ListedCase>(name);
    }
    return std::make_shared<BandCase>(name);
  }

  QuantizedCase(const std::string& name, const std::smatch& parts) : QuantizedCase(name, parts, case_of(parts[1])) {}
  QuantizedCase(const std::string& name, const std::smatch& parts, const std::shared_ptr<const Case>& same)
      : Case(*same),
        of(same),
        qk(parts[2] == "int8"   ? TokenFormat::kInt8
           : parts[2] == "int4" ? TokenFormat::kInt4InByte
                                : TokenFormat::kFloat8),
        pv(parts[3]),
        kernel(parts[4].matched) {
    this->name = name;
  }
};

// Tokens of few bits in the device's memory. They are not smoothed: random ones have nothing in common.
class LowBits {
 public:
  LowBits(const Device& device, const fastattn::TensorView& x, TokenFormat format, std::int64_t group, bool transpose)
      : device_(device) {
    const std::int64_t batch = x.batch(), seq = x.seq(), heads = x.heads(), dim = x.head_dim();
    const std::int64_t length = transpose ? fastattn::padded_tokens(seq) : seq;
    const std::int64_t scales = batch * heads * (transpose ? dim : fastattn::num_groups(seq, group));
    values_ = device.allocate(static_cast<std::size_t>(batch * heads * dim * length));
    scales_ = device.allocate(static_cast<std::size_t>(scales) * sizeof(float));
    problem_.x = x;
    problem_.format = format;
    problem_.values = values_.get();
    problem_.scales = static_cast<float*>(scales_.get());
    problem_.group = transpose ? fastattn::kAllTokens : group;
    problem_.transpose = transpose;
    workspace_ = device.allocate(
        device.run([&](const auto& executor) { return fastattn::quantize_tokens_workspace(problem_, executor); }));
    problem_.workspace = workspace_.get();
    view_.data = values_.get();
    view_.dtype = format == TokenFormat::kFloat8 ? DType::kFloat8 : DType::kInt8;
    const std::int64_t shape[4] = {batch, transpose ? heads : seq, transpose ? dim : heads, transpose ? length : dim};
    std::int64_t stride = 1;
    for (int axis = 3; axis >= 0; --axis) {
      view_.shape[axis] = shape[axis];
      view_.stride[axis] = stride;
      stride *= shape[axis];
    }
  }

  fastattn::Status make() const {
    return device_.run([&](const auto& executor) { return fastattn::quantize_tokens(problem_, executor); });
  }
  const fastattn::TensorView& view() const { return view_; }
  const float* scales() const { return problem_.scales; }

 private:
  const Device& device_;
  std::shared_ptr<void> values_, scales_, workspace_;
  fastattn::QuantizeTokens problem_;
  fastattn::TensorView view_;
};

class QuantizedAttentionProblem final : public Problem {
 public:
  QuantizedAttentionProblem(const Device& device, const QuantizedCase& shape, DType dtype)
      : Problem(device, shape, dtype, Score::kSoftmax),
        shape_(shape),
        low_q_(device, q_.view(), shape.qk, 1, false),
        low_k_(device, k_.view(), shape.qk, fastattn::kKeyGroup, false) {
    if (shape.pv != "bf16") {
      low_v_.emplace(device, v_.view(), shape.pv == "fp8" ? TokenFormat::kFloat8 : TokenFormat::kInt8, 1, true);
    }
    if (const auto* listed = dynamic_cast<const ListedCase*>(shape.of.get())) {
      rows_.emplace(device, listed->heads, listed->blocks_q(), listed->blocks_k(),
                    [listed](auto head, auto row, auto column) { return listed->is_listed(head, row, column); });
    }
  }

 private:
  fastattn::QuantizedAttention problem() const {
    const auto* const listed = dynamic_cast<const ListedCase*>(shape_.of.get());
    using Lists = std::optional<fastattn::BlockLists>;
    return {.q = low_q_.view(),
            .k = low_k_.view(),
            .q_scales = low_q_.scales(),
            .k_scales = low_k_.scales(),
            .v = low_v_ ? low_v_->view() : v_.view(),
            .v_scales = low_v_ ? low_v_->scales() : nullptr,
            .out = out_.view(),
            .lse = lse(),
            .scale = scale_,
            .window = listed ? fastattn::Window{} : static_cast<const BandCase&>(*shape_.of).window,
            .blocks = listed ? Lists(listed->lists(rows_->rows(), {})) : Lists(),
            .order = {},
            .workspace = forward_workspace()};
  }

  fastattn::Status run_forward() const override {
    if (!shape_.kernel || !made_) {
      for (const LowBits* tokens : {&low_q_, &low_k_, low_v_ ? &*low_v_ : nullptr}) {
        if (tokens != nullptr) {
          if (const fastattn::Status status = tokens->make(); !status.ok()) {
            return status;
          }
        }
      }
      made_ = true;
    }
    return device_.run([&](const auto& executor) { return fastattn::quantized_attention(problem(), executor); });
  }
  fastattn::Status run_backward() const override { return {"quantized_attention has no backward"}; }
  std::size_t workspace_bytes() const override { return 0; }

  const QuantizedCase& shape_;
  const LowBits low_q_, low_k_;
  std::optional<LowBits> low_v_;
  std::optional<Lists> rows_;
  mutable bool made_ = false;
};

const AddOp<QuantizedCase, QuantizedAttentionProblem> kOp{
    "quantized_attention",
    {
        "b1_s2048_h8_d64_int8_int8",
        "b1_s2048_h8_d64_int8_int8_kernel",
        "b1_s2048_h8_d64_int8_fp8",
        "b1_s2048_h8_d64_int8_bf16",
        "b1_s2048_h8_d64_int4_int8",
        "b1_s2048_h4_d128_causal_int8_int8",
        "b1_s2048_h8_d64_blocks64x64_keep30_int8_int8",
    },
    {
        "b1_s16384_h16_d128_int8_int8",
        "b1_s16384_h16_d128_int8_int8_kernel",
        "b1_s16384_h16_d128_int8_fp8",
        "b1_s16384_h16_d128_int8_fp8_kernel",
        "b1_s16384_h16_d128_int8_bf16",
        "b1_s16384_h16_d128_int8_bf16_kernel",
        "b1_s16384_h16_d128_fp8_fp8_kernel",
        "b1_s16384_h16_d128_int4_int8",
        "b1_s16384_h16_d128_causal_int8_bf16",
        "b1_s65536_h16_d128_int8_fp8",
        "b1_s65536_h16_d128_int8_bf16",
        "b1_s16384_h16_d64_int8_int8",
        "b1_s16384_h16_d64_int8_fp8",
        "b1_s16384_h16_d64_int8_bf16",
        "b1_s16384_h16_d128_blocks128x128_keep30_int8_fp8",
        "b2_s17776_h48_d64_blocks128x128_keep30_int8_bf16",
        "b2_s17776_h48_d64_blocks192x128_keep30_int8_bf16",
    },
    {
        "b1_s130_h2_d64_int8_int8",
        "b1_s200x333_h4_kv2_d64_causal_int8_fp8",
        "b1_s257_h2_d64_window100_fp8_fp8",
        "b1_s257_h2_d64_blocks64x64_keep60_int8_bf16",
        "b1_s130_h2_d128_int4_int8",
        "b1_s200x333_h4_kv2_d128_causal_int8_int8",
        "b1_s257_h2_d128_blocks128x64_keep30_int8_fp8",
        "b1_s200x333_h4_kv2_d128_blocks64x128_keep60_causal_int8_int8_kernel",
    },
    false,
};

}  // namespace
}  // namespace bench

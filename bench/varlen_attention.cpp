// varlen_attention: the cases and the calls.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <regex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "case.hpp"
#include "fastattn/fastattn.hpp"
#include "ops.hpp"

namespace bench {
namespace {

// 32x512 are 32 sequences of 512 tokens, ramp16x2048 are 16 that rise to 2048 in equal steps; 1x8192+64x128 are both.
struct VarlenCase final : Case {
  static constexpr const char* kForm =
      "b1_32x512_h8[_kv2]_d64[v32][_causal], with 1x8192+64x128 or ramp16x2048 for 32x512";
  static constexpr const char* kTokens = R"((?:ramp)?\d+x\d+(?:\+(?:ramp)?\d+x\d+)*)";

  explicit VarlenCase(const std::string& name) : VarlenCase(CaseName(name, kForm, kTokens, "(_causal)?")) {}

  bool keeps(std::int64_t, std::int64_t, std::int64_t q, std::int64_t k) const override {
    return sequence_of(q) == sequence_of(k) && (!causal || k <= q);
  }
  double density() const override {
    double kept = 0;
    for (const std::int64_t length : lengths) {
      kept += static_cast<double>(causal ? length * (length + 1) / 2 : length * length);
    }
    return kept / static_cast<double>(seq_q * seq_k);
  }
  bool has_backward() const override { return head_dim == value_dim; }

  const std::vector<std::int64_t> lengths;
  const std::vector<std::int32_t> ends;  // 0, then that of each sequence
  const bool causal;

 private:
  explicit VarlenCase(const CaseName& parts) : VarlenCase(parts, lengths_of(parts.tokens.str())) {}
  VarlenCase(const CaseName& parts, std::vector<std::int64_t> of_sequences)
      : Case(parts, total(of_sequences), total(of_sequences)),
        lengths(std::move(of_sequences)),
        ends(ends_of(lengths)),
        causal(parts.mask[1].matched) {
    if (batch != 1 || seq_q == 0) {
      throw std::invalid_argument("case '" + name + "' must have one batch entry and at least one token");
    }
  }

  static std::int64_t total(const std::vector<std::int64_t>& lengths) {
    return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
  }
  static std::vector<std::int64_t> lengths_of(const std::string& runs) {
    static const std::regex grammar(R"((ramp)?(\d+)x(\d+))");
    std::vector<std::int64_t> lengths;
    for (std::sregex_iterator run(runs.begin(), runs.end(), grammar), end; run != end; ++run) {
      const std::int64_t count = number((*run)[2]), length = number((*run)[3]);
      for (std::int64_t i = 0; i < count; ++i) {
        lengths.push_back((*run)[1].matched ? length * (i + 1) / count : length);
      }
    }
    return lengths;
  }

  static std::vector<std::int32_t> ends_of(const std::vector<std::int64_t>& lengths) {
    std::vector<std::int32_t> ends{0};
    for (const std::int64_t length : lengths) {
      ends.push_back(ends.back() + static_cast<std::int32_t>(length));
    }
    return ends;
  }

  std::ptrdiff_t sequence_of(std::int64_t token) const { return std::ranges::upper_bound(ends, token) - ends.begin(); }
};

class VarlenAttentionProblem final : public Problem {
 public:
  VarlenAttentionProblem(const Device& device, const VarlenCase& shape, fastattn::DType dtype)
      : Problem(device, shape, dtype, Score::kSoftmax), shape_(shape) {
    const std::size_t bytes = shape.ends.size() * sizeof shape.ends[0];
    cu_seqlens_ = device.allocate(bytes);
    device.copy_in(cu_seqlens_.get(), shape.ends.data(), bytes);
  }

 private:
  fastattn::VarlenAttention problem() const {
    const auto* cu_seqlens = static_cast<const std::int32_t*>(cu_seqlens_.get());
    const std::int64_t longest = *std::ranges::max_element(shape_.lengths);
    return {.attention = {.q = q_.view(),
                          .k = k_.view(),
                          .v = v_.view(),
                          .out = out_.view(),
                          .lse = lse(),
                          .scale = scale_,
                          .window = {.left = fastattn::kUnbounded, .right = shape_.causal ? 0 : fastattn::kUnbounded},
                          .workspace = forward_workspace()},
            .sequences = {.count = static_cast<std::int64_t>(shape_.lengths.size()),
                          .cu_seqlens_q = cu_seqlens,
                          .cu_seqlens_k = cu_seqlens,
                          .max_seqlen_q = longest,
                          .max_seqlen_k = longest}};
  }

  fastattn::VarlenAttentionBackward backward_problem() const {
    return backward_of<fastattn::VarlenAttentionBackward>(problem());
  }

  fastattn::Status run_forward() const override {
    return device_.run([&](const auto& executor) { return fastattn::varlen_attention(problem(), executor); });
  }
  fastattn::Status run_backward() const override {
    return device_.run(
        [&](const auto& executor) { return fastattn::varlen_attention_backward(backward_problem(), executor); });
  }
  std::size_t workspace_bytes() const override {
    return device_.run([&](const auto& executor) {
      return fastattn::varlen_attention_backward_workspace(backward_problem(), executor);
    });
  }

  const VarlenCase& shape_;
  std::shared_ptr<void> cu_seqlens_;
};

const AddOp<VarlenCase, VarlenAttentionProblem> kOp{
    "varlen_attention",
    {
        "b1_ramp16x512_h8_d64_causal",
        "b1_64x64_h8_d64",
    },
    {
        "b1_4x4096_h32_d64_causal",
        "b1_4x4096_h16_d128_causal",
        "b1_32x512_h32_d64_causal",
        "b1_32x512_h16_d128_causal",
        "b1_ramp16x2048_h32_d64_causal",
        "b1_ramp16x2048_h16_d128_causal",
        "b1_1x8192+64x128_h16_d128_causal",
        "b1_256x64_h16_d128_causal",
    },
    {
        "b1_1x130+0x3+2x57_h4_kv2_d64_causal",
        "b1_1x130+0x3+2x57_h4_kv2_d128_causal",
        "b1_ramp5x333_h2_d64",
        "b1_ramp5x333_h2_d128",
        "b1_150x40_h2_d64",  // more key tiles than multiprocessors
        "b1_150x40_h2_d128_causal",
        "b1_3x5+1x200_h2_d256_causal",
        "b1_1x5+2x200_h2_d96",
        "b1_1x5+2x200_h2_d64v32_causal",
    },
};

}  // namespace
}  // namespace bench

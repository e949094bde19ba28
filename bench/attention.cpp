// attention: the cases and the calls.
#include <cmath>
#include <limits>
#include <optional>

#include "band_case.hpp"
#include "ops.hpp"

namespace bench {
namespace {

// `bias` is of keys, some of which it hides, the same for all heads; `sinks` are 1 for each head.
struct AttentionCase final : BandCase {
  static constexpr const char* kForm =
      "b1_s4096[x8192]_h8[_kv2]_d64[v32][_causal|_window512][_softcap50][_bias][_sinks]";

  explicit AttentionCase(const std::string& name)
      : AttentionCase(CaseName(name, kForm, kTokens, R"((_causal|_window(\d+))?(?:_softcap(\d+))?(_bias)?(_sinks)?)")) {
  }

  static float bias_of(std::int64_t key) {
    return key % 7 == 6 ? -std::numeric_limits<float>::infinity() : static_cast<float>(key * 37 % 64) / 16.f - 2.f;
  }

  double modified(double score, std::int64_t key) const override {
    const double capped = softcap > 0 ? softcap * std::tanh(score / softcap) : score;
    return capped + (bias ? bias_of(key) : 0.f);
  }
  double sink() const override { return sinks ? kSink : BandCase::sink(); }
  bool has_backward() const override { return softcap == 0 && !bias && head_dim == value_dim; }

  static constexpr float kSink = 1.f;
  const float softcap;
  const bool bias, sinks;

 private:
  explicit AttentionCase(const CaseName& parts)
      : BandCase(parts),
        softcap(static_cast<float>(number(parts.mask[3]))),
        bias(parts.mask[4].matched),
        sinks(parts.mask[5].matched) {}
};

class AttentionProblem final : public Problem {
 public:
  AttentionProblem(const Device& device, const AttentionCase& shape, fastattn::DType dtype)
      : Problem(device, shape, dtype, Score::kSoftmax), shape_(shape) {
    if (shape.bias) {
      bias_.emplace(device, fastattn::DType::kFloat32, 1, 1, 1, fastattn::padded_tokens(shape.seq_k));
      bias_->fill([&](std::int64_t key) {  // what is past the keys is not looked at
        return key < shape.seq_k ? AttentionCase::bias_of(key) : std::numeric_limits<float>::quiet_NaN();
      });
    }
    if (shape.sinks) {
      sinks_.emplace(device, fastattn::DType::kFloat32, 1, 1, 1, shape.heads);
      sinks_->fill([](std::int64_t) { return AttentionCase::kSink; });
    }
    set_forward_workspace(
        device.run([&](const auto& executor) { return fastattn::attention_workspace(problem(), executor); }));
  }

 private:
  static const float* floats(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const float*>(tensor->view().data) : nullptr;
  }

  fastattn::Attention problem() const {
    return {.q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out_.view(),
            .lse = lse(),
            .scale = scale_,
            .window = shape_.window,
            .softcap = shape_.softcap,
            .key_bias = {.bias = floats(bias_)},
            .sinks = floats(sinks_),
            .workspace = forward_workspace()};
  }

  fastattn::AttentionBackward backward_problem() const { return backward_of<fastattn::AttentionBackward>(problem()); }

  fastattn::Status run_forward() const override {
    return device_.run([&](const auto& executor) { return fastattn::attention(problem(), executor); });
  }
  fastattn::Status run_backward() const override {
    return device_.run(
        [&](const auto& executor) { return fastattn::attention_backward(backward_problem(), executor); });
  }
  std::size_t workspace_bytes() const override {
    return device_.run(
        [&](const auto& executor) { return fastattn::attention_backward_workspace(backward_problem(), executor); });
  }

  const AttentionCase& shape_;
  std::optional<Tensor> bias_, sinks_;
};

const AddOp<AttentionCase, AttentionProblem> kOp{
    "attention",
    {
        "b1_s4096_h8_d64",
        "b1_s4096_h8_d64_causal",
        "b8_s128_h8_d64",
        "b1_s4096_h8_kv2_d64_causal",
        "b1_s2048_h8_d64",
    },
    // Twelve dense cases of 16,384 tokens and hidden size 2048, then short and long sequences, images, grouped heads, a
    // sliding window and other sizes of heads.
    {
        "b4_s4096_h32_d64",
        "b4_s4096_h32_d64_causal",
        "b4_s4096_h16_d128",
        "b4_s4096_h16_d128_causal",
        "b1_s16384_h32_d64",
        "b1_s16384_h32_d64_causal",
        "b1_s16384_h16_d128",
        "b1_s16384_h16_d128_causal",
        "b4_s4096_h8_d256",
        "b4_s4096_h8_d256_causal",
        "b1_s16384_h8_d256",
        "b1_s16384_h8_d256_causal",
        "b32_s512_h32_d64_causal",
        "b32_s512_h16_d128_causal",
        "b16_s1024_h32_d64_causal",
        "b16_s1024_h16_d128_causal",
        "b8_s2048_h16_d128_causal",
        "b2_s8192_h16_d128_causal",
        "b1_s32768_h16_d128_causal",
        "b4_s4113_h16_d128_causal",
        "b64_s197_h16_d64",
        "b64_s577_h16_d64",
        "b2_s8192_h64_kv8_d128_causal",
        "b2_s8192_h32_kv4_d128_causal",
        "b2_s8192_h32_kv8_d64_causal",
        "b2_s8192_h32_kv8_d128_causal",
        "b1_s16384_h16_d128_window1024",
        "b1_s16384_h64_d32",
        "b1_s16384_h20_d96_causal",
        "b1_s16384_h16_d128_causal_sinks",
        "b1_s16384_h10_d192",
        "b16_s1x8192_h64_kv8_d128",
        "b1_s1x131072_h64_kv8_d128",
        "b8_s16x8192_h32_kv8_d128_causal",
        "b16_s4x8192_h64_kv8_d64_causal",
        "b1_s512x65536_h8_kv2_d128_causal",
        "b1_s16384_h16_d192v128_causal",
        "b1_s16384_h16_d128v32",
        "b1_s16384_h16_d128_causal_bias",
        "b1_s16384_h16_d128_causal_softcap50",
        "b1_s16384_h32_d64_causal_softcap50_bias_sinks",
    },
    {
        "b1_s130_h2_d64",
        "b1_s200x333_h4_kv2_d64_causal",
        "b1_s257_h2_d64_window100",
        "b1_s130_h2_d128",
        "b2_s200_h80_d64_causal",
        "b2_s200_h80_d128_causal",
        "b1_s200x333_h4_kv2_d128_causal",
        "b1_s257_h2_d128_window100",
        "b1_s300_h8_kv1_d64_causal",
        "b1_s300_h8_kv1_d128_causal",
        "b1_s520_h27_d64",  // of 135 key tiles 132 multiprocessors share the last three
        "b1_s520_h27_d128",
        "b1_s300x333_h4_kv2_d32_causal",
        "b1_s257_h2_d96_window100",
        "b1_s200x333_h4_kv2_d192_causal",
        "b2_s200_h80_d256_causal",
        "b1_s200x333_h4_kv2_d192v128_causal",
        "b1_s257_h2_d64v16_window100",
        "b1_s5x1100_h10_kv2_d64_causal",
        "b1_s1x1300_h8_kv2_d128",
        "b1_s40x1100_h3_kv1_d256_window600",
        "b1_s257_h2_d128v32",
        "b1_s200x333_h4_kv2_d64_causal_bias",
        "b1_s257_h2_d64_softcap50_bias_sinks",
        "b1_s130_h2_d128_softcap50",
        "b1_s200x333_h4_kv2_d256_bias",
        "b1_s257_h2_d64_window100_sinks",
    },
};

}  // namespace
}  // namespace bench

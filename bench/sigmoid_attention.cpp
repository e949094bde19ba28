// sigmoid_attention: the cases and the calls.
#include "band_case.hpp"
#include "ops.hpp"

namespace bench {
namespace {

class SigmoidAttentionProblem final : public Problem {
 public:
  SigmoidAttentionProblem(const Device& device, const BandCase& shape, fastattn::DType dtype)
      : Problem(device, shape, dtype, Score::kSigmoid), window_(shape.window) {}

 private:
  fastattn::SigmoidAttention problem() const {
    return {.q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out_.view(),
            .scale = scale_,
            .window = window_,
            .bias = bias_,
            .head_bias = nullptr,
            .workspace = forward_workspace()};
  }

  fastattn::SigmoidAttentionBackward backward_problem() const {
    return backward_of<fastattn::SigmoidAttentionBackward>(problem());
  }

  fastattn::Status run_forward() const override {
    return device_.run([&](const auto& executor) { return fastattn::sigmoid_attention(problem(), executor); });
  }
  fastattn::Status run_backward() const override {
    return device_.run(
        [&](const auto& executor) { return fastattn::sigmoid_attention_backward(backward_problem(), executor); });
  }
  std::size_t workspace_bytes() const override {
    return device_.run([&](const auto& executor) {
      return fastattn::sigmoid_attention_backward_workspace(backward_problem(), executor);
    });
  }

  const fastattn::Window window_;
};

const AddOp<BandCase, SigmoidAttentionProblem> kOp{
    "sigmoid_attention",
    {
        "b1_s4096_h8_d64",
        "b1_s4096_h8_d64_causal",
    },
    {
        "b4_s4096_h32_d64",
        "b4_s4096_h32_d64_causal",
        "b4_s4096_h16_d128",
        "b4_s4096_h16_d128_causal",
        "b1_s16384_h32_d64",
        "b1_s16384_h32_d64_causal",
        "b1_s16384_h16_d128",
        "b1_s16384_h16_d128_causal",
    },
    {
        "b1_s130_h2_d64",
        "b1_s200x333_h4_kv2_d64_causal",
        "b1_s257_h2_d64_window100",
        "b1_s130_h2_d128",
        "b1_s200x333_h4_kv2_d128_causal",
        "b1_s257_h2_d128_window100",
    },
};

}  // namespace
}  // namespace bench

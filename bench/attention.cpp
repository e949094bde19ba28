// attention: the cases and the calls.
#include "band_case.hpp"
#include "ops.hpp"

namespace bench {
namespace {

class AttentionProblem final : public Problem {
 public:
  AttentionProblem(const Device& device, const BandCase& shape, fastattn::DType dtype)
      : Problem(device, shape, dtype, Score::kSoftmax), window_(shape.window) {}

 private:
  fastattn::Attention problem() const {
    return {.q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out_.view(),
            .lse = lse(),
            .scale = scale_,
            .window = window_,
            .workspace = forward_workspace()};
  }

  fastattn::AttentionBackward backward_problem() const {
    return {.forward = problem(),
            .dout = gradients_->dout.view(),
            .dlse = nullptr,
            .dq = gradients_->dq.view(),
            .dk = gradients_->dk.view(),
            .dv = gradients_->dv.view(),
            .workspace = gradients_->workspace.get()};
  }

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

  const fastattn::Window window_;
};

const AddOp<BandCase, AttentionProblem> kOp{
    "attention",
    {
        "b1_s4096_h8_d64",
        "b1_s4096_h8_d64_causal",
        "b8_s128_h8_d64",
        "b1_s4096_h8_kv2_d64_causal",
    },
    // Eight dense cases of 16,384 tokens and hidden size 2048, then short sequences, images, grouped heads, a sliding
    // window and other sizes of heads.
    {
        "b4_s4096_h32_d64",
        "b4_s4096_h32_d64_causal",
        "b4_s4096_h16_d128",
        "b4_s4096_h16_d128_causal",
        "b1_s16384_h32_d64",
        "b1_s16384_h32_d64_causal",
        "b1_s16384_h16_d128",
        "b1_s16384_h16_d128_causal",
        "b32_s512_h32_d64_causal",
        "b32_s512_h16_d128_causal",
        "b16_s1024_h32_d64_causal",
        "b16_s1024_h16_d128_causal",
        "b8_s2048_h16_d128_causal",
        "b4_s4113_h16_d128_causal",
        "b64_s197_h16_d64",
        "b64_s577_h16_d64",
        "b2_s8192_h64_kv8_d128_causal",
        "b2_s8192_h32_kv4_d128_causal",
        "b2_s8192_h32_kv8_d64_causal",
        "b2_s8192_h32_kv8_d128_causal",
        "b1_s16384_h16_d128_window1024",
        "b4_s4096_h8_d256",
        "b4_s4096_h8_d256_causal",
        "b1_s16384_h8_d256",
        "b1_s16384_h8_d256_causal",
        "b1_s16384_h64_d32",
        "b1_s16384_h20_d96_causal",
        "b1_s16384_h10_d192",
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
        "b1_s300x333_h4_kv2_d32_causal",
        "b1_s257_h2_d96_window100",
        "b1_s200x333_h4_kv2_d192_causal",
        "b2_s200_h80_d256_causal",
    },
    true,
    {
        // for which a GPU has no backward yet
        "b4_s4096_h8_d256",
        "b4_s4096_h8_d256_causal",
        "b1_s16384_h8_d256",
        "b1_s16384_h8_d256_causal",
        "b1_s16384_h10_d192",
        "b1_s200x333_h4_kv2_d192_causal",
        "b2_s200_h80_d256_causal",
    },
};

}  // namespace
}  // namespace bench

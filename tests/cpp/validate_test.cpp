// Bad input is refused with a message that names the argument, what came and what is allowed.
#include <cmath>
#include <cstring>
#include <string>

#include "attention_problem.hpp"
#include "check.hpp"

using namespace fastattn;

namespace {

using Edit = void (*)(AttentionBackward&);

void refuse(Edit edit, const char* message) {
  AttentionProblem p({2, 10, 12, 4, 2, 16}, DType::kFloat32, {});
  const std::vector<double> before = p.out.values();
  edit(p.description);
  const std::string forward = attention(p.description.forward, StdThreads{}).message;
  check(forward == std::string("attention: ") + message, "got '" + forward + "'");
  const std::string backward = attention_backward(p.description, StdThreads{}).message;
  check(backward == std::string("attention_backward: ") + message, "got '" + backward + "'");
  check(std::isnan(p.out.get(0, 0, 0, 0)), "nothing is written");
}

void refuse_backward(Edit edit, const char* message) {
  AttentionProblem p({2, 10, 12, 4, 2, 16}, DType::kFloat32, {});
  edit(p.description);
  const std::string got = attention_backward(p.description, StdThreads{}).message;
  check(got == std::string("attention_backward: ") + message, "got '" + got + "'");
}

void set_head_dim(AttentionBackward& p, std::int64_t head_dim) {
  for (TensorView* view : {&p.forward.q, &p.forward.k, &p.forward.v, &p.forward.out}) {
    view->shape[3] = head_dim;
  }
}

const Test forward("validate: what both directions refuse", [] {
  refuse([](auto& p) { p.forward.k.dtype = DType::kFloat16; }, "k must have the dtype of q, float32, got float16");
  refuse([](auto& p) { p.forward.out.dtype = DType::kBFloat16; },
         "out must have the dtype of q, float32, got bfloat16");
  refuse([](auto& p) { p.forward.q.dtype = static_cast<DType>(9); },
         "q must be float32, float16 or bfloat16, got an unknown dtype");
  refuse([](auto& p) { set_head_dim(p, 0); }, "head_dim must be a multiple of 8 between 8 and 256, got 0");
  refuse([](auto& p) { set_head_dim(p, 4); }, "head_dim must be a multiple of 8 between 8 and 256, got 4");
  refuse([](auto& p) { set_head_dim(p, 264); }, "head_dim must be a multiple of 8 between 8 and 256, got 264");
  refuse([](auto& p) { p.forward.k.shape[3] = 8; }, "k must have the head_dim of q, 16, got 8");
  refuse([](auto& p) { p.forward.k.shape[0] = 1; }, "k must have the batch size of q, 2, got 1");
  refuse([](auto& p) { p.forward.k.shape[2] = 3; }, "the heads of q must be a multiple of those of k, got 4 and 3");
  refuse([](auto& p) { p.forward.k.shape[2] = 0; }, "the heads of q must be a multiple of those of k, got 4 and 0");
  refuse([](auto& p) { p.forward.v.shape[1] = 11; }, "v must have the shape of k, [2, 12, 2, 16], got [2, 11, 2, 16]");
  refuse([](auto& p) { p.forward.out.shape[2] = 2; },
         "out must have the shape of q, [2, 10, 4, 16], got [2, 10, 2, 16]");
  refuse([](auto& p) { p.forward.v.stride[3] = 2; }, "v must be contiguous in its last dimension, got stride 2");
  refuse([](auto& p) { p.forward.q.shape[1] = -1; }, "q has a negative size, -1, at axis 1");
  refuse([](auto& p) { p.forward.q.data = nullptr; }, "q has no data");
  refuse([](auto& p) { p.forward.q.shape[1] = std::int64_t{1} << 30; }, "q must be shorter than 2^30, got 1073741824");
  refuse([](auto& p) { p.forward.scale = 0.f; }, "scale must be finite and positive, got 0");
  refuse([](auto& p) { p.forward.scale = -1.f; }, "scale must be finite and positive, got -1");
  refuse([](auto& p) { p.forward.scale = HUGE_VALF; }, "scale must be finite and positive, got inf");
  refuse([](auto& p) { p.forward.scale = std::nanf(""); }, "scale must be finite and positive, got nan");
  refuse([](auto& p) { p.forward.window.left = -2; }, "window.left must be at least 0, or -1 for no bound, got -2");
  refuse([](auto& p) { p.forward.window.right = -9; }, "window.right must be at least 0, or -1 for no bound, got -9");
});

const Test backward("validate: what the backward refuses as well", [] {
  refuse_backward([](auto& p) { p.dout.shape[1] = 9; },
                  "dout must have the shape of out, [2, 10, 4, 16], got [2, 9, 4, 16]");
  refuse_backward([](auto& p) { p.dq.dtype = DType::kFloat16; }, "dq must have the dtype of q, float32, got float16");
  refuse_backward([](auto& p) { p.dk.shape[2] = 4; },
                  "dk must have the shape of k, [2, 12, 2, 16], got [2, 12, 4, 16]");
  refuse_backward([](auto& p) { p.dv.stride[3] = 0; }, "dv must be contiguous in its last dimension, got stride 0");
  refuse_backward([](auto& p) { p.forward.lse = nullptr; }, "lse is needed and has no data");
  refuse_backward([](auto& p) { p.workspace = nullptr; }, "workspace has no data");
  static float gradient;
  refuse_backward([](auto& p) { p.dkey_bias = &gradient; }, "dkey_bias must be left out where there is no key_bias");
});

const Test regions("validate: rectangles and segments", [] {
  static constexpr std::int32_t kValues[4 * 5 * 2] = {};
  const auto refuse = [](void (*edit)(Attention&), const char* message) {
    AttentionProblem p({2, 10, 12, 4, 2, 16}, DType::kFloat32, {});
    edit(p.description.forward);
    p.description.forward.workspace = nullptr;
    const std::string got = attention(p.description.forward, StdThreads{}).message;
    check(got == std::string("attention: ") + message, "got '" + got + "'");
  };
  refuse([](auto& p) { p.rectangles = {kValues, 1, 5}; }, "rectangles must be at most 4, got 5");
  refuse([](auto& p) { p.rectangles = {kValues, 1, -1}; }, "rectangles must be at most 4, got -1");
  refuse([](auto& p) { p.rectangles = {nullptr, 1, 2}; }, "rectangles is needed and has no data");
  refuse([](auto& p) { p.rectangles = {kValues, 3, 1}; }, "rectangles must be of 1 or 2 batch entries, got 3");
  refuse([](auto& p) { p.segments.q = {kValues}; },
         "segments must be of queries and of keys, got those of queries alone");
  refuse([](auto& p) { p.segments.k = {kValues}; }, "segments must be of queries and of keys, got those of keys alone");
  refuse([](auto& p) { p.segments = {{kValues}, {kValues, 0}}; }, "segments_k must be of 1 or 2 batch entries, got 0");
  refuse([](auto& p) { p.segments = {{kValues}, {kValues}}; }, "workspace has no data");
  refuse(
      [](auto& p) {
        p.segments = {{kValues}, {kValues}};
        p.softcap = 2.f;
      },
      "segments cannot be combined with softcap yet");
});

const Test longest("validate: the longest window and unbounded sides are the same", [] {
  AttentionProblem bounded({1, 30, 20, 1, 1, 8}, DType::kFloat32, {INT64_MAX, INT64_MAX});
  AttentionProblem unbounded({1, 30, 20, 1, 1, 8}, DType::kFloat32, {});
  check(attention(bounded.description.forward, StdThreads{}).ok(), "runs");
  check(attention(unbounded.description.forward, StdThreads{}).ok(), "runs");
  check(bounded.out.values() == unbounded.out.values(), "same output");
});

const Test neighborhood("validate: the axes of a neighborhood", [] {
  AttentionProblem p({1, 12, 12, 2, 2, 16}, DType::kFloat32, {});
  const auto refuse = [&](const PerAxis<NeighborhoodAxis>& axes, const char* message) {
    const NeighborhoodAttention problem{p.q.view(), p.k.view(), p.v.view(), p.out.view(), p.lse.data(), 1.f, axes};
    const std::string forward = neighborhood_attention(problem, StdThreads{}).message;
    check(forward == std::string("neighborhood_attention: ") + message, "got '" + forward + "'");
    const NeighborhoodAttentionBackward gradients{problem,     p.dout.view(), nullptr,
                                                  p.dq.view(), p.dk.view(),   p.dv.view()};
    const std::string backward = neighborhood_attention_backward(gradients, StdThreads{}).message;
    check(backward == std::string("neighborhood_attention_backward: ") + message, "got '" + backward + "'");
  };
  constexpr int kFar = 1 << 30;
  refuse({{1}, {1}, {13}}, "q must have the tokens of the axes, 1 x 1 x 13, got 12");
  refuse({{kFar - 1}, {kFar - 1}, {kFar - 1}},
         "q must have the tokens of the axes, 1073741823 x 1073741823 x 1073741823, got 12");
  refuse({{kFar}, {1}, {0}}, "length must be between 0 and 2^30 - 1, got 1073741824 for axis 0 of 3");
  refuse({{1}, {-3}, {-4}}, "length must be between 0 and 2^30 - 1, got -3 for axis 1 of 3");
  refuse({{1}, {1}, {12, 0}}, "window must be at least 1, or -1 for the whole axis, got 0 for axis 2 of 3");
  refuse({{1}, {1}, {12, 3, 4}}, "stride must be between 1 and the window, 3, got 4 for axis 2 of 3");
  refuse({{1}, {1}, {12, -1, kFar}},
         "stride must be between 1 and the limit, 1073741823, got 1073741824 for axis 2 of 3");
  refuse({{1}, {1}, {12, 3, 1, 0}}, "dilation must be at least 1, got 0 for axis 2 of 3");
});

const Test no_tokens("validate: a grid without tokens, however long its other axes", [] {
  AttentionProblem p({1, 0, 0, 2, 2, 16}, DType::kFloat32, {});
  const NeighborhoodAttention problem{.q = p.q.view(),
                                      .k = p.k.view(),
                                      .v = p.v.view(),
                                      .out = p.out.view(),
                                      .axes = {{(1 << 30) - 1}, {(1 << 30) - 1}, {0}}};
  check(neighborhood_attention(problem, StdThreads{}).ok(), "forward");
  const NeighborhoodAttentionBackward gradients{problem, p.dout.view(), nullptr, p.dq.view(), p.dk.view(), p.dv.view()};
  check(neighborhood_attention_backward(gradients, StdThreads{}).ok(), "backward");
});

}  // namespace

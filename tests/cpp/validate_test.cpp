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
});

const Test longest("validate: the longest window and unbounded sides are the same", [] {
  AttentionProblem bounded({1, 30, 20, 1, 1, 8}, DType::kFloat32, {INT64_MAX, INT64_MAX});
  AttentionProblem unbounded({1, 30, 20, 1, 1, 8}, DType::kFloat32, {});
  check(attention(bounded.description.forward, StdThreads{}).ok(), "runs");
  check(attention(unbounded.description.forward, StdThreads{}).ok(), "runs");
  check(bounded.out.values() == unbounded.out.values(), "same output");
});

}  // namespace

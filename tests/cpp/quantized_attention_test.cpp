// quantized_attention on the CPU: with every instruction set this machine has, and what it refuses.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "attention_problem.hpp"
#include "check.hpp"
#include "cpu/kernels.hpp"
#include "fastattn/operand/low_bit.hpp"
#include "ops/validate.hpp"

using namespace fastattn;

namespace {

const Test slots("token_in_slot: the four tokens of a thread lie side by side", [] {
  for (std::int64_t first = 0; first < 1024; first += 16) {
    std::vector<bool> seen(16, false);
    for (std::int64_t g = 0; g < 4; ++g) {
      const std::int64_t of_thread[] = {2 * g, 2 * g + 1, 2 * g + 8, 2 * g + 9};
      for (int i = 0; i < 4; ++i) {
        const std::int64_t slot = first + 4 * g + i, token = token_in_slot(slot);
        check(token == first + of_thread[i], "slot " + std::to_string(slot));
        check(!seen[token - first], "each token once");
        seen[token - first] = true;
        // Three bits of the slot take each other's places in turn.
        check(token_in_slot(token_in_slot(token)) == slot, "twice more is the way back");
      }
    }
  }
});

const Test groups("group_of: a thread's columns share a group, and no other thread's do", [] {
  for (const std::int64_t group : {8, 16, 32}) {
    for (std::int64_t token = 0; token < 1024; ++token) {
      const std::int64_t run = token / (4 * group), thread = token % 8 / 2;
      check(group_of(token, group) == 4 * run + thread, "token " + std::to_string(token));
      check(group_of(token, group) < num_groups(token + 1, group), "there is such a group");
    }
    check(num_groups(4 * group, group) == 4 && num_groups(4 * group + 1, group) == 8, "whole runs");
  }
  check(group_of(77, 1) == 77 && num_groups(77, 1) == 77, "groups of one");
});

constexpr Shape kShape{2, 70, 200, 4, 2, 24};
constexpr float kScale = 0.3f;

// Tokens of few bits with what they mean.
struct LowBits {
  std::vector<std::uint8_t> values;
  std::vector<float> scales;
  TensorView view;

  LowBits(const Tensor& x, DType dtype, std::int64_t group, bool transpose) {
    const TensorView& of = x.view();
    const std::int64_t b = of.batch(), s = of.seq(), h = of.heads(), d = of.head_dim();
    values.resize(b * h * d * (transpose ? padded_tokens(s) : s));
    scales.resize(b * h * (transpose ? d : num_groups(s, group)));
    QuantizeTokens problem;
    problem.x = of;
    problem.format = dtype == DType::kInt8 ? TokenFormat::kInt8 : TokenFormat::kFloat8;
    problem.values = values.data();
    problem.scales = scales.data();
    problem.group = transpose ? kAllTokens : group;
    problem.transpose = transpose;
    check(quantize_tokens(problem, StdThreads{}).ok(), "operands");
    const std::int64_t length = padded_tokens(s);
    view = transpose ? TensorView{values.data(), {b, h, d, length}, {h * d * length, d * length, length, 1}, dtype}
                     : TensorView{values.data(), {b, s, h, d}, {s * h * d, h * d, d, 1}, dtype};
  }

  double value(std::int64_t i) const {
    return view.dtype == DType::kInt8 ? static_cast<std::int8_t>(values[i]) : to_float(Float8E4M3{values[i]});
  }
  double token(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d, std::int64_t group) const {
    const std::int64_t heads = view.heads(),
                       of_head = static_cast<std::int64_t>(scales.size()) / (view.batch() * heads);
    return value(((b * view.seq() + s) * heads + h) * view.head_dim() + d) *
           scales[(b * heads + h) * of_head + group_of(s, group)];
  }
};

struct Problem {
  AttentionProblem plain{kShape, DType::kFloat32, {}};
  LowBits q, k, v;
  // What is past the keys is not looked at.
  std::vector<float> key_term = std::vector<float>(kShape.batch * kShape.heads * padded_tokens(kShape.seq_k), NAN);
  std::vector<float> v_mean = std::vector<float>(kShape.batch * kShape.kv_heads * kShape.head_dim);
  QuantizedAttention description;

  Problem(DType qk, DType pv, Window window = {})
      : q(plain.q, qk, 1, false),
        k(plain.k, qk, kKeyGroup, false),
        v(plain.v, pv == DType::kFloat32 ? DType::kInt8 : pv, 1, true) {
    for (std::int64_t i = 0; i < kShape.batch * kShape.heads * kShape.seq_k; ++i) {
      key_term[i / kShape.seq_k * padded_tokens(kShape.seq_k) + i % kShape.seq_k] =
          static_cast<float>(i * 7 % 13) / 13.f;
    }
    description.q = q.view;
    description.q_scales = q.scales.data();
    description.k = k.view;
    description.k_scales = k.scales.data();
    description.key_term = key_term.data();
    description.v = pv == DType::kFloat32 ? plain.v.view() : v.view;
    description.v_scales = pv == DType::kFloat32 ? nullptr : v.scales.data();
    for (std::size_t i = 0; i < v_mean.size(); ++i) {
      v_mean[i] = static_cast<float>(i * 5 % 11) / 11.f - 0.4f;
    }
    description.v_mean = pv == DType::kFloat32 ? nullptr : v_mean.data();
    description.out = plain.out.view();
    description.lse = plain.lse.data();
    description.scale = kScale;
    description.window = window;
  }

  double value(std::int64_t b, std::int64_t key, std::int64_t h, std::int64_t d) const {
    if (description.v_scales == nullptr) {
      return plain.v.get(b, key, h, d);
    }
    const std::int64_t row = (b * kShape.kv_heads + h) * kShape.head_dim + d, length = padded_tokens(kShape.seq_k);
    std::int64_t slot = key / 16 * 16;
    while (token_in_slot(slot) != key) {
      ++slot;
    }
    return v.value(row * length + slot) * v.scales[row];
  }

  // The formula of the design note in double, with weights rounded: those for int8 relative to their tile's greatest,
  // for e4m3 to the row's base.
  std::vector<double> expected() const {
    std::vector<double> out;
    const Band band = band_of(description);
    for (std::int64_t b = 0; b < kShape.batch; ++b) {
      for (std::int64_t i = 0; i < kShape.seq_q; ++i) {
        for (std::int64_t h = 0; h < kShape.heads; ++h) {
          const std::int64_t kv_head = h / (kShape.heads / kShape.kv_heads);
          std::vector<double> scores;
          for (std::int64_t j = 0; j < kShape.seq_k; ++j) {
            double dot = 0.;
            for (std::int64_t d = 0; d < kShape.head_dim; ++d) {
              dot += q.token(b, i, h, d, 1) * k.token(b, j, kv_head, d, kKeyGroup);
            }
            const bool kept = band.keeps(static_cast<int>(i), static_cast<int>(j));
            scores.push_back(kept ? kScale * dot + key_term[(b * kShape.heads + h) * padded_tokens(kShape.seq_k) + j]
                                  : -HUGE_VAL);
          }
          const double greatest = *std::ranges::max_element(scores);
          std::vector<double> row(kShape.head_dim, 0.);
          double sum = 0., base = -HUGE_VAL;
          for (std::int64_t first = 0; first < kShape.seq_k; first += 128) {
            const std::int64_t end = std::min(first + 128, kShape.seq_k);
            const double of_tile = *std::max_element(scores.begin() + first, scores.begin() + end);
            base = of_tile > base + std::log(4.) ? of_tile : base;
            const double origin = description.v.dtype == DType::kFloat8 ? base : of_tile;
            for (std::int64_t j = first; j < end && of_tile > -HUGE_VAL; ++j) {
              const double weight = std::exp(scores[j] - origin), factor = std::exp(origin - greatest);
              const double rounded = description.v.dtype == DType::kInt8 ? std::nearbyint(255. * weight) / 255.
                                     : description.v.dtype == DType::kFloat8
                                         ? to_float(from_float<Float8E4M3>(static_cast<float>(112. * weight))) / 112.
                                         : weight;
              sum += factor * weight;
              for (std::int64_t d = 0; d < kShape.head_dim; ++d) {
                row[d] += factor * rounded * value(b, j, kv_head, d);
              }
            }
          }
          for (std::int64_t d = 0; d < kShape.head_dim; ++d) {
            const double mean =
                description.v_mean == nullptr ? 0. : v_mean[(b * kShape.kv_heads + kv_head) * kShape.head_dim + d];
            out.push_back(sum > 0. ? row[d] / sum + mean : 0.);
          }
        }
      }
    }
    return out;
  }
};

const char* name_of(DType dtype) { return dtype == DType::kInt8 ? "int8" : dtype == DType::kFloat8 ? "fp8" : "fp32"; }

std::vector<double> run(Problem& p, const cpu::QuantizedAttentionKernels& kernels) {
  check(validate(p.description).ok(), validate(p.description).message);
  kernels.of_band(p.description, band_of(p.description), StdThreads{2});
  return p.plain.out.values();
}

const Test formula("quantized_attention: every pair of formats, with every instruction set", [] {
  for (const DType qk : {DType::kInt8, DType::kFloat8}) {
    for (const DType pv : {DType::kInt8, DType::kFloat8, DType::kFloat32}) {
      // One weight that falls on the other side of a tie moves a row by a 255th, or by a sixteenth, of its share.
      const double allowed = pv == DType::kInt8 ? 5e-4 : pv == DType::kFloat8 ? 3e-3 : 2e-6;
      for (const Window window : {Window{}, Window{60, 20}}) {
        Problem p(qk, pv, window);
        const std::vector<double> want = p.expected();
        const auto judge = [&](const char* isa, const std::vector<double>& got) {
          const double error = relative_error(got, want);
          check(error <= allowed, std::string(isa) + " " + name_of(qk) + " " + name_of(pv) + " is off by " +
                                      std::to_string(error * 1e6) + "e-6");
        };
        if (std::strcmp(cpu_instruction_set(), "none") != 0) {
          judge("avx2", run(p, cpu::kQuantizedAttentionAvx2));
        }
        if (std::strcmp(cpu_instruction_set(), "avx512") == 0) {
          judge("avx512", run(p, cpu::kQuantizedAttentionAvx512));
        }
      }
    }
  }
});

using Edit = void (*)(QuantizedAttention&);

void refuse(Edit edit, const char* message, DType pv = DType::kInt8) {
  Problem p(DType::kInt8, pv);
  edit(p.description);
  const std::string got = quantized_attention(p.description, StdThreads{}).message;
  check(got == std::string("quantized_attention: ") + message, "got '" + got + "'");
  check(std::isnan(p.plain.out.get(0, 0, 0, 0)), "nothing is written");
}

BlockLists some_blocks() {
  static constexpr std::int32_t kList[64] = {};
  BlockLists blocks{{70, 200, 200, 70, {64, 128}, {kList, kList, nullptr}, {}}, 1, 4};
  return blocks;
}

const Test refusals("quantized_attention: what it refuses", [] {
  refuse([](auto& p) { p.q.dtype = DType::kBFloat16; }, "q must be int8 or float8_e4m3fn, got bfloat16");
  refuse([](auto& p) { p.k.dtype = DType::kFloat8; }, "k must have the dtype of q, int8, got float8_e4m3fn");
  refuse([](auto& p) { p.q.data = nullptr; }, "q has no data");
  refuse([](auto& p) { p.k.stride[3] = 2; }, "k must be contiguous in its last dimension, got stride 2");
  refuse([](auto& p) { p.q.shape[3] = 4; }, "head_dim must be a multiple of 8 between 8 and 256, got 4");
  refuse([](auto& p) { p.k.shape[3] = 16; }, "k must have the head_dim of q, 24, got 16");
  refuse([](auto& p) { p.k.shape[0] = 1; }, "k must have the batch size of q, 2, got 1");
  refuse([](auto& p) { p.k.shape[2] = 3; }, "the heads of q must be a multiple of those of k, got 4 and 3");
  refuse([](auto& p) { p.scale = -1.f; }, "scale must be finite and positive, got -1");
  refuse([](auto& p) { p.window.left = -2; }, "window.left must be at least 0, or -1 for no bound, got -2");
  refuse([](auto& p) { p.v.shape[3] = 200; }, "v of 8 bits must be contiguous [2, 2, 24, 224], got [2, 2, 24, 200]");
  refuse([](auto& p) { p.v.stride[2] = 256; }, "v of 8 bits must be contiguous, got stride 256 at axis 2");
  refuse([](auto& p) { p.v.data = nullptr; }, "v has no data");
  refuse([](auto& p) { p.v.dtype = static_cast<DType>(9); },
         "v must be float32, float16 or bfloat16, got an unknown dtype");
  refuse([](auto& p) { p.v_scales = nullptr; }, "v_scales has no data");
  refuse([](auto& p) { p.q_scales = nullptr; }, "q_scales has no data");
  refuse([](auto& p) { p.k_scales = nullptr; }, "k_scales has no data");
  refuse([](auto& p) { p.v_scales = p.q_scales; }, "v_scales must be null for v of float32", DType::kFloat32);
  refuse([](auto& p) { p.v_mean = p.q_scales; }, "v_mean must be null for v of float32", DType::kFloat32);
  refuse([](auto& p) { p.v.shape[1] = 199; }, "v must have the shape of k, [2, 200, 2, 24], got [2, 199, 2, 24]",
         DType::kFloat32);
  refuse([](auto& p) { p.out.dtype = DType::kFloat16; }, "out must have the dtype of v, float32, got float16",
         DType::kFloat32);
  refuse([](auto& p) { p.out.dtype = DType::kInt8; }, "out must be float32, float16 or bfloat16, got int8");
  refuse([](auto& p) { p.out.shape[2] = 2; }, "out must have the shape of q, [2, 70, 4, 24], got [2, 70, 2, 24]");
  refuse([](auto& p) { p.blocks = some_blocks(), p.window.right = 0; },
         "window must be left out where blocks are given");
  refuse([](auto& p) { p.blocks = some_blocks(), p.blocks->first.num_k = 100; },
         "blocks must be of 70 queries and 200 keys, as q and k are, got 70 and 100");
  refuse([](auto& p) { p.blocks = some_blocks(), p.blocks->heads = 2; },
         "blocks must be of 1 or 2 batch entries and 1 or 4 heads, got 1 and 2");
  refuse(
      [](auto& p) {
        static constexpr std::int32_t kOrder[70] = {};
        p.order = {kOrder, 3, 1};
      },
      "order must be of 1 or 2 batch entries and 1 or 4 heads, got 3 and 1");
});

const Test alone("quantized_attention: without a log-sum-exp, and without keys", [] {
  Problem p(DType::kInt8, DType::kInt8), q(DType::kInt8, DType::kInt8);
  check(quantized_attention(p.description, StdThreads{}).ok(), "with one");
  q.description.lse = nullptr;
  check(quantized_attention(q.description, StdThreads{}).ok(), "without one");
  check(p.plain.out.values() == q.plain.out.values(), "the same output");
  for (TensorView* view : {&p.description.k, &p.description.v}) {
    view->shape[view == &p.description.k ? 1 : 3] = 0;
    view->data = nullptr;
  }
  p.description.k_scales = p.description.v_scales = nullptr;
  check(quantized_attention(p.description, StdThreads{}).ok(), "without keys");
  const std::vector<double> out = p.plain.out.values();
  check(std::ranges::all_of(out, [](double x) { return x == 0.; }), "zeros");
});

}  // namespace

// quantize_tokens from C++: one head by hand, and what is refused.
#include <cstdint>
#include <string>
#include <vector>

#include "check.hpp"
#include "fastattn/fastattn.hpp"

using namespace fastattn;

namespace {

constexpr std::int64_t kTokens = 2, kDim = 8;

struct Problem {
  std::vector<float> x{0, 1, -2, 3, -4, 5, -6, 7, 14, -14, 7, 6, 5, 4, 2, 0};
  std::vector<std::uint8_t> values = std::vector<std::uint8_t>(kDim * padded_tokens(kTokens), 0xff);
  std::vector<float> scales = std::vector<float>(kDim, -1.f), mean = std::vector<float>(kDim, -1.f);

  QuantizeTokens description() {
    QuantizeTokens problem;
    problem.x = {.data = x.data(),
                 .shape = {1, kTokens, 1, kDim},
                 .stride = {kTokens * kDim, kDim, kDim, 1},
                 .dtype = DType::kFloat32};
    problem.format = TokenFormat::kInt4;
    problem.values = values.data();
    problem.scales = scales.data();
    return problem;
  }
};

const Test rows("quantize_tokens: two tokens by hand", [] {
  Problem p;
  check(quantize_tokens(p.description(), StdThreads{}).ok(), "it runs");
  const std::vector<std::uint8_t> expected{0x10, 0x3e, 0x5c, 0x7a, 0x97, 0x34, 0x22, 0x01};
  check(std::vector(p.values.begin(), p.values.begin() + 8) == expected, "ties go to even, the first value is low");
  check(p.values[8] == 0xff, "nothing is written past the values");
  check(p.scales[0] == 1.f && p.scales[1] == 2.f && p.scales[2] == -1.f, "scales");
});

const Test columns("quantize_tokens: two tokens transposed and smoothed", [] {
  Problem p;
  QuantizeTokens problem = p.description();
  problem.format = TokenFormat::kInt8;
  problem.transpose = true;
  problem.group = kAllTokens;
  problem.mean = p.mean.data();
  check(quantize_tokens(problem, StdThreads{}).ok(), "it runs");
  for (int d = 0; d < kDim; ++d) {
    const float first = p.x[d], second = p.x[kDim + d];
    const std::uint8_t* const row = p.values.data() + d * 32;
    check(p.mean[d] == (first + second) / 2, "mean of channel " + std::to_string(d));
    check(row[0] == (first > second ? 127 : 0x81) && row[1] == (first > second ? 0x81 : 127), "the two are opposite");
    for (int token = kTokens; token < 32; ++token) {
      check(row[token] == 0, "padding is zeros");
    }
  }
});

void refuse(void (*edit)(QuantizeTokens&), const char* message) {
  Problem p;
  QuantizeTokens problem = p.description();
  edit(problem);
  const std::string got = quantize_tokens(problem, StdThreads{}).message;
  check(got == std::string("quantize_tokens: ") + message, "got '" + got + "'");
  check(p.values[0] == 0xff, "nothing is written");
}

const Test refusals("quantize_tokens: what is refused", [] {
  refuse([](auto& p) { p.x.dtype = static_cast<DType>(9); },
         "x must be float32, float16 or bfloat16, got an unknown dtype");
  refuse([](auto& p) { p.x.data = nullptr; }, "x has no data");
  refuse([](auto& p) { p.x.shape[3] = 4; }, "head_dim must be a multiple of 8 between 8 and 256, got 4");
  refuse([](auto& p) { p.x.shape[1] = std::int64_t{1} << 30; }, "x must be shorter than 2^30, got 1073741824");
  refuse([](auto& p) { p.format = static_cast<TokenFormat>(9); }, "format must be one of TokenFormat's, got 9");
  refuse([](auto& p) { p.group = 2; }, "group must be 1, 8, 16 or 32, got 2");
  refuse([](auto& p) { p.transpose = true; },
         "with transpose a scale is of all tokens and group must be left out, got 1");
  refuse(
      [](auto& p) {
        static constexpr std::int32_t kOrder[] = {0, 1};
        p.permutation = {kOrder, 1, 3};
      },
      "permutation must be of 1 or 1 batch entries and 1 or 1 heads, got 1 and 3");
  refuse([](auto& p) { p.values = nullptr; }, "values has no data");
  refuse([](auto& p) { p.scales = nullptr; }, "scales has no data");
  if (!built_with_cuda()) {
    Problem p;
    const std::string got = quantize_tokens(p.description(), Stream{}).message;
    check(got.find("without CUDA") != std::string::npos, "got '" + got + "'");
  }
});

}  // namespace

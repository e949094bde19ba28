// neighborhood_attention: the cases and the calls.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.hpp"

namespace bench {
namespace {

// "18x24x24" for the last three axes, "24" for the last one: a leading axis that is not named gets 1.
fastattn::PerAxis<int> per_axis(const std::string& text) {
  std::vector<int> values;
  std::istringstream stream(text);
  for (std::string value; std::getline(stream, value, 'x');) {
    values.push_back(std::stoi(value));
  }
  fastattn::PerAxis<int> axes(1, 1, 1);
  std::ranges::copy(values, axes.at + fastattn::kAxes - values.size());
  return axes;
}

// b1_30x48x80_h24[_kv8]_d128_w18x24x24[_s2x8x8][_dil1x2x2][_causal100]: window, stride, dilation, and the axes that are
// causal.
struct NeighborhoodCase final : Case {
  static constexpr const char* kForm = "b1_30x48x80_h24[_kv8]_d128_w18x24x24[_s2x8x8][_dil1x2x2][_causal100]";

  explicit NeighborhoodCase(const std::string& name)
      : NeighborhoodCase(CaseName(name, kForm, R"(\d+(?:x\d+){0,2})",
                                  R"(_w(\d+(?:x\d+){0,2})(?:_s(\d+(?:x\d+){0,2}))?)"
                                  R"((?:_dil(\d+(?:x\d+){0,2}))?(?:_causal([01]{1,3}))?)")) {}

  bool keeps(std::int64_t, std::int64_t, std::int64_t q, std::int64_t k) const override {
    for (int a = fastattn::kAxes - 1; a >= 0; --a) {
      const fastattn::NeighborhoodAxis& axis = axes[a];
      const int query = static_cast<int>(q % axis.length), key = static_cast<int>(k % axis.length);
      const bool one_group = query % axis.dilation == key % axis.dilation;
      if (!one_group || !span(axis, query).contains(key / axis.dilation)) {
        return false;
      }
      q /= axis.length;
      k /= axis.length;
    }
    return true;
  }

  double density() const override {
    double density = 1;
    for (const fastattn::NeighborhoodAxis& axis : axes.at) {
      double kept = 0;
      for (int query = 0; query < axis.length; ++query) {
        const fastattn::Interval keys = span(axis, query);
        kept += keys.end - keys.begin;
      }
      density *= kept / (static_cast<double>(axis.length) * axis.length);
    }
    return density;
  }

  fastattn::PerAxis<fastattn::NeighborhoodAxis> axes;

 private:
  explicit NeighborhoodCase(const CaseName& parts) : Case(parts, tokens_of(parts), tokens_of(parts)) {
    const auto lengths = per_axis(parts.tokens[0]), windows = per_axis(parts.mask[1]);
    const auto strides = per_axis(parts.mask[2]), dilations = per_axis(parts.mask[3]);
    const std::string causal = parts.mask[4];
    for (int a = 0; a < fastattn::kAxes; ++a) {
      axes[a] = {lengths[a], windows[a], strides[a], dilations[a], false};
    }
    for (std::size_t i = 0; i < causal.size(); ++i) {
      axes[fastattn::kAxes - static_cast<int>(causal.size() - i)].causal = causal[i] == '1';
    }
    const std::size_t count = count_of(parts.tokens[0]);
    for (const std::size_t other :
         {count_of(parts.mask[1]), count_of(parts.mask[2]), count_of(parts.mask[3]), causal.size()}) {
      if (other != 0 && other != count) {
        throw std::invalid_argument("case '" + name + "' names different numbers of axes");
      }
    }
  }

  static std::int64_t tokens_of(const CaseName& parts) { return fastattn::product(per_axis(parts.tokens[0])); }

  static std::size_t count_of(const std::string& text) {
    return text.empty() ? 0 : 1 + static_cast<std::size_t>(std::ranges::count(text, 'x'));
  }

  // The positions of its dilation group that a query sees.
  static fastattn::Interval span(const fastattn::NeighborhoodAxis& axis, int query) {
    const int length = (axis.length - query % axis.dilation + axis.dilation - 1) / axis.dilation;
    const fastattn::WindowRule rule{length, std::min(axis.window, length), axis.stride, axis.causal};
    return rule.keys_of(query / axis.dilation);
  }
};

class NeighborhoodAttentionProblem final : public Problem {
 public:
  NeighborhoodAttentionProblem(const Device& device, const NeighborhoodCase& shape, fastattn::DType dtype)
      : Problem(device, shape, dtype, Score::kSoftmax), axes_(shape.axes) {}

 private:
  fastattn::NeighborhoodAttention problem() const {
    return {.q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out_.view(),
            .lse = lse(),
            .scale = scale_,
            .axes = axes_,
            .workspace = forward_workspace()};
  }

  fastattn::NeighborhoodAttentionBackward backward_problem() const {
    return backward_of<fastattn::NeighborhoodAttentionBackward>(problem());
  }

  fastattn::Status run_forward() const override {
    return device_.run([&](const auto& executor) { return fastattn::neighborhood_attention(problem(), executor); });
  }
  fastattn::Status run_backward() const override {
    return device_.run(
        [&](const auto& executor) { return fastattn::neighborhood_attention_backward(backward_problem(), executor); });
  }
  std::size_t workspace_bytes() const override {
    return device_.run([&](const auto& executor) {
      return fastattn::neighborhood_attention_backward_workspace(backward_problem(), executor);
    });
  }

  const fastattn::PerAxis<fastattn::NeighborhoodAxis> axes_;
};

const AddOp<NeighborhoodCase, NeighborhoodAttentionProblem> kOp{
    "neighborhood_attention",
    {
        "b1_8x16x32_h8_d64_w4x8x8_s2x4x4",
        "b1_4096_h8_d64_w512_s64",
    },
    {
        "b1_30x48x80_h24_d128_w18x24x24_s2x8x8",
        "b1_30x48x80_h24_d128_w18x24x24",
        "b1_256x256_h24_d128_w80x80_s16x16",
        "b1_256x256_h24_d128_w80x80",
        "b1_32768_h24_d128_w2048_s256",
        "b1_32768_h24_d128_w2048",
        "b1_30x32x32_h24_d128_w30x32x32_causal100",
        "b1_30x32x32_h24_d128_w18x16x16_s2x8x8_causal100",
    },
    {
        "b1_5x9x13_h2_d64_w3x5x7_s1x2x3_causal100",
        "b1_19x23_h4_kv2_d64_w5x9_dil2x1",
        "b1_333_h2_d64_w100_s16",
        "b1_5x9x13_h2_d128_w3x5x7_s1x2x3_causal100",
        "b1_19x23_h4_kv2_d128_w5x9_dil2x1",
        "b1_333_h2_d128_w100_s16",
    },
};

}  // namespace
}  // namespace bench

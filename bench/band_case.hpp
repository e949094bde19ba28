// Cases of attention and sigmoid_attention: b1_s4096[x8192]_h8[_kv2]_d64[_causal|_window512]. A window is causal:
// window512 sees 512 keys to the left of the diagonal.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "case.hpp"
#include "fastattn/fastattn.hpp"

namespace bench {

struct BandCase : Case {
  static constexpr const char* kForm = "b1_s4096[x8192]_h8[_kv2]_d64[_causal|_window512]";

  static constexpr const char* kTokens = R"(s(\d+)(?:x(\d+))?)";

  explicit BandCase(const std::string& name) : BandCase(CaseName(name, kForm, kTokens, R"((_causal|_window(\d+))?)")) {}

  bool keeps(std::int64_t, std::int64_t, std::int64_t q, std::int64_t k) const override {
    const std::int64_t offset = k - (q + seq_k - seq_q);
    return (window.left < 0 || -window.left <= offset) && (window.right < 0 || offset <= window.right);
  }

  double density() const override {
    double kept = 0;
    for (std::int64_t q = 0; q < seq_q; ++q) {
      const std::int64_t diagonal = q + seq_k - seq_q;
      const std::int64_t begin = window.left < 0 ? 0 : std::max<std::int64_t>(diagonal - window.left, 0);
      const std::int64_t end = window.right < 0 ? seq_k : std::min(diagonal + window.right + 1, seq_k);
      kept += static_cast<double>(std::max<std::int64_t>(end - begin, 0));
    }
    return kept / static_cast<double>(seq_q * seq_k);
  }

  fastattn::Window window;

 protected:
  explicit BandCase(const CaseName& parts)
      : Case(parts, number(parts.tokens[1]), number(parts.tokens[2], number(parts.tokens[1]))),
        window{.left = number(parts.mask[2], fastattn::kUnbounded),
               .right = parts.mask[1].matched ? 0 : fastattn::kUnbounded} {}
};

}  // namespace bench

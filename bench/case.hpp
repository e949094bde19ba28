// A benchmark case is its name: b<batch>_s<seq_q>[x<seq_k>]_h<heads>[_kv<kv_heads>]_d<head_dim>[_causal|_window<left>].
// For example b4_s4096_h16_d128_causal, or b2_s8192_h32_kv8_d128_window1024 (causal, with 1024 keys to the left).
#pragma once

#include <algorithm>
#include <cstdint>
#include <regex>
#include <stdexcept>
#include <string>

#include "fastattn/fastattn.hpp"

namespace bench {

struct Case {
  std::string name;
  std::int64_t batch, seq_q, seq_k, heads, kv_heads, head_dim;
  fastattn::Window window;

  bool keeps(std::int64_t q, std::int64_t k) const {
    const std::int64_t offset = k - (q + seq_k - seq_q);
    return (window.left < 0 || -window.left <= offset) && (window.right < 0 || offset <= window.right);
  }

  // The kept share of scores.
  double density() const {
    double kept = 0;
    for (std::int64_t q = 0; q < seq_q; ++q) {
      const std::int64_t diagonal = q + seq_k - seq_q;
      const std::int64_t begin = window.left < 0 ? 0 : std::max<std::int64_t>(diagonal - window.left, 0);
      const std::int64_t end = window.right < 0 ? seq_k : std::min(diagonal + window.right + 1, seq_k);
      kept += static_cast<double>(std::max<std::int64_t>(end - begin, 0));
    }
    return kept / static_cast<double>(seq_q * seq_k);
  }

  // Two matrix products forward; five, two and a half times that, backward.
  double flops(bool backward) const {
    const double forward = 4. * static_cast<double>(batch * heads * head_dim) * static_cast<double>(seq_q * seq_k);
    return forward * density() * (backward ? 2.5 : 1.);
  }
};

inline Case parse_case(const std::string& name) {
  static const std::regex grammar(R"(b(\d+)_s(\d+)(?:x(\d+))?_h(\d+)(?:_kv(\d+))?_d(\d+)(_causal|_window(\d+))?)");
  std::smatch match;
  if (!std::regex_match(name, match, grammar)) {
    throw std::invalid_argument("case '" + name +
                                "' is not of the form b1_s4096[x8192]_h8[_kv2]_d64[_causal|_window512]");
  }
  const auto number = [&match](std::size_t group, std::int64_t otherwise) {
    return match[group].matched ? std::stoll(match[group]) : otherwise;
  };
  const std::int64_t seq_q = number(2, 0), heads = number(4, 0);
  const bool causal = match[7].matched;
  return {.name = name,
          .batch = number(1, 0),
          .seq_q = seq_q,
          .seq_k = number(3, seq_q),
          .heads = heads,
          .kv_heads = number(5, heads),
          .head_dim = number(6, 0),
          .window = {.left = number(8, fastattn::kUnbounded), .right = causal ? 0 : fastattn::kUnbounded}};
}

}  // namespace bench

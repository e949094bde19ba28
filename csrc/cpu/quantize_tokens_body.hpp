// The body of quantize_tokens_<instruction set>.cpp.
#pragma once

#include "fastattn/cpu/quantize_tokens.hpp"
#include "kernels.hpp"

namespace fastattn::cpu {

template <class Isa, class Element>
void quantize_tokens(const QuantizeTokens& p, const Threads& threads) {
  switch (p.format) {
    case TokenFormat::kInt8:
      return quantize_tokens<Isa, Element, Int8>(p, threads);
    case TokenFormat::kInt4:
      return quantize_tokens<Isa, Element, Int4>(p, threads);
    case TokenFormat::kInt4InByte:
      return quantize_tokens<Isa, Element, Int4InByte>(p, threads);
    case TokenFormat::kFloat8:
      return quantize_tokens<Isa, Element, Float8E4M3>(p, threads);
  }
}

template <class Isa>
constexpr QuantizeTokensKernels quantize_tokens_kernels() {
  return {[](const QuantizeTokens& p, const Threads& threads) {
    with_element(p.x.dtype, [&]<class Element>() { quantize_tokens<Isa, Element>(p, threads); });
  }};
}

}  // namespace fastattn::cpu

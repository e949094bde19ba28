// quantized_attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include <algorithm>
#include <cstdint>

#include "cpu/kernels.hpp"
#include "fastattn/cpu/parallel.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {
namespace {

// What an order may leave unwritten.
void clear_result(const QuantizedAttention& p, const Threads& threads) {
  const std::int64_t seq = p.out.seq(), heads = p.out.heads();
  const auto clear_head = [&](std::int64_t head, auto zero) {
    for (std::int64_t token = 0; token < seq; ++token) {
      std::fill_n(p.out.row<decltype(zero)>(head / heads, token, head % heads), p.out.head_dim(), zero);
    }
  };
  cpu::parallel_for(threads, p.out.batch() * heads, [&](std::int64_t head) {
    size_of(p.out.dtype) == 4 ? clear_head(head, 0.f) : clear_head(head, std::uint16_t{0});
    if (p.lse != nullptr) {
      std::fill_n(p.lse + head * seq, seq, 0.f);
    }
  });
}

}  // namespace

std::size_t quantized_attention_workspace(const QuantizedAttention&, const Threads&) { return 0; }

Status quantized_attention(const QuantizedAttention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  const auto* kernels = cpu::best_of(cpu::kQuantizedAttentionAvx2, cpu::kQuantizedAttentionAvx512);
  if (kernels == nullptr) {
    return no_cpu_kernels("quantized_attention");
  }
  if (problem.order.order != nullptr) {
    clear_result(problem, threads);
  }
  if (problem.blocks) {
    kernels->of_blocks(problem, *problem.blocks, threads);
  } else {
    kernels->of_band(problem, band_of(problem), threads);
  }
  return {};
}

#if !FASTATTN_WITH_CUDA

std::size_t quantized_attention_workspace(const QuantizedAttention&, Stream) { return 0; }

Status quantized_attention(const QuantizedAttention&, Stream) { return built_without_cuda("quantized_attention"); }

#endif

}  // namespace fastattn

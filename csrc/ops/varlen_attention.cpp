// varlen_attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

constexpr const char* kOp = "varlen_attention";

// What a GPU cuts off, because nobody but its kernels can read it.
Status check_lengths(const char* side, const std::int32_t* cu_seqlens, const std::int32_t* seqused, std::int64_t count,
                     std::int64_t tokens) {
  if (cu_seqlens[0] != 0) {
    return failure("%s: cu_seqlens_%s must begin with 0, got %d", kOp, side, cu_seqlens[0]);
  }
  for (std::int64_t s = 0; s < count; ++s) {
    const int length = cu_seqlens[s + 1] - cu_seqlens[s];
    if (length < 0) {
      return failure("%s: cu_seqlens_%s must not descend, got %d after %d", kOp, side, cu_seqlens[s + 1],
                     cu_seqlens[s]);
    }
    if (seqused != nullptr && (seqused[s] < 0 || seqused[s] > length)) {
      return failure("%s: seqused_%s must be between 0 and the length of the sequence, %d, got %d", kOp, side, length,
                     seqused[s]);
    }
  }
  if (cu_seqlens[count] > tokens) {
    return failure("%s: cu_seqlens_%s must not end after the last token, %lld, got %d", kOp, side,
                   static_cast<long long>(tokens), cu_seqlens[count]);
  }
  return {};
}

}  // namespace

Status varlen_attention(const VarlenAttention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  const auto& [attention, sequences] = problem;
  for (const bool of_queries : {true, false}) {
    const Status status =
        of_queries
            ? check_lengths("q", sequences.cu_seqlens_q, sequences.seqused_q, sequences.count, attention.q.seq())
            : check_lengths("k", sequences.cu_seqlens_k, sequences.seqused_k, sequences.count, attention.k.seq());
    if (!status.ok()) {
      return status;
    }
  }
  if (num_rows(attention) == 0) {
    return {};
  }
  const auto* kernels = cpu::best_of(cpu::kVarlenAttentionAvx2, cpu::kVarlenAttentionAvx512);
  if (kernels == nullptr) {
    return no_cpu_kernels(kOp);
  }
  kernels->forward(problem, bands_of(problem), threads);
  return {};
}

std::size_t varlen_attention_backward_workspace(const VarlenAttentionBackward&, const Threads&) { return 0; }

Status varlen_attention_backward(const VarlenAttentionBackward& problem, const Threads&) {
  const Status status = validate(problem);
  return status.ok() ? failure("varlen_attention_backward: gradients are not available on a CPU yet") : status;
}

#if !FASTATTN_WITH_CUDA

Status varlen_attention(const VarlenAttention&, Stream) { return built_without_cuda(kOp); }

std::size_t varlen_attention_backward_workspace(const VarlenAttentionBackward&, Stream) { return 0; }

Status varlen_attention_backward(const VarlenAttentionBackward&, Stream) {
  return built_without_cuda("varlen_attention_backward");
}

#endif

}  // namespace fastattn

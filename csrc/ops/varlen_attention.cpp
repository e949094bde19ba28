// varlen_attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

constexpr const char* kOp = "varlen_attention";
constexpr const char* kBackward = "varlen_attention_backward";

const cpu::VarlenAttentionKernels* kernels() {
  return cpu::best_of(cpu::kVarlenAttentionAvx2, cpu::kVarlenAttentionAvx512);
}

// What a GPU cuts off, because nobody but its kernels can read it.
Status check_lengths(const char* op, const char* side, const std::int32_t* cu_seqlens, const std::int32_t* seqused,
                     std::int64_t count, std::int64_t tokens) {
  if (cu_seqlens[0] != 0) {
    return failure("%s: cu_seqlens_%s must begin with 0, got %d", op, side, cu_seqlens[0]);
  }
  for (std::int64_t s = 0; s < count; ++s) {
    const int length = cu_seqlens[s + 1] - cu_seqlens[s];
    if (length < 0) {
      return failure("%s: cu_seqlens_%s must not descend, got %d after %d", op, side, cu_seqlens[s + 1], cu_seqlens[s]);
    }
    if (seqused != nullptr && (seqused[s] < 0 || seqused[s] > length)) {
      return failure("%s: seqused_%s must be between 0 and the length of the sequence, %d, got %d", op, side, length,
                     seqused[s]);
    }
  }
  if (cu_seqlens[count] > tokens) {
    return failure("%s: cu_seqlens_%s must not end after the last token, %lld, got %d", op, side,
                   static_cast<long long>(tokens), cu_seqlens[count]);
  }
  return {};
}

Status check_lengths(const char* op, const VarlenAttention& problem) {
  const auto& [attention, sequences] = problem;
  const Status status =
      check_lengths(op, "q", sequences.cu_seqlens_q, sequences.seqused_q, sequences.count, attention.q.seq());
  return status.ok()
             ? check_lengths(op, "k", sequences.cu_seqlens_k, sequences.seqused_k, sequences.count, attention.k.seq())
             : status;
}

}  // namespace

Status varlen_attention(const VarlenAttention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  if (Status status = check_lengths(kOp, problem); !status.ok() || num_rows(problem.attention) == 0) {
    return status;
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels(kOp);
  }
  kernels()->forward(problem, bands_of(problem), threads);
  return {};
}

// The log-sum-exp in base 2 and delta of every row.
std::size_t varlen_attention_backward_workspace(const VarlenAttentionBackward& problem, const Threads&) {
  return 2 * sizeof(float) * static_cast<std::size_t>(num_rows(forward_of(problem)));
}

Status varlen_attention_backward(const VarlenAttentionBackward& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  if (Status status = check_lengths(kBackward, problem.forward); !status.ok()) {
    return status;
  }
  if (num_rows(forward_of(problem)) > 0 && problem.workspace == nullptr) {
    return failure("%s: workspace has no data", kBackward);
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels(kBackward);
  }
  kernels()->backward(problem, bands_of(problem.forward), threads);
  return {};
}

#if !FASTATTN_WITH_CUDA

Status varlen_attention(const VarlenAttention&, Stream) { return built_without_cuda(kOp); }

std::size_t varlen_attention_backward_workspace(const VarlenAttentionBackward&, Stream) { return 0; }

Status varlen_attention_backward(const VarlenAttentionBackward&, Stream) { return built_without_cuda(kBackward); }

#endif

}  // namespace fastattn

// What every backend checks before it touches memory: the one place where the ops' arguments are judged.
#pragma once

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/schedule/sequences.hpp"

namespace fastattn {

inline constexpr std::int64_t kHeadDimStep = 8, kMaxHeadDim = 256;
inline constexpr std::int64_t kMaxSeq = (std::int64_t{1} << 30) - 1;  // tile arithmetic is 32-bit

// A failed Status with a printf-style message.
[[gnu::format(printf, 1, 2)]] Status failure(const char* format, ...);

// What an op says where there is nothing that could run it.
Status no_cpu_kernels(const char* op);
Status built_without_cuda(const char* op);

// Success means that every element the op reads or writes is described without contradiction. A problem without
// queries is valid (there is nothing to do), and so is one without keys (every row keeps nothing).
Status validate(const Attention& problem);
Status validate(const AttentionBackward& problem);
Status validate(const VarlenAttention& problem);
Status validate(const VarlenAttentionBackward& problem);
Status validate(const BlockSparseAttention& problem);
Status validate(const BlockSparseAttentionBackward& problem);
Status validate(const NeighborhoodAttention& problem);
Status validate(const NeighborhoodAttentionBackward& problem);
Status validate(const SigmoidAttention& problem);
Status validate(const SigmoidAttentionBackward& problem);
Status validate(const QuantizedAttention& problem);
Status validate(const QuantizeTokens& problem);
Status validate(const EstimateBlocks& problem);

// Rows of results; zero means that the forward has nothing to write.
template <class Problem>
std::int64_t num_rows(const Problem& problem) {
  return problem.q.batch() * problem.q.heads() * problem.q.seq();
}

// What a backward differentiates, as an attention.
template <class Backward>
const auto& forward_of(const Backward& problem) {
  return problem.forward;
}
inline const Attention& forward_of(const VarlenAttentionBackward& problem) { return problem.forward.attention; }

// The mask of a valid problem. An unbounded side is as wide as it can matter, which keeps sums within 32 bits.
template <class Problem>
Band band_of(const Problem& problem) {
  const auto side = [](std::int64_t width, std::int64_t widest) {
    return static_cast<int>(width == kUnbounded ? widest : min_of(width, widest));
  };
  const std::int64_t num_q = problem.q.seq(), num_k = problem.k.seq();
  return {static_cast<int>(num_q), static_cast<int>(num_k), side(problem.window.left, num_k),
          side(problem.window.right, num_q)};
}

inline Bands bands_of(const Attention& problem) { return {band_of(problem), problem.head_left, problem.head_right}; }

inline SequenceBands bands_of(const VarlenAttention& problem) {
  const Attention& attention = problem.attention;
  const Sequences& sequences = problem.sequences;
  Bands bands = bands_of(attention);  // whose sides are bounded by all tokens, hence wide enough for each sequence
  const int tokens_q = bands.of_all.num_q, tokens_k = bands.of_all.num_k;
  bands.of_all.num_q = static_cast<int>(min_of<std::int64_t>(sequences.max_seqlen_q, tokens_q));
  bands.of_all.num_k = static_cast<int>(min_of<std::int64_t>(sequences.max_seqlen_k, tokens_k));
  return {bands,
          static_cast<int>(sequences.count),
          tokens_q,
          tokens_k,
          sequences.cu_seqlens_q,
          sequences.cu_seqlens_k,
          sequences.seqused_q,
          sequences.seqused_k};
}

// `survey`: survey_bytes(…) for the segments of the problem, if it has any.
inline Regions regions_of(const Attention& problem, void* survey) {
  const Bands bands = bands_of(problem);
  const auto& [num_q, num_k, left, right] = bands.of_all;
  return {bands, problem.rectangles, problem.segments, survey_in(survey, problem.segments, num_q, num_k)};
}

inline std::size_t survey_bytes(const Attention& problem) {
  return survey_bytes(problem.segments, problem.q.seq(), problem.k.seq());
}

}  // namespace fastattn

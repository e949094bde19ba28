// fastattn's C++ interface: one struct that describes a problem and one function that runs it, for each op.
//
// Nothing here allocates device memory, throws, or prints. A problem that cannot be run comes back as a Status whose
// message names the argument, what came and what is allowed; nothing has been launched or written then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "fastattn/operand/low_bit.hpp"
#include "fastattn/schedule/block_list.hpp"
#include "fastattn/schedule/neighborhood.hpp"
#include "fastattn/schedule/regions.hpp"
#include "fastattn/score/modifier.hpp"
#include "fastattn/tensor_view.hpp"

namespace fastattn {

struct Status {
  char message[256] = {};  // empty: success
  bool ok() const { return message[0] == '\0'; }
};

// Where an op runs.

// Host threads, supplied by the caller: run task(context, i) for every i in [0, count), in any order and in parallel,
// and return when all are done.
class Threads {
 public:
  using Task = void (*)(void* context, std::int64_t i);
  virtual void run(std::int64_t count, Task task, void* context) const = 0;

 protected:
  ~Threads() = default;
};

// std::thread workers for programs that bring no pool of their own. `count` 0 means one per core.
class StdThreads final : public Threads {
 public:
  explicit StdThreads(int count = 0);
  void run(std::int64_t count, Task task, void* context) const override;

 private:
  int count_;
};

// A CUDA stream (cudaStream_t) of the current device. Work is enqueued; nothing waits for it.
struct Stream {
  void* handle = nullptr;
};

// The instruction set the CPU kernels use: "avx512", "avx2" or, where neither exists, an error from every CPU op.
const char* cpu_instruction_set();

// Is this library built with GPU kernels?
bool built_with_cuda();

// Bytes of device memory that a forward on the GPU counts in: what its thread blocks have taken of its tiles. A call's
// own, with any contents; not needed on the CPU.
inline constexpr std::size_t kForwardWorkspace = 4;

// attention: softmax(scale · Q Kᵀ, masked) V.

inline constexpr std::int64_t kUnbounded = -1;

// Query i keeps key j when −left ≤ j − (i + seq_k − seq_q) ≤ right. Causal is right = 0.
struct Window {
  std::int64_t left = kUnbounded, right = kUnbounded;
};

struct Attention {
  TensorView q;          // [batch, seq_q, heads, head_dim]
  TensorView k;          // [batch, seq_k, kv_heads, head_dim]; heads is a multiple of kv_heads
  TensorView v;          // [batch, seq_k, kv_heads, value_dim]
  TensorView out;        // [batch, seq_q, heads, value_dim]
  float* lse = nullptr;  // [batch, heads, seq_q], contiguous: natural log-sum-exp of each row's scores
  float scale = 1.f;
  Window window;
  // [heads], in memory of the device: sides of each head's own, of which and the window's the narrower ones count;
  // below 0 unbounded. Null: the window's.
  const std::int32_t *head_left = nullptr, *head_right = nullptr;
  float softcap = 0.f;           // scaled scores become softcap · tanh(score / softcap); 0: they stay
  KeyBias key_bias = {};         // then these are added
  const float* sinks = nullptr;  // [heads], in memory of the device: a logit in each row's sum; null: none
  // Scores that are seen in addition to the window's, and segments of tokens, outside of which none is. Without a
  // softcap or a key_bias.
  Rectangles rectangles = {};
  Segments segments = {};
  void* workspace = nullptr;  // attention_workspace(…) bytes, 256-byte aligned

  FASTATTN_HD ScoreModifier modifier() const { return {scale, softcap, key_bias}; }
  bool has_regions() const { return rectangles.count > 0 || segments.exist(); }
};

std::size_t attention_workspace(const Attention& problem, const Threads& threads);
std::size_t attention_workspace(const Attention& problem, Stream stream);
Status attention(const Attention& problem, const Threads& threads);
Status attention(const Attention& problem, Stream stream);

// Gradients of `attention`: from those of `out` and `lse` to those of q, k, v and key_bias. What every backward of an
// op takes: a gradient without data is not wanted, nor computed where that saves anything.
struct AttentionBackward {
  Attention forward;            // the problem, with the `out` and `lse` that it produced
  TensorView dout;              // like out
  const float* dlse = nullptr;  // like lse; null means zero
  TensorView dq, dk, dv;        // like q, k, v; memory of their own, which may hold something else meanwhile
  float* dkey_bias = nullptr;   // [batch, heads, seq_k], contiguous: of each key's bias for each head; null: not wanted
  bool deterministic = false;   // the same bits every time; always so on a CPU
  void* workspace = nullptr;    // attention_backward_workspace(…) bytes, 256-byte aligned; on the CPU or on the device
};

std::size_t attention_backward_workspace(const AttentionBackward& problem, const Threads& threads);
std::size_t attention_backward_workspace(const AttentionBackward& problem, Stream stream);
Status attention_backward(const AttentionBackward& problem, const Threads& threads);
Status attention_backward(const AttentionBackward& problem, Stream stream);

// varlen_attention: `attention` over sequences of many lengths, one after the other in the same tensors.

// Sequence s has the tokens from cu_seqlens[s] to cu_seqlens[s + 1] of a tensor, the first 0, ascending and no more
// than there are. All arrays lie in memory of the device. What contradicts that is refused on a CPU and cut off on a
// GPU.
struct Sequences {
  std::int64_t count = 0;
  const std::int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // [count + 1]
  // [count]: how many of a sequence's tokens are used, from its first on; null: all. Unused keys are not seen, unused
  // queries, and those after the last sequence, see nothing.
  const std::int32_t *seqused_q = nullptr, *seqused_k = nullptr;
  std::int64_t max_seqlen_q = 0, max_seqlen_k = 0;  // about how long the longest are, for the choice of tiles alone
};

struct VarlenAttention {
  Attention attention;  // of one batch entry, without a key bias; its window is in each sequence
  Sequences sequences;
};

Status varlen_attention(const VarlenAttention& problem, const Threads& threads);
Status varlen_attention(const VarlenAttention& problem, Stream stream);

// Gradients of `varlen_attention`; those of tokens that see nothing, or that nothing sees, are 0.
struct VarlenAttentionBackward {
  VarlenAttention forward;      // the problem, with the `out` and `lse` that it produced
  TensorView dout;              // like out
  const float* dlse = nullptr;  // like lse; null means zero
  TensorView dq, dk, dv;        // like q, k, v; one without data is not wanted
  bool deterministic = false;   // the same bits every time; always so on a CPU
  void* workspace = nullptr;    // varlen_attention_backward_workspace(…) bytes, 256-byte aligned
};

std::size_t varlen_attention_backward_workspace(const VarlenAttentionBackward& problem, const Threads& threads);
std::size_t varlen_attention_backward_workspace(const VarlenAttentionBackward& problem, Stream stream);
Status varlen_attention_backward(const VarlenAttentionBackward& problem, const Threads& threads);
Status varlen_attention_backward(const VarlenAttentionBackward& problem, Stream stream);

// block_sparse_attention: `attention` on the blocks of scores that a list names for every head.

struct BlockSparseAttention {
  TensorView q;          // [batch, seq_q, heads, head_dim]
  TensorView k, v;       // [batch, seq_k, kv_heads, head_dim]; heads is a multiple of kv_heads
  TensorView out;        // like q
  float* lse = nullptr;  // [batch, heads, seq_q], contiguous; −∞ for a row that keeps nothing
  float scale = 1.f;
  BlockLists blocks;          // of query heads, in memory of the device; the backward needs `columns` as well
  void* workspace = nullptr;  // kForwardWorkspace bytes
};

Status block_sparse_attention(const BlockSparseAttention& problem, const Threads& threads);
Status block_sparse_attention(const BlockSparseAttention& problem, Stream stream);

struct BlockSparseAttentionBackward {
  BlockSparseAttention forward;  // the problem, with the `out` and `lse` that it produced
  TensorView dout;               // like out
  const float* dlse = nullptr;   // like lse; null means zero
  TensorView dq, dk, dv;         // like q, k, v; one without data is not wanted
  bool deterministic = false;    // the same bits every time; always so on a CPU
  void* workspace = nullptr;     // block_sparse_attention_backward_workspace(…) bytes, 256-byte aligned
};

std::size_t block_sparse_attention_backward_workspace(const BlockSparseAttentionBackward& problem,
                                                      const Threads& threads);
std::size_t block_sparse_attention_backward_workspace(const BlockSparseAttentionBackward& problem, Stream stream);
Status block_sparse_attention_backward(const BlockSparseAttentionBackward& problem, const Threads& threads);
Status block_sparse_attention_backward(const BlockSparseAttentionBackward& problem, Stream stream);

// neighborhood_attention: `attention` in which a query sees a box of keys around itself, in one, two or three
// dimensions.

struct NeighborhoodAttention {
  TensorView q;          // [batch, tokens, heads, head_dim]; the tokens row-major over the axes
  TensorView k, v;       // [batch, tokens, kv_heads, head_dim]; heads is a multiple of kv_heads
  TensorView out;        // like q
  float* lse = nullptr;  // [batch, heads, tokens], contiguous
  float scale = 1.f;
  PerAxis<NeighborhoodAxis> axes;  // outermost first; fewer than three lead with axes of length 1
  void* workspace = nullptr;       // kForwardWorkspace bytes
};

Status neighborhood_attention(const NeighborhoodAttention& problem, const Threads& threads);
Status neighborhood_attention(const NeighborhoodAttention& problem, Stream stream);

struct NeighborhoodAttentionBackward {
  NeighborhoodAttention forward;  // the problem, with the `out` and `lse` that it produced
  TensorView dout;                // like out
  const float* dlse = nullptr;    // like lse; null means zero
  TensorView dq, dk, dv;          // like q, k, v; one without data is not wanted
  bool deterministic = false;     // the same bits every time; always so on a CPU
  void* workspace = nullptr;      // neighborhood_attention_backward_workspace(…) bytes, 256-byte aligned
};

std::size_t neighborhood_attention_backward_workspace(const NeighborhoodAttentionBackward& problem,
                                                      const Threads& threads);
std::size_t neighborhood_attention_backward_workspace(const NeighborhoodAttentionBackward& problem, Stream stream);
Status neighborhood_attention_backward(const NeighborhoodAttentionBackward& problem, const Threads& threads);
Status neighborhood_attention_backward(const NeighborhoodAttentionBackward& problem, Stream stream);

// sigmoid_attention: σ(scale · Q Kᵀ + bias) V, each weight by itself; masked scores weigh 0.

struct SigmoidAttention {
  TensorView q;     // [batch, seq_q, heads, head_dim]
  TensorView k, v;  // [batch, seq_k, kv_heads, head_dim]; heads is a multiple of kv_heads
  TensorView out;   // like q; not needed by the backward
  float scale = 1.f;
  Window window;
  float bias = 0.f;                  // −ln(seq_k) is the usual choice
  const float* head_bias = nullptr;  // [heads], added to the bias; may be null
  void* workspace = nullptr;         // kForwardWorkspace bytes
};

Status sigmoid_attention(const SigmoidAttention& problem, const Threads& threads);
Status sigmoid_attention(const SigmoidAttention& problem, Stream stream);

// Gradients of `sigmoid_attention`. It needs neither the output nor anything else of the forward.
struct SigmoidAttentionBackward {
  SigmoidAttention forward;
  TensorView dout;             // like out
  TensorView dq, dk, dv;       // like q, k, v; one without data is not wanted
  float* dbias = nullptr;      // [heads]: of each head's bias; null if it is not wanted
  bool deterministic = false;  // the same bits every time; always so on a CPU
  void* workspace = nullptr;   // sigmoid_attention_backward_workspace(…) bytes, 256-byte aligned
};

std::size_t sigmoid_attention_backward_workspace(const SigmoidAttentionBackward& problem, const Threads& threads);
std::size_t sigmoid_attention_backward_workspace(const SigmoidAttentionBackward& problem, Stream stream);
Status sigmoid_attention_backward(const SigmoidAttentionBackward& problem, const Threads& threads);
Status sigmoid_attention_backward(const SigmoidAttentionBackward& problem, Stream stream);

// quantize_tokens: tokens in 8 or 4 bits with float scales, x ≈ scale · value (+ mean). On the GPU memory is 16-byte
// aligned and the strides of x are multiples of 8 elements.

// Tokens that share a scale: each by itself, or every fourth pair of tokens in 32, 64 or 128 (see `group_of`).
inline constexpr std::int64_t kTokenGroups[] = {1, 8, 16, 32};
inline constexpr std::int64_t kAllTokens = 0;  // the group of transposed tokens

// The group that a token is in: in each run of 4 · group tokens four groups take turns at pairs of tokens, as the four
// threads of a quad do at the columns of a WGMMA accumulator.
FASTATTN_HD constexpr std::int64_t group_of(std::int64_t token, std::int64_t group) {
  return group == 1 ? token : token / (4 * group) * 4 + token % 8 / 2;
}
constexpr std::int64_t num_groups(std::int64_t tokens, std::int64_t group) {
  return group == 1 ? tokens : ceil_div(tokens, 4 * group) * 4;
}

// The length of a row of transposed tokens: whole steps of WGMMA's contraction, and whole units of TMA at 4 bits too.
// Also that of a row of key terms.
constexpr std::int64_t padded_tokens(std::int64_t tokens) { return ceil_div(tokens, std::int64_t{32}) * 32; }

// The token in a slot of such a row. A thread holds weights of tokens 2 g, 2 g + 1, 2 g + 8 and 2 g + 9 of sixteen in a
// WGMMA accumulator, where g is its place in a quad; as an operand of 8 bits the next product takes them to be its
// slots 4 g … 4 g + 3. In this order of the values they are what it takes them for.
FASTATTN_HD constexpr int token_in_slot(int slot) {
  return slot / 16 * 16 + slot % 4 / 2 * 8 + slot % 16 / 4 * 2 + slot % 2;
}

// An order of tokens: token i of the new one is token order[i]. [batch or 1, heads or 1, tokens]
struct Permutation {
  const std::int32_t* order = nullptr;  // null: as they are
  std::int64_t batch = 1, heads = 1;

  // Which one is that of head (b, h).
  FASTATTN_HD std::int64_t index(std::int64_t b, std::int64_t h) const {
    return (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
  }
  // Its entries; null: as they are.
  FASTATTN_HD const std::int32_t* row(std::int64_t b, std::int64_t h, std::int64_t tokens) const {
    return order == nullptr ? nullptr : order + index(b, h) * tokens;
  }
};

// The token that goes to a place of a head whose order is `row` of a permutation; −1: none.
FASTATTN_HD int token_at(const std::int32_t* row, int place, int tokens) {
  if (place >= tokens) {
    return -1;
  }
  const int token = row == nullptr ? place : row[place];
  return token < tokens ? max_of(token, -1) : -1;
}

struct QuantizeTokens {
  TensorView x;  // [batch, tokens, heads, head_dim]
  TokenFormat format = TokenFormat::kInt8;
  void* values = nullptr;   // [batch, tokens, heads, head_dim], contiguous; two in a byte for kInt4, the first one low
  float* scales = nullptr;  // [batch, heads, num_groups(tokens, group)]
  float* mean = nullptr;    // [batch, heads, head_dim]: of the tokens, subtracted from them; null: it is not
  std::int64_t group = 1;   // one of kTokenGroups
  // Values [batch, heads, head_dim, padded_tokens(tokens)], in the order of token_in_slot(), scales like mean, group
  // kAllTokens.
  bool transpose = false;
  Permutation permutation;    // an entry that names no token gives zeros
  void* workspace = nullptr;  // quantize_tokens_workspace(…) bytes
};

std::size_t quantize_tokens_workspace(const QuantizeTokens& problem, const Threads& threads);
std::size_t quantize_tokens_workspace(const QuantizeTokens& problem, Stream stream);
Status quantize_tokens(const QuantizeTokens& problem, const Threads& threads);
Status quantize_tokens(const QuantizeTokens& problem, Stream stream);

// quantized_attention: `attention`, or `block_sparse_attention`, on queries and keys of 8 bits and values of 8 or 16.

inline constexpr std::int64_t kKeyGroup = 32;  // keys that share a scale: a thread needs one for a tile of 128 keys

struct QuantizedAttention {
  // As quantize_tokens leaves them, of kInt8 or kFloat8: q with group 1, k with group kKeyGroup.
  TensorView q;                     // [batch, seq_q, heads, head_dim]
  TensorView k;                     // [batch, seq_k, kv_heads, head_dim]; heads is a multiple of kv_heads
  const float* q_scales = nullptr;  // [batch, heads, seq_q]
  const float* k_scales = nullptr;  // [batch, kv_heads, num_groups(seq_k, kKeyGroup)]
  // [batch, heads, padded_tokens(seq_k)], added to the scaled scores of a key; what is past seq_k is not looked at. May
  // be null.
  const float* key_term = nullptr;
  // Transposed, of kInt8 or kFloat8: contiguous [batch, kv_heads, head_dim, padded_tokens(seq_k)]. Or as they are, like
  // k, of any other dtype.
  TensorView v;
  const float* v_scales = nullptr;  // [batch, kv_heads, head_dim]; null for values as they are
  const float* v_mean = nullptr;    // like v_scales: what was taken from transposed values; null: nothing
  TensorView out;                   // [batch, seq_q, heads, head_dim], of the dtype of values as they are
  float* lse = nullptr;             // [batch, heads, seq_q], contiguous
  float scale = 1.f;
  Window window;
  std::optional<BlockLists> blocks;  // instead of the window
  // Row i of the result is token order[i] of `out` and `lse`, if there is such; a token that none names gets zeros.
  Permutation order;
  void* workspace = nullptr;  // quantized_attention_workspace(…) bytes
};

std::size_t quantized_attention_workspace(const QuantizedAttention& problem, const Threads& threads);
std::size_t quantized_attention_workspace(const QuantizedAttention& problem, Stream stream);
Status quantized_attention(const QuantizedAttention& problem, const Threads& threads);
Status quantized_attention(const QuantizedAttention& problem, Stream stream);

// estimate_blocks: the blocks of scores that low-bit queries and keys find worth computing (SALE, arXiv 2505.24179).

// A block is listed if it is of the sink or the window, or if one of its scores that causality leaves to queries of q,
// scale · (scaled query · scaled key) + key_term, is not below the floor of its query. NaN is not.
struct EstimateBlocks {
  // As quantize_tokens leaves them, of kInt8; 4-bit ones a byte each.
  TensorView q;                     // [batch, ceil(seq_q / query_stride), heads, head_dim]
  TensorView k;                     // [batch, seq_k, kv_heads, head_dim]; heads is a multiple of kv_heads
  const float* q_scales = nullptr;  // [batch, heads, ceil(seq_q / query_stride)]
  const float* k_scales = nullptr;  // [batch, kv_heads, num_groups(seq_k, group)]
  std::int64_t group = 32;          // of the keys' scales: one of kTokenGroups
  const float* floor = nullptr;     // like q_scales
  const float* key_term = nullptr;  // [batch, heads, padded_tokens(seq_k)], as in QuantizedAttention; null: 0
  float scale = 1.f;
  std::int64_t query_stride = 1;      // divides block.q; row i of q is query i · query_stride, the others have no say
  std::int64_t seq_q = 0;             // of all queries, whose blocks are listed
  TileShape block{128, 128};          // queries and keys, each 64 or 128
  std::int64_t sink = 0, window = 0;  // in blocks, see sink_and_window
  bool causal = false;
  std::int32_t* counts = nullptr;   // [batch, heads, query blocks]
  std::int32_t* indices = nullptr;  // [batch, heads, query blocks, key blocks]: listed ones ascend, then the others do
  void* workspace = nullptr;        // estimate_blocks_workspace(…) bytes, 16-byte aligned
};

std::size_t estimate_blocks_workspace(const EstimateBlocks& problem, const Threads& threads);
std::size_t estimate_blocks_workspace(const EstimateBlocks& problem, Stream stream);
Status estimate_blocks(const EstimateBlocks& problem, const Threads& threads);
Status estimate_blocks(const EstimateBlocks& problem, Stream stream);

}  // namespace fastattn

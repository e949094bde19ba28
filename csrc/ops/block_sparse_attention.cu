// `block_sparse_attention` on Hopper: softmax over listed blocks, in bf16 and fp16. See block_sparse_attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/block_list.hpp"
#include "ops/softmax.cuh"
#include "ops/validate.hpp"
#include "sm90/config.hpp"

namespace fastattn {
namespace {

template <class Element>
struct SoftmaxBlocks : SoftmaxOver<Element, BlockLists>, sm90::GradientTiles {
  // Tiles that meet at most two blocks on either axis (BlockList::supports); the first one is for blocks of 192
  // queries.
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = {192, 128}, .stages = 2, .warpgroups = 3},
                                              {.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                              {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2}};
};

}  // namespace

Status block_sparse_attention(const BlockSparseAttention& p, Stream stream) {
  constexpr const char* kOp = "block_sparse_attention";
  return sm90::run_if_valid(kOp, p, p.q.dtype, [&]<class Element>() {
    return softmax_forward<SoftmaxBlocks<Element>>(kOp, p, p.blocks, stream);
  });
}

Status block_sparse_attention_backward(const BlockSparseAttentionBackward& problem, Stream stream) {
  constexpr const char* kOp = "block_sparse_attention_backward";
  return sm90::run_if_valid(kOp, problem, problem.forward.q.dtype, [&]<class Element>() {
    return softmax_backward<SoftmaxBlocks<Element>>(kOp, problem, problem.forward.blocks, stream);
  });
}

std::size_t block_sparse_attention_backward_workspace(const BlockSparseAttentionBackward& problem, Stream) {
  const BlockSparseAttention& p = problem.forward;
  return sm90::with_element(
      p.q.dtype, [&]<class Element>() { return sm90::backward_workspace<SoftmaxBlocks<Element>>(problem, p.blocks); });
}

}  // namespace fastattn

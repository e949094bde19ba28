// `block_sparse_attention` on Hopper: softmax over listed blocks, in bf16 and fp16. See block_sparse_attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/block_list.hpp"
#include "fastattn/score/softmax.hpp"
#include "ops/validate.hpp"
#include "sm90/config.hpp"
#include "sm90/output.cuh"
#include "sm90/run.cuh"

namespace fastattn {
namespace {

template <class Element_>
struct SoftmaxBlocks {
  using Schedule = BlockLists;
  using Score = Softmax;
  using Element = Element_;
  using Epilogue = sm90::Output<Element, true>;
  // Tiles that meet at most two blocks of 64 or 128 on either axis (BlockList::supports).
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                              {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2}};
  static constexpr sm90::Config kBackward[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2}};
};

}  // namespace

Status block_sparse_attention(const BlockSparseAttention& p, Stream stream) {
  return sm90::run_if_valid("block_sparse_attention", p, p.q.dtype, [&]<class Element>() {
    return sm90::run_forward<SoftmaxBlocks<Element>>(
        "block_sparse_attention", {p.q, p.k, p.v, p.out, p.blocks, {p.scale * kLog2E}, p.lse}, stream);
  });
}

Status block_sparse_attention_backward(const BlockSparseAttentionBackward& problem, Stream stream) {
  const BlockSparseAttention& p = problem.forward;
  return sm90::run_if_valid("block_sparse_attention_backward", problem, p.q.dtype, [&]<class Element>() {
    return sm90::run_backward<SoftmaxBlocks<Element>>("block_sparse_attention_backward",
                                                      {.q = p.q,
                                                       .k = p.k,
                                                       .v = p.v,
                                                       .dout = problem.dout,
                                                       .dq = problem.dq,
                                                       .dk = problem.dk,
                                                       .dv = problem.dv,
                                                       .out = p.out,
                                                       .lse = p.lse,
                                                       .dlse = problem.dlse,
                                                       .schedule = p.blocks,
                                                       .score = {p.scale * kLog2E},
                                                       .scale = p.scale,
                                                       .workspace = problem.workspace},
                                                      stream);
  });
}

std::size_t block_sparse_attention_backward_workspace(const BlockSparseAttentionBackward& problem, Stream) {
  const BlockSparseAttention& p = problem.forward;
  return sm90::with_element(
      p.q.dtype, [&]<class Element>() { return sm90::backward_workspace<SoftmaxBlocks<Element>>(p.q, p.blocks); });
}

}  // namespace fastattn

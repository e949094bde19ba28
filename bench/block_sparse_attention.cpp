// block_sparse_attention: the cases and the calls.
#include <cstdint>

#include "listed_case.hpp"
#include "ops.hpp"

namespace bench {
namespace {

class BlockSparseAttentionProblem final : public Problem {
 public:
  BlockSparseAttentionProblem(const Device& device, const ListedCase& shape, fastattn::DType dtype)
      : Problem(device, shape, dtype, Score::kSoftmax), shape_(shape) {}

 private:
  fastattn::BlockSparseAttention problem() const {
    return {.q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out_.view(),
            .lse = lse(),
            .scale = scale_,
            .blocks = shape_.lists(rows_.rows(), columns_.rows()),
            .workspace = forward_workspace()};
  }

  fastattn::BlockSparseAttentionBackward backward_problem() const {
    return backward_of<fastattn::BlockSparseAttentionBackward>(problem());
  }

  fastattn::Status run_forward() const override {
    return device_.run([&](const auto& executor) { return fastattn::block_sparse_attention(problem(), executor); });
  }
  fastattn::Status run_backward() const override {
    return device_.run(
        [&](const auto& executor) { return fastattn::block_sparse_attention_backward(backward_problem(), executor); });
  }
  std::size_t workspace_bytes() const override {
    return device_.run([&](const auto& executor) {
      return fastattn::block_sparse_attention_backward_workspace(backward_problem(), executor);
    });
  }

  const ListedCase& shape_;
  const Lists rows_{device_, shape_.heads, shape_.blocks_q(), shape_.blocks_k(),
                    [this](auto head, auto row, auto column) { return shape_.is_listed(head, row, column); }};
  const Lists columns_{device_, shape_.heads, shape_.blocks_k(), shape_.blocks_q(),
                       [this](auto head, auto column, auto row) { return shape_.is_listed(head, row, column); }};
};

const AddOp<ListedCase, BlockSparseAttentionProblem> kOp{
    "block_sparse_attention",
    {
        "b1_s4096_h8_d64_blocks128x128_keep25",
        "b1_s4096_h8_d64_blocks128x128_keep10",
        "b1_s4096_h8_d64_blocks128x128_keep25_causal",
        "b1_s4096_h8_d64_blocks64x64_keep25",
    },
    {
        "b1_s32768_h16_d128_blocks128x128_keep50",
        "b1_s32768_h16_d128_blocks128x128_keep25",
        "b1_s32768_h16_d128_blocks128x128_keep10",
        "b1_s32768_h16_d128_blocks128x128_keep5",
        "b1_s32768_h16_d128_blocks128x128_keep25_causal",
        "b1_s32768_h16_d128_blocks64x64_keep25",
        "b1_s32768_h16_d64_blocks128x128_keep10",
        "b1_s32768_h16_d64_blocks192x128_keep10",
        "b1_s32768_h16_d64_blocks64x64_keep25",
    },
    {
        "b1_s130_h2_d64_blocks64x64_keep60",
        "b1_s200x333_h4_kv2_d64_blocks64x128_keep60_causal",
        "b1_s257_h2_d64_blocks128x64_keep30",
        "b1_s130_h2_d128_blocks64x64_keep60",
        "b1_s200x333_h4_kv2_d128_blocks64x128_keep60_causal",
        "b1_s257_h2_d128_blocks128x64_keep30",
    },
};

}  // namespace
}  // namespace bench

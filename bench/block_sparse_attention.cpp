// block_sparse_attention: the cases and the calls.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "case.hpp"
#include "ops.hpp"

namespace bench {
namespace {

// `keep25` lists a quarter of the blocks, others for each head; which ones a hash decides, here as in Python.
struct ListedCase final : Case {
  static constexpr const char* kForm = "b1_s4096[x8192]_h8[_kv2]_d64_blocks128x128_keep25[_causal]";

  explicit ListedCase(const std::string& name)
      : ListedCase(CaseName(name, kForm, R"(s(\d+)(?:x(\d+))?)", R"(_blocks(64|128)x(64|128)_keep(\d+)(_causal)?)")) {}

  bool is_listed(std::int64_t head, std::int64_t row, std::int64_t column) const {
    auto x = static_cast<std::uint32_t>((head << 20 | row << 10) + column);
    for (int i = 0; i < 2; ++i) {
      x = (x ^ (x >> 16)) * 0x45d9f3bu;
    }
    return (x ^ (x >> 16)) % 100 < percent;
  }

  bool keeps(std::int64_t, std::int64_t head, std::int64_t q, std::int64_t k) const override {
    return is_listed(head, q / block.q, k / block.k) && (!causal || k <= q + seq_k - seq_q);
  }

  double density() const override {
    double kept = 0;
    for (std::int64_t head = 0; head < heads; ++head) {
      for (std::int64_t q = 0; q < seq_q; ++q) {
        const std::int64_t end = causal ? std::min(q + seq_k - seq_q + 1, seq_k) : seq_k;
        for (std::int64_t k = 0; k < end; k += block.k) {
          kept += is_listed(head, q / block.q, k / block.k)
                      ? static_cast<double>(std::min<std::int64_t>(end - k, block.k))
                      : 0.;
        }
      }
    }
    return kept / static_cast<double>(heads * seq_q * seq_k);
  }

  fastattn::TileShape block;
  std::uint32_t percent;
  bool causal;

 private:
  explicit ListedCase(const CaseName& parts)
      : Case(parts, number(parts.tokens[1]), number(parts.tokens[2], number(parts.tokens[1]))),
        block{static_cast<int>(number(parts.mask[1])), static_cast<int>(number(parts.mask[2]))},
        percent(static_cast<std::uint32_t>(number(parts.mask[3]))),
        causal(parts.mask[4].matched) {}
};

// The lists of all heads in the device's memory, for rows of blocks or, transposed, for columns.
class Lists {
 public:
  template <class IsListed>
  Lists(const Device& device, std::int64_t heads, std::int64_t num_rows, std::int64_t width, IsListed is_listed) {
    std::vector<std::int32_t> counts, indices;
    for (std::int64_t head = 0; head < heads; ++head) {
      for (std::int64_t row = 0; row < num_rows; ++row) {
        const std::size_t begin = indices.size();
        for (std::int64_t column = 0; column < width; ++column) {
          if (is_listed(head, row, column)) {
            indices.push_back(static_cast<std::int32_t>(column));
          }
        }
        counts.push_back(static_cast<std::int32_t>(indices.size() - begin));
        indices.resize(begin + static_cast<std::size_t>(width));
      }
    }
    counts_ = copy(device, counts);
    indices_ = copy(device, indices);
  }

  fastattn::BlockRows rows() const {
    return {static_cast<const std::int32_t*>(counts_.get()), static_cast<const std::int32_t*>(indices_.get()), nullptr};
  }

 private:
  static std::shared_ptr<void> copy(const Device& device, const std::vector<std::int32_t>& values) {
    const std::size_t bytes = values.size() * sizeof values[0];
    std::shared_ptr<void> memory = device.allocate(bytes);
    device.copy_in(memory.get(), values.data(), bytes);
    return memory;
  }

  std::shared_ptr<void> counts_, indices_;
};

class BlockSparseAttentionProblem final : public Problem {
 public:
  BlockSparseAttentionProblem(const Device& device, const ListedCase& shape, fastattn::DType dtype)
      : Problem(device, shape, dtype, Score::kSoftmax), shape_(shape) {}

 private:
  fastattn::BlockSparseAttention problem() const {
    const int seq_q = static_cast<int>(shape_.seq_q), seq_k = static_cast<int>(shape_.seq_k);
    return {.q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out_.view(),
            .lse = lse(),
            .scale = scale_,
            .blocks = {.first = {.num_q = seq_q,
                                 .num_k = seq_k,
                                 .left = seq_k,
                                 .right = shape_.causal ? 0 : seq_q,
                                 .block = shape_.block,
                                 .rows = rows_.rows(),
                                 .columns = columns_.rows()},
                       .batch = 1,
                       .heads = static_cast<int>(shape_.heads)},
            .workspace = forward_workspace()};
  }

  fastattn::BlockSparseAttentionBackward backward_problem() const {
    return {.forward = problem(),
            .dout = gradients_->dout.view(),
            .dlse = nullptr,
            .dq = gradients_->dq.view(),
            .dk = gradients_->dk.view(),
            .dv = gradients_->dv.view(),
            .workspace = gradients_->workspace.get()};
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
  const std::int64_t blocks_q_ = fastattn::ceil_div<std::int64_t>(shape_.seq_q, shape_.block.q);
  const std::int64_t blocks_k_ = fastattn::ceil_div<std::int64_t>(shape_.seq_k, shape_.block.k);
  const Lists rows_{device_, shape_.heads, blocks_q_, blocks_k_,
                    [this](auto head, auto row, auto column) { return shape_.is_listed(head, row, column); }};
  const Lists columns_{device_, shape_.heads, blocks_k_, blocks_q_,
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

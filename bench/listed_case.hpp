// Cases of block_sparse_attention: b1_s4096[x8192]_h8[_kv2]_d64_blocks128x128_keep25[_causal]. `keep25` lists a quarter
// of the blocks, others for each head; which ones a hash decides, here as in Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "case.hpp"
#include "device.hpp"

namespace bench {

struct ListedCase final : Case {
  static constexpr const char* kForm = "b1_s4096[x8192]_h8[_kv2]_d64_blocks128x128_keep25[_causal]";

  explicit ListedCase(const std::string& name)
      : ListedCase(
            CaseName(name, kForm, R"(s(\d+)(?:x(\d+))?)", R"(_blocks(64|128|192)x(64|128)_keep(\d+)(_causal)?)")) {}

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
    std::int64_t kept = 0;
    for (std::int64_t head = 0; head < heads; ++head) {
      for (std::int64_t row = 0; row < blocks_q(); ++row) {
        for (std::int64_t column = 0; column < blocks_k(); ++column) {
          kept += is_listed(head, row, column) ? kept_of_block(row * block.q, column * block.k) : 0;
        }
      }
    }
    return static_cast<double>(kept) / static_cast<double>(heads * seq_q * seq_k);
  }

  std::int64_t blocks_q() const { return fastattn::ceil_div<std::int64_t>(seq_q, block.q); }
  std::int64_t blocks_k() const { return fastattn::ceil_div<std::int64_t>(seq_k, block.k); }

  fastattn::BlockLists lists(const fastattn::BlockRows& rows, const fastattn::BlockRows& columns) const {
    const int num_q = static_cast<int>(seq_q), num_k = static_cast<int>(seq_k);
    return {.first = {.num_q = num_q,
                      .num_k = num_k,
                      .left = num_k,
                      .right = causal ? 0 : num_q,
                      .block = block,
                      .rows = rows,
                      .columns = columns},
            .batch = 1,
            .heads = static_cast<int>(heads)};
  }

  fastattn::TileShape block;
  std::uint32_t percent;
  bool causal;

 private:
  std::int64_t kept_of_block(std::int64_t first_q, std::int64_t first_k) const {
    const std::int64_t end_q = std::min(first_q + block.q, seq_q), end_k = std::min(first_k + block.k, seq_k);
    std::int64_t kept = 0;
    for (std::int64_t q = first_q; q < end_q; ++q) {
      const std::int64_t end = causal ? std::min(q + seq_k - seq_q + 1, end_k) : end_k;
      kept += std::max<std::int64_t>(end - first_k, 0);
    }
    return kept;
  }

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

}  // namespace bench

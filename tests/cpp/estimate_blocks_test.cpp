// estimate_blocks from C++: with every instruction set this machine has, against plain loops; and what is refused.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/sink_and_window.hpp"
#include "ops/validate.hpp"

using namespace fastattn;

namespace {

constexpr std::int64_t kBatch = 2, kHeads = 4, kKvHeads = 2, kSeqQ = 200, kSeqK = 331;

struct Problem {
  std::vector<std::int8_t> q, k;
  std::vector<float> q_scales, k_scales, floor, key_term;
  std::vector<std::int32_t> counts, indices;
  EstimateBlocks description;

  // Integers up to `limit`.
  Problem(int limit, std::int64_t dim, std::int64_t group, TileShape block, bool causal, std::int64_t stride = 1) {
    std::mt19937 random(1);
    const auto integers = [&](std::int64_t count) {
      std::vector<std::int8_t> values;
      for (std::int64_t i = 0; i < count; ++i) {
        values.push_back(static_cast<std::int8_t>(std::uniform_int_distribution<int>(-limit, limit)(random)));
      }
      return values;
    };
    const auto floats = [&](std::int64_t count, float least, float most) {
      std::vector<float> values;
      for (std::int64_t i = 0; i < count; ++i) {
        values.push_back(std::uniform_real_distribution<float>(least, most)(random));
      }
      return values;
    };
    const float root = std::sqrt(static_cast<float>(dim)), step = 1.f / static_cast<float>(limit);
    const std::int64_t judged = ceil_div(kSeqQ, stride);
    q = integers(kBatch * judged * kHeads * dim);
    k = integers(kBatch * kSeqK * kKvHeads * dim);
    q_scales = floats(kBatch * kHeads * judged, 0.f, step);
    k_scales = floats(kBatch * kKvHeads * num_groups(kSeqK, group), 0.f, step);
    floor = floats(kBatch * kHeads * judged, 0.8f * root, 1.f * root);
    key_term = floats(kBatch * kHeads * padded_tokens(kSeqK), -0.1f, 0.1f);
    for (std::int64_t row = 0; row < kBatch * kHeads; ++row) {  // what is past the keys is not looked at
      std::fill(key_term.begin() + row * padded_tokens(kSeqK) + kSeqK,
                key_term.begin() + (row + 1) * padded_tokens(kSeqK), NAN);
    }
    counts.assign(kBatch * kHeads * ceil_div<std::int64_t>(kSeqQ, block.q), -1);
    indices.assign(counts.size() * ceil_div<std::int64_t>(kSeqK, block.k), -1);
    const auto view = [&](std::vector<std::int8_t>& values, std::int64_t seq, std::int64_t heads) {
      return TensorView{.data = values.data(),
                        .shape = {kBatch, seq, heads, dim},
                        .stride = {seq * heads * dim, heads * dim, dim, 1},
                        .dtype = DType::kInt8};
    };
    description = {.q = view(q, judged, kHeads),
                   .k = view(k, kSeqK, kKvHeads),
                   .q_scales = q_scales.data(),
                   .k_scales = k_scales.data(),
                   .group = group,
                   .floor = floor.data(),
                   .key_term = key_term.data(),
                   .scale = 0.9f,
                   .query_stride = stride,
                   .seq_q = kSeqQ,
                   .block = block,
                   .sink = 1,
                   .window = 1,
                   .causal = causal,
                   .counts = counts.data(),
                   .indices = indices.data()};
  }

  // Of the i-th query that is judged.
  bool reaches_floor(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    const std::int64_t judged = description.q.seq();
    const std::int64_t dim = description.q.head_dim(), kv = h / (kHeads / kKvHeads), group = description.group;
    int sum = 0;
    for (std::int64_t d = 0; d < dim; ++d) {
      sum += q[((b * judged + i) * kHeads + h) * dim + d] * k[((b * kSeqK + j) * kKvHeads + kv) * dim + d];
    }
    const std::int64_t row = (b * kHeads + h) * judged + i;
    const float query_scale = description.scale * q_scales[row];
    const float scale = query_scale * k_scales[(b * kKvHeads + kv) * num_groups(kSeqK, group) + group_of(j, group)];
    const float score = std::fma(scale, static_cast<float>(sum), key_term[(b * kHeads + h) * padded_tokens(kSeqK) + j]);
    return !(score < floor[row]);
  }

  // Row `row` of a head: the listed blocks, then the others.
  std::vector<std::int32_t> expected(std::int64_t b, std::int64_t h, int row, std::int32_t& count) const {
    const TileShape block = description.block;
    const std::int64_t stride = description.query_stride;
    const SinkAndWindow near = sink_and_window(row, kSeqQ, kSeqK, block, description.sink, description.window);
    std::vector<std::int32_t> listed, others;
    for (int column = 0; column * block.k < kSeqK; ++column) {
      bool is_seen = false, is_listed = false;
      for (std::int64_t i = row * block.q; i < min_of<std::int64_t>((row + 1) * block.q, kSeqQ); ++i) {
        for (std::int64_t j = column * block.k; j < min_of<std::int64_t>((column + 1) * block.k, kSeqK); ++j) {
          const bool sees = !description.causal || j <= i + kSeqK - kSeqQ;
          is_seen = is_seen || sees;
          is_listed = is_listed || (sees && i % stride == 0 && reaches_floor(b, h, i / stride, j));
        }
      }
      (is_listed || (is_seen && near.contains(column)) ? listed : others).push_back(column);
    }
    count = static_cast<std::int32_t>(listed.size());
    listed.insert(listed.end(), others.begin(), others.end());
    return listed;
  }
};

void check_against_loops(const char* name, const cpu::EstimateBlocksKernels& kernels) {
  const struct {
    int limit;
    std::int64_t dim, group;
    TileShape block;
    bool causal;
    std::int64_t stride;
  } cases[] = {{7, 64, 8, {64, 64}, true, 1},        {127, 40, 32, {128, 64}, true, 1},
               {7, 24, 1, {64, 128}, false, 1},      {127, 128, 16, {128, 128}, false, 1},
               {7, 64, 8, {64, 64}, true, 2},        {127, 40, 32, {128, 64}, true, 8},
               {127, 128, 16, {128, 128}, false, 4}, {7, 24, 1, {64, 128}, true, 64}};
  for (const auto& [limit, dim, group, block, causal, stride] : cases) {
    Problem p(limit, dim, group, block, causal, stride);
    check(validate(p.description).ok(), validate(p.description).message);
    kernels.run(p.description, StdThreads{2});
    const int rows = ceil_div<int>(kSeqQ, block.q), columns = ceil_div<int>(kSeqK, block.k);
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < kBatch * kHeads * rows; ++i) {
      std::int32_t count = 0;
      const std::vector<std::int32_t> want = p.expected(i / rows / kHeads, i / rows % kHeads, i % rows, count);
      const std::vector<std::int32_t> got(p.indices.begin() + i * columns, p.indices.begin() + (i + 1) * columns);
      check(p.counts[i] == count && got == want, std::string(name) + ": row " + std::to_string(i));
      sum += count;
    }
    check(sum < kBatch * kHeads * rows * columns, "some blocks are left out");
  }
}

const Test loops("estimate_blocks: every bit", [] {
  if (std::strcmp(cpu_instruction_set(), "none") != 0) {
    check_against_loops("avx2", cpu::kEstimateBlocksAvx2);
  }
  if (std::strcmp(cpu_instruction_set(), "avx512") == 0) {
    check_against_loops("avx512", cpu::kEstimateBlocksAvx512);
  }
});

void refuse(void (*edit)(EstimateBlocks&), const char* message) {
  Problem p(7, 64, 8, {64, 128}, true);
  edit(p.description);
  const std::string got = estimate_blocks(p.description, StdThreads{}).message;
  check(got == std::string("estimate_blocks: ") + message, "got '" + got + "'");
  check(p.counts[0] == -1 && p.indices[0] == -1, "nothing is written");
}

const Test refusals("estimate_blocks: what is refused", [] {
  refuse([](auto& p) { p.q.shape[1] = -1; }, "q has a negative size, -1, at axis 1");
  refuse([](auto& p) { p.q.dtype = DType::kFloat8; }, "q must be int8, got float8_e4m3fn");
  refuse([](auto& p) { p.q.dtype = static_cast<DType>(9); }, "q must be int8, got an unknown dtype");
  refuse([](auto& p) { p.k.dtype = DType::kFloat8; }, "k must have the dtype of q, int8, got float8_e4m3fn");
  refuse([](auto& p) { p.k.shape[1] = std::int64_t{1} << 30; }, "k must be shorter than 2^30, got 1073741824");
  refuse([](auto& p) { p.group = 2; }, "group must be 1, 8, 16 or 32, got 2");
  refuse([](auto& p) { p.q.data = nullptr; }, "q has no data");
  refuse([](auto& p) { p.q_scales = nullptr; }, "q_scales has no data");
  refuse([](auto& p) { p.k_scales = nullptr; }, "k_scales has no data");
  refuse([](auto& p) { p.k.stride[3] = 2; }, "k must be contiguous in its last dimension, got stride 2");
  refuse([](auto& p) { p.q.shape[3] = 12; }, "head_dim must be a multiple of 8 between 8 and 256, got 12");
  refuse([](auto& p) { p.k.shape[3] = 32; }, "k must have the head_dim of q, 64, got 32");
  refuse([](auto& p) { p.k.shape[0] = 1; }, "k must have the batch size of q, 2, got 1");
  refuse([](auto& p) { p.k.shape[2] = 3; }, "the heads of q must be a multiple of those of k, got 4 and 3");
  refuse([](auto& p) { p.k.shape[2] = 0; }, "the heads of q must be a multiple of those of k, got 4 and 0");
  refuse([](auto& p) { p.scale = 0.f; }, "scale must be finite and positive, got 0");
  refuse([](auto& p) { p.scale = HUGE_VALF; }, "scale must be finite and positive, got inf");
  refuse([](auto& p) { p.block.q = 96; }, "a block must have 64 or 128 queries and 64 or 128 keys, got 96 x 128");
  refuse([](auto& p) { p.block.q = 192; }, "a block must have 64 or 128 queries and 64 or 128 keys, got 192 x 128");
  refuse([](auto& p) { p.query_stride = 3; }, "query_stride must divide the queries of a block, 64, got 3");
  refuse([](auto& p) { p.query_stride = 0; }, "query_stride must divide the queries of a block, 64, got 0");
  refuse([](auto& p) { p.seq_q = -1; }, "seq_q must be between 0 and 2^30 - 1, got -1");
  refuse([](auto& p) { p.seq_q = 0; }, "q must hold 0 of 0 queries with query_stride 1, got 200");
  refuse([](auto& p) { p.query_stride = 2; }, "q must hold 100 of 200 queries with query_stride 2, got 200");
  refuse([](auto& p) { p.sink = -1; }, "sink must not be negative, got -1");
  refuse([](auto& p) { p.window = -2; }, "window must not be negative, got -2");
  refuse([](auto& p) { p.floor = nullptr; }, "floor is needed and has no data");
  refuse([](auto& p) { p.counts = nullptr; }, "counts is needed and has no data");
  refuse([](auto& p) { p.indices = nullptr; }, "indices is needed and has no data");
});

}  // namespace

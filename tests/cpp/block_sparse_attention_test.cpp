// block_sparse_attention on the CPU: with every instruction set this machine has, and what it refuses. Lists that leave
// blocks out are for the Python tests.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "attention_problem.hpp"
#include "check.hpp"
#include "cpu/kernels.hpp"
#include "ops/validate.hpp"

using namespace fastattn;

namespace {

// Lists of all blocks of a band, for each head.
struct BandProblem {
  AttentionProblem dense;
  std::vector<std::int32_t> row_counts, row_indices, column_counts, column_indices;
  BlockSparseAttentionBackward description;

  BandProblem(const Shape& shape, Window window, TileShape block) : dense(shape, DType::kFloat32, window) {
    const AttentionBackward& p = dense.description;
    const Band band = band_of(p.forward);
    const int num_q = band.num_q, num_k = band.num_k;
    const int rows = ceil_div(num_q, block.q), columns = ceil_div(num_k, block.k);
    const int heads = static_cast<int>(shape.heads);
    fill(row_counts, row_indices, heads * rows, columns);
    fill(column_counts, column_indices, heads * columns, rows);
    const BlockList list{num_q,
                         num_k,
                         band.left,
                         band.right,
                         block,
                         {row_counts.data(), row_indices.data(), nullptr},
                         {column_counts.data(), column_indices.data(), nullptr}};
    description = {
        {p.forward.q, p.forward.k, p.forward.v, p.forward.out, p.forward.lse, p.forward.scale, {list, 1, heads}},
        p.dout,
        p.dlse,
        p.dq,
        p.dk,
        p.dv,
        p.deterministic,
        p.workspace};
  }

  static void fill(std::vector<std::int32_t>& counts, std::vector<std::int32_t>& indices, int rows, int width) {
    counts.assign(rows, width);
    for (int i = 0; i < rows * width; ++i) {
      indices.push_back(i % width);
    }
  }
};

void check_against_formula(const char* name, const cpu::BlockSparseAttentionKernels& kernels) {
  for (const TileShape block : {TileShape{64, 64}, {128, 64}, {64, 128}, {128, 128}, {192, 128}}) {
    BandProblem p({2, 200, 260, 4, 2, 24}, {150, 40}, block);
    check(validate(p.description).ok(), validate(p.description).message);
    const BlockLists& blocks = p.description.forward.blocks;
    kernels.forward(p.description.forward, blocks, StdThreads{2});
    kernels.backward(p.description, blocks, StdThreads{2});
    const Expected e = expected_of(p.dense);
    const auto judge = [&](const char* what, const std::vector<double>& got, const std::vector<double>& want) {
      const double error = relative_error(got, want);
      check(error <= 2e-6, std::string(name) + " " + what + " is off by " + std::to_string(error * 1e6) + "e-6");
    };
    judge("out", p.dense.out.values(), e.out);
    judge("lse", {p.dense.lse.begin(), p.dense.lse.end()}, e.lse);
    judge("dq", p.dense.dq.values(), e.dq);
    judge("dk", p.dense.dk.values(), e.dk);
    judge("dv", p.dense.dv.values(), e.dv);
  }
}

const Test formula("block_sparse_attention: all blocks of a band", [] {
  if (std::strcmp(cpu_instruction_set(), "none") != 0) {
    check_against_formula("avx2", cpu::kBlockSparseAttentionAvx2);
  }
  if (std::strcmp(cpu_instruction_set(), "avx512") == 0) {
    check_against_formula("avx512", cpu::kBlockSparseAttentionAvx512);
  }
});

using Edit = void (*)(BlockSparseAttentionBackward&);

BlockList& list_of(BlockSparseAttentionBackward& p) { return p.forward.blocks.first; }

void refuse_backward(Edit edit, const char* message) {
  BandProblem p({2, 200, 260, 4, 2, 16}, {}, {64, 128});
  edit(p.description);
  const std::string got = block_sparse_attention_backward(p.description, StdThreads{}).message;
  check(got == std::string("block_sparse_attention_backward: ") + message, "got '" + got + "'");
}

void refuse(Edit edit, const char* message) {
  BandProblem p({2, 200, 260, 4, 2, 16}, {}, {64, 128});
  edit(p.description);
  const std::string got = block_sparse_attention(p.description.forward, StdThreads{}).message;
  check(got == std::string("block_sparse_attention: ") + message, "got '" + got + "'");
  check(std::isnan(p.dense.out.get(0, 0, 0, 0)), "nothing is written");
  refuse_backward(edit, message);
}

const Test refusals("block_sparse_attention: what it refuses", [] {
  refuse([](auto& p) { p.forward.scale = 0.f; }, "scale must be finite and positive, got 0");
  refuse([](auto& p) { p.forward.out.shape[2] = 2; },
         "out must have the shape of q, [2, 200, 4, 16], got [2, 200, 2, 16]");
  refuse([](auto& p) { list_of(p).num_q = 199; },
         "blocks must be of 200 queries and 260 keys, as q and k are, got 199 and 260");
  refuse([](auto& p) { list_of(p).num_k = 261; },
         "blocks must be of 200 queries and 260 keys, as q and k are, got 200 and 261");
  refuse([](auto& p) { list_of(p).block.q = 32; },
         "a block must have 64, 128 or 192 queries and 64 or 128 keys, got 32 x 128");
  refuse([](auto& p) { list_of(p).block.k = 0; },
         "a block must have 64, 128 or 192 queries and 64 or 128 keys, got 64 x 0");
  refuse([](auto& p) { p.forward.blocks.batch = 3; },
         "blocks must be of 1 or 2 batch entries and 1 or 4 heads, got 3 and 4");
  refuse([](auto& p) { p.forward.blocks.heads = 2; },
         "blocks must be of 1 or 2 batch entries and 1 or 4 heads, got 1 and 2");
  refuse([](auto& p) { list_of(p).right = -1; },
         "the sides of blocks' band must be between 0 and 2^30 - 1, got 260 and -1");
  refuse([](auto& p) { list_of(p).rows.counts = nullptr; }, "blocks.rows is needed and has no data");
  refuse([](auto& p) { list_of(p).rows.indices = nullptr; }, "blocks.rows is needed and has no data");
  refuse_backward([](auto& p) { list_of(p).columns = {}; }, "blocks.columns is needed and has no data");
  refuse_backward([](auto& p) { p.forward.lse = nullptr; }, "lse is needed and has no data");
  refuse_backward([](auto& p) { p.dk.shape[2] = 4; },
                  "dk must have the shape of k, [2, 260, 2, 16], got [2, 260, 4, 16]");
  refuse_backward([](auto& p) { p.workspace = nullptr; }, "workspace has no data");
});

}  // namespace

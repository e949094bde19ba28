// `estimate_blocks` on Hopper. See estimate_blocks.md, which decides every bit of a list.
#include "fastattn/fastattn.hpp"
#include "ops/validate.hpp"
#include "sm90/estimate.cuh"
#include "sm90/run.cuh"

namespace fastattn {
namespace {

constexpr const char* kOp = "estimate_blocks";

std::int64_t num_rows_of_blocks(const EstimateBlocks& p) {
  return p.q.batch() * p.q.heads() * ceil_div(p.seq_q, std::int64_t{p.block.q});
}

// In the workspace marks come first, then the queue's counter.
std::size_t size_of_marks(const EstimateBlocks& p) {
  const std::int64_t marks = num_rows_of_blocks(p) * ceil_div(p.k.seq(), std::int64_t{p.block.k});
  return static_cast<std::size_t>(ceil_div(marks, std::int64_t{16}) * 16);
}

template <int kIndex>
Status run(const EstimateBlocks& p, Stream stream) {
  using Kernel = sm90::EstimateKernel<kIndex>;
  const int num_k = static_cast<int>(p.k.seq());
  sm90::EstimateParams params{};
  params.num_q = static_cast<int>(p.seq_q);
  params.num_k = num_k;
  params.query_stride = static_cast<int>(p.query_stride);
  params.causal = p.causal;
  params.q_scales = p.q_scales;
  params.k_scales = p.k_scales;
  params.floor = p.floor;
  params.terms = {{p.key_term, p.q.batch(), p.q.heads()}, num_k};
  params.scale = p.scale;
  params.run_shift = p.group == 8 ? 5 : p.group == 16 ? 6 : 7;
  params.block = p.block;
  params.sink = static_cast<int>(min_of<std::int64_t>(p.sink, num_k));
  params.window = static_cast<int>(min_of<std::int64_t>(p.window, p.seq_q + num_k));
  params.batch = static_cast<int>(p.q.batch());
  params.heads = static_cast<int>(p.q.heads());
  params.heads_per_kv_head = sm90::heads_per_kv_head(p.q, p.k);
  params.q_tiles = ceil_div(static_cast<int>(p.q.seq()), Kernel::kTile.q);
  params.counts = p.counts;
  params.indices = p.indices;
  params.marks = static_cast<std::uint8_t*>(p.workspace);
  sm90::MapEncoder encode;
  encode(p.q, Kernel::kTile.q, params.q, Kernel::QueryTile::kRowBytes);
  encode(p.k, Kernel::kTile.k, params.k, Kernel::KeyTile::kRowBytes);
  const std::int64_t works = num_k > 0 ? p.q.batch() * params.heads * params.q_tiles : 0;
  const std::int64_t blocks = min_of(works, std::int64_t{sm90::num_multiprocessors()});
  params.works = {static_cast<int>(works), reinterpret_cast<int*>(params.marks + size_of_marks(p))};
  Status status = encode.status;
  if (status.ok()) {
    status = sm90::clear(p.workspace, size_of_marks(p) + kForwardWorkspace, stream);
  }
  if (status.ok()) {
    status = sm90::launch(sm90::estimate_kernel<kIndex>, blocks, (Kernel::kWarpgroups + 1) * sm90::kWarpgroupThreads,
                          sizeof(typename Kernel::Shared), stream, params);
  }
  if (status.ok()) {
    status = sm90::launch(sm90::list_kernel, ceil_div<std::int64_t>(num_rows_of_blocks(p) * 32, sm90::kListThreads),
                          sm90::kListThreads, 0, stream, params);
  }
  return status;
}

}  // namespace

Status estimate_blocks(const EstimateBlocks& p, Stream stream) {
  if (const Status status = validate(p); !status.ok()) {
    return status;
  }
  if (const Status status = sm90::check_device(); !status.ok()) {
    return status;
  }
  if (p.group == 1) {
    return failure("%s: group must be 8, 16 or 32 on the GPU, got 1", kOp);
  }
  if (p.q.head_dim() % 16 != 0) {
    return failure("%s: head_dim must be a multiple of 16 on the GPU, got %lld", kOp,
                   static_cast<long long>(p.q.head_dim()));
  }
  if (num_rows_of_blocks(p) == 0) {
    return {};
  }
  if (p.workspace == nullptr) {
    return failure("%s: workspace has no data", kOp);
  }
  return sm90::dispatch<sm90::kEstimate>(kOp, p.q.head_dim(), [&]<int kIndex>() { return run<kIndex>(p, stream); });
}

std::size_t estimate_blocks_workspace(const EstimateBlocks& p, Stream) { return size_of_marks(p) + kForwardWorkspace; }

}  // namespace fastattn

// Host side: a forward, described to its kernel and launched. One function for every op.
#pragma once

#include <cstdint>
#include <type_traits>

#include "fastattn/fastattn.hpp"
#include "sm90/forward.cuh"
#include "sm90/launch.cuh"
#include "sm90/run.cuh"
#include "sm90/work_order.hpp"

namespace fastattn::sm90 {

template <class Variant>
struct ForwardProblem {
  TensorView q, k, v;
  typename Variant::Schedule schedule;
  typename Variant::Score score;
  typename Variant::Epilogue epilogue;
  void* workspace;
  typename Variant::Operands::Scales scales = {};
};

// A block for each SM, which takes work after work; or one for each work, if these are fewer.
template <class Kernel, class Variant>
Status launch_forward(const char* op, const ForwardProblem<Variant>& problem, Stream stream,
                      void (*kernel)(typename Kernel::Params)) {
  static_assert(sizeof(*WorkQueue::taken) == kForwardWorkspace);
  const auto schedule = problem.schedule.slots();  // of any head: it tells the shape of a tile
  typename Kernel::Params params{};
  params.schedule = problem.schedule;
  params.score = problem.score;
  params.heads = num_heads(problem.schedule, static_cast<int>(problem.q.heads()));
  params.heads_per_kv_head = params.heads / max_of(static_cast<int>(problem.k.heads()), 1);
  const int q_tiles = num_q_tiles(problem.schedule, Kernel::kTile);
  params.epilogue = problem.epilogue;
  params.scales = problem.scales;
  MapEncoder encode;
  encode(problem.q, schedule.query_box(Kernel::kTile), params.q, Kernel::QueryTile::kRowBytes);
  encode(problem.k, schedule.key_box(Kernel::kTile), params.k, Kernel::KeyTile::kRowBytes);
  if constexpr (std::is_same_v<decltype(params.v), TransposedMap>) {
    encode(problem.v, Kernel::kValueDim, params.v, Kernel::ValueTile::kRowBytes);
  } else {
    encode(problem.v, schedule.key_box(Kernel::kTile), params.v, Kernel::ValueTile::kRowBytes);
  }
  if (!encode.status.ok()) {
    return encode.status;
  }
  const std::int64_t heads = problem.q.batch() * params.heads, works = heads * q_tiles;
  const std::int64_t blocks = min_of(works, std::int64_t{num_multiprocessors()});
  if (works > WorkQueue::kMostWorks) {
    return failure("%s: q has %lld tiles of %d tokens, allowed are %lld", op, static_cast<long long>(works),
                   Kernel::kTile.q, static_cast<long long>(WorkQueue::kMostWorks));
  }
  if (works > 0 && problem.workspace == nullptr) {
    return failure("%s: workspace has no data", op);
  }
  const std::int64_t bytes_of_key =
      problem.k.head_dim() * size_of(problem.k.dtype) + Kernel::kValueDim * size_of(problem.v.dtype);
  params.order = work_order(heads, q_tiles, blocks, problem.k.seq() * bytes_of_key, params.heads_per_kv_head);
  params.works = {params.order.count(), works > blocks ? static_cast<int*>(problem.workspace) : nullptr};
  if (params.works.taken != nullptr) {
    if (const Status status = clear(params.works.taken, kForwardWorkspace, stream); !status.ok()) {
      return status;
    }
  }
  return launch(kernel, blocks, (Kernel::kWarpgroups + 1) * kWarpgroupThreads, sizeof(typename Kernel::Shared), stream,
                params);
}

template <class Variant>
Status run_forward(const char* op, const ForwardProblem<Variant>& problem, Stream stream) {
  const std::int64_t head_dim = problem.q.head_dim(), value_dim = problem.epilogue.out.head_dim();
  const auto has_room = [&](const Config& config) {
    return head_dim <= config.head_dim && value_dim <= config.value_dim;
  };
  const auto suits = [&](const Config& config) { return problem.schedule.suits(config.tile); };
  return dispatch<Variant::kForward>(op, head_dim, has_room, suits, [&]<int kIndex>() {
    return launch_forward<ForwardKernel<Variant, kIndex>>(op, problem, stream, forward_kernel<Variant, kIndex>);
  });
}

}  // namespace fastattn::sm90

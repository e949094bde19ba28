// `neighborhood_attention` on Hopper: softmax over boxes of a grid, in bf16 and fp16. See neighborhood_attention.md.
#include "fastattn/fastattn.hpp"
#include "fastattn/plan/neighborhood_tiles.hpp"
#include "fastattn/schedule/neighborhood.hpp"
#include "ops/softmax.cuh"
#include "ops/validate.hpp"
#include "sm90/config.hpp"

namespace fastattn {
namespace {

// The list of tiles, as types.
template <int kRank>
struct Boxes {
  static constexpr NeighborhoodTiles kTiles = kGpuNeighborhoodTiles[kRank - 1];
  static constexpr PerAxis<int> kNarrow = kGpuNeighborhoodNarrowQueries[kRank - 1];
  using Query = FixedBox<kTiles.q[0], kTiles.q[1], kTiles.q[2]>;
  using NarrowQuery = FixedBox<kNarrow[0], kNarrow[1], kNarrow[2]>;
  using Key = FixedBox<kTiles.k[0], kTiles.k[1], kTiles.k[2]>;
};

template <class Element, class QBox, class KBox>
struct SoftmaxNeighborhood : SoftmaxOver<Element, NeighborhoodSchedule<false, QBox, KBox>> {
  static constexpr TileShape kTile = {product(QBox::extent()), product(KBox::extent())};

  static auto schedule_of(const NeighborhoodAttention& p) { return make_neighborhood(p.axes, QBox{}, KBox{}); }
};

template <class Element, class Boxes>
struct Wide : SoftmaxNeighborhood<Element, typename Boxes::Query, typename Boxes::Key> {
  static constexpr sm90::Config kForward[] = {{.head_dim = 64, .tile = Wide::kTile, .stages = 2, .warpgroups = 2},
                                              {.head_dim = 128, .tile = Wide::kTile, .stages = 2, .warpgroups = 2}};
  static constexpr sm90::Config kGradients[1] = {{.head_dim = 64, .tile = Wide::kTile, .stages = 2, .warpgroups = 2}};
  static constexpr sm90::Config kKeyGradients[1] = {
      {.head_dim = 64, .tile = Wide::kTile, .stages = 2, .warpgroups = 2}};
  static constexpr sm90::Config kQueryGradients[2] = {
      {.head_dim = 64, .tile = Wide::kTile, .stages = 2, .warpgroups = 2},
      {.head_dim = 128, .tile = Wide::kTile, .stages = 2, .warpgroups = 2}};
};

// For the gradients of keys at head_dim 128: registers have room for 64 queries only.
template <class Element, class Boxes>
struct Narrow : SoftmaxNeighborhood<Element, typename Boxes::NarrowQuery, typename Boxes::Key> {
  static constexpr sm90::Config kGradients[1] = {
      {.head_dim = 128, .tile = Narrow::kTile, .stages = 2, .warpgroups = 2}};
  static constexpr sm90::Config kKeyGradients[1] = {
      {.head_dim = 128, .tile = Narrow::kTile, .stages = 2, .warpgroups = 2}};
};

// Calls run.operator()<Element, Boxes>() for the problem's dtype and axes.
template <class Run>
auto with_boxes(const NeighborhoodAttention& p, Run&& run) {
  return sm90::with_element(p.q.dtype, [&]<class Element>() {
    switch (num_axes(p.axes)) {
      case 1:
        return run.template operator()<Element, Boxes<1>>();
      case 2:
        return run.template operator()<Element, Boxes<2>>();
      default:
        return run.template operator()<Element, Boxes<3>>();
    }
  });
}

// Calls run.operator()<OfKeys, OfQueries>() for the variants of the backward's kernels.
template <class Run>
auto with_gradients(const NeighborhoodAttention& p, Run&& run) {
  return with_boxes(p, [&]<class Element, class Boxes>() {
    using OfQueries = Wide<Element, Boxes>;
    return p.q.head_dim() <= 64 ? run.template operator()<Wide<Element, Boxes>, OfQueries>()
                                : run.template operator()<Narrow<Element, Boxes>, OfQueries>();
  });
}

// Judges a problem whose forward is `p`. A head must fill the panels of its tiles, as the next one begins in the same
// dimension of the tensor map, whose steps are at most 8.
template <class Problem>
Status check_problem(const char* op, const Problem& problem, const NeighborhoodAttention& p) {
  constexpr int kMaxStep = 8;
  Status status = sm90::check_problem(op, problem, p.q.dtype);
  if (const std::int64_t dim = p.q.head_dim(); status.ok() && dim != 64 && dim != 128) {
    status = failure("%s: head_dim must be 64 or 128 on the GPU, got %lld", op, static_cast<long long>(dim));
  }
  for (int a = 0; a < kAxes && status.ok(); ++a) {
    if (min_of(p.axes[a].dilation, p.axes[a].length) > kMaxStep) {
      status = failure("%s: dilation must be at most %d on the GPU, got %d", op, kMaxStep, p.axes[a].dilation);
    }
  }
  return status;
}

}  // namespace

Status neighborhood_attention(const NeighborhoodAttention& p, Stream stream) {
  constexpr const char* kOp = "neighborhood_attention";
  if (const Status status = check_problem(kOp, p, p); !status.ok()) {
    return status;
  }
  return with_boxes(p, [&]<class Element, class Boxes>() {
    using Variant = Wide<Element, Boxes>;
    return softmax_forward<Variant>(kOp, p, Variant::schedule_of(p), stream);
  });
}

Status neighborhood_attention_backward(const NeighborhoodAttentionBackward& problem, Stream stream) {
  constexpr const char* kOp = "neighborhood_attention_backward";
  const NeighborhoodAttention& p = problem.forward;
  if (const Status status = check_problem(kOp, problem, p); !status.ok()) {
    return status;
  }
  return with_gradients(p, [&]<class OfKeys, class OfQueries>() {
    return sm90::run_backward(kOp, softmax_gradients<OfKeys>(problem, p, OfKeys::schedule_of(p)),
                              softmax_gradients<OfQueries>(problem, p, OfQueries::schedule_of(p)), stream);
  });
}

std::size_t neighborhood_attention_backward_workspace(const NeighborhoodAttentionBackward& problem, Stream) {
  const NeighborhoodAttention& p = problem.forward;
  return with_gradients(p, [&]<class OfKeys, class OfQueries>() {
    return sm90::backward_workspace<OfKeys, OfQueries>(problem, OfKeys::schedule_of(p), OfQueries::schedule_of(p));
  });
}

}  // namespace fastattn

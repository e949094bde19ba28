// Host side: a backward, described to the kernels of its way and launched. One function for every op.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "fastattn/fastattn.hpp"
#include "sm90/backward.cuh"
#include "sm90/key_gradients.cuh"
#include "sm90/key_sums.hpp"
#include "sm90/launch.cuh"
#include "sm90/query_gradients.cuh"
#include "sm90/run.cuh"
#include "sm90/wide_key_gradients.cuh"
#include "sm90/work_order.hpp"

namespace fastattn::sm90 {

template <class Variant>
struct BackwardProblem {
  TensorView q, k, v, dout;
  TensorView dq, dk, dv;  // without data: not wanted
  TensorView out = {};    // these three only for a score with row statistics
  const float *lse = nullptr, *dlse = nullptr;
  typename Variant::Schedule schedule;
  typename Variant::Score score;
  typename Variant::Modifier modifier = {};
  float scale;
  float *dbias = nullptr, *dkey_bias = nullptr;
  bool deterministic = false;
  void* workspace;
};

// The tiles of the backward's kernels, by head_dim: of all gradients at once, of dK and dV, and of dQ.
struct GradientTiles {
  static constexpr Config kGradients[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                          {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2}};
  static constexpr const auto& kKeyGradients = kGradients;
  static constexpr Config kQueryGradients[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2}};
};

// The same for rows of up to 256 elements.
struct WideGradientTiles : GradientTiles {
  static constexpr Config kKeyGradients[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                             {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2},
                                             {.head_dim = 256, .tile = {64, 64}, .stages = 2, .warpgroups = 2}};
  static constexpr Config kQueryGradients[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 256, .tile = {128, 64}, .stages = 2, .warpgroups = 2}};
};

// Those of scores and masks that take registers, in two kernels always.
struct NarrowGradientTiles {
  static constexpr Config kKeyGradients[] = {{.head_dim = 64, .tile = {64, 128}, .stages = 2, .warpgroups = 2},
                                             {.head_dim = 128, .tile = {64, 128}, .stages = 2, .warpgroups = 2},
                                             {.head_dim = 256, .tile = {64, 64}, .stages = 2, .warpgroups = 2}};
  static constexpr Config kQueryGradients[] = {{.head_dim = 64, .tile = {128, 64}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 128, .tile = {128, 64}, .stages = 2, .warpgroups = 2},
                                               {.head_dim = 256, .tile = {128, 32}, .stages = 2, .warpgroups = 2}};
};

// The parts of a backward kernel's workspace, and its size in bytes.
template <class Kernel, class Schedules>
std::size_t plan_workspace(const TensorView& q, const Schedules& schedules, void* base, BackwardWorkspace& workspace) {
  const std::int64_t rows = q.batch() * q.heads() * num_q_tiles(schedules, Kernel::kTile) * Kernel::kTile.q;
  const std::int64_t sums = Kernel::kSumsQueries ? rows * Kernel::kHeadDim : 0;
  const std::int64_t lse2 = Kernel::Score::kRowStatistics ? rows : 0;
  const std::int64_t delta = Kernel::Score::kRowStatistics || Kernel::kSumsBias ? rows : 0;
  const std::int64_t turns = Kernel::kInTurns ? rows / Kernel::kTile.q : 0;
  constexpr std::int64_t kTaken = kTakenBytes / sizeof(float);
  float* const floats = static_cast<float*>(base) + kTaken;
  workspace = {static_cast<int*>(base), floats + sums, floats + sums + lse2, Kernel::kSumsQueries ? floats : nullptr,
               Kernel::kInTurns ? reinterpret_cast<int*>(floats + sums + lse2 + delta) : nullptr};
  return (kTaken + sums + lse2 + delta + turns) * sizeof(float);
}

// lse2, delta and zeros where sums of dQ will be.
template <class Kernel, class Variant>
Status prepare(const BackwardProblem<Variant>& problem, const typename Kernel::Params& params, Stream stream) {
  using Schedules = typename Variant::Schedule;
  const std::int64_t heads = problem.q.batch() * params.heads;
  if constexpr (Kernel::Score::kRowStatistics) {
    const int blocks_of_head = ceil_div(params.q_tiles * Kernel::kTile.q, kRowsOfBlock<Kernel>);
    const PrepareParams<Schedules> prepare{problem.out,      problem.dout,     problem.lse,    problem.dlse,
                                           params.workspace, problem.schedule, params.q_tiles, blocks_of_head};
    return launch(prepare_kernel<Kernel, Schedules>, heads * blocks_of_head, kHelperThreads, 0, stream, prepare);
  } else {
    const std::int64_t rows = params.workspace.dq == nullptr ? 0 : heads * params.q_tiles * Kernel::kTile.q;
    return clear(params.workspace.taken, kTakenBytes + rows * Kernel::kHeadDim * sizeof(float), stream);
  }
}

// Which works the tiles are, `tiles` of a head, in which order, and which dK and dV are sums where dQ will be.
template <class Kernel, bool kOwnsKeys, class Variant>
void plan_works(const BackwardProblem<Variant>& problem, int tiles, typename Kernel::Params& params) {
  const int multiprocessors = num_multiprocessors();
  const std::int64_t key_tiles = problem.k.batch() * problem.k.heads() * tiles;
  const auto has_room = [&](std::int64_t summed) {
    return has_room_for_keys(problem.dq, summed, Kernel::kTile.k, Kernel::kHeadDim);
  };
  const bool divided = kOwnsKeys && Kernel::kMaySumKeys && has_room(key_tiles) &&
                       divides_groups(problem.q, problem.k, tiles, Kernel::kHeadDim, multiprocessors);
  params.head_works = kOwnsKeys && !divided ? static_cast<int>(problem.k.heads()) : params.heads;
  params.heads_per_work = params.heads / max_of(params.head_works, 1);
  const std::int64_t heads = problem.q.batch() * params.head_works;
  // Bytes that all tiles of a head stream: of Q and dO, or of K and V.
  const std::int64_t streamed = (kOwnsKeys ? problem.q.seq() : problem.k.seq()) * Kernel::kHeadDim * 4;
  params.order = Kernel::kInTurns ? order_in_turns(heads, tiles, multiprocessors)
                                  : work_order(heads, tiles, multiprocessors, streamed, 1);
  if constexpr (Kernel::kSharesWorks) {
    if (!divided) {
      int steps = 0;  // of the last key tile
      auto cursor = problem.schedule.at(0, 0).transposed().runs(tiles - 1, Kernel::kTransposed);
      for (TileRun run; cursor.next(run);) {
        steps += run.count * params.heads_per_work;
      }
      if (const WorkOrder shared = share_last(params.order, multiprocessors, steps); has_room(shared.shared)) {
        params.order = shared;
      }
    }
  }
  if constexpr (Kernel::kMaySumKeys) {
    params.key_sums.tiles = divided ? static_cast<int>(key_tiles) : params.order.shared;
    params.key_sums.works_of_group = divided ? params.heads_per_kv_head : 1;
    params.key_sums.data = params.key_sums.tiles > 0 ? static_cast<float*>(problem.dq.data) : nullptr;
  }
}

// Are slots tokens in their order, whatever the tiles are? Two kernels then share what is prepared for one of them.
template <class Schedules>
inline constexpr bool kSlotsAreTokens = std::is_same_v<OriginOf<Schedules>, int>;

// One kernel of the backward, with what comes before and after it. `kOwnsKeys`: of key tiles, else of query tiles.
// `prepared` are the slots of a head whose lse2 and delta lie in the workspace already, 0 if none do.
template <class Kernel, bool kOwnsKeys, class Variant>
Status launch_gradients(const BackwardProblem<Variant>& problem, int& prepared, Stream stream) {
  using Schedules = typename Variant::Schedule;
  constexpr TileShape kTile = Kernel::kTile;
  const auto schedule = problem.schedule.slots();
  typename Kernel::Params params{};
  params.dq = problem.dq;
  params.dk = problem.dk;
  params.dv = problem.dv;
  params.schedule = problem.schedule;
  params.score = problem.score;
  params.scale = problem.scale;
  params.modifier = problem.modifier;
  params.dbias = problem.dbias;
  params.dkey_bias = problem.dkey_bias;
  params.num_keys = static_cast<int>(problem.k.seq());
  params.q_tiles = num_q_tiles(problem.schedule, kTile);
  params.heads = static_cast<int>(problem.q.heads());
  params.heads_per_kv_head = heads_per_kv_head(problem.q, problem.k);
  plan_workspace<Kernel>(problem.q, problem.schedule, problem.workspace, params.workspace);
  const int tiles = kOwnsKeys ? num_k_tiles(problem.schedule, kTile) : params.q_tiles;
  const std::int64_t works = problem.q.batch() * params.heads * std::int64_t{tiles};
  if (works > WorkQueue::kMostWorks) {
    return failure("the problem has %lld tiles of %d tokens, allowed are %lld", static_cast<long long>(works),
                   kOwnsKeys ? kTile.k : kTile.q, static_cast<long long>(WorkQueue::kMostWorks));
  }
  plan_works<Kernel, kOwnsKeys>(problem, tiles, params);
  params.works = {params.order.works(), params.workspace.taken};
  MapEncoder encode;
  encode(problem.q, schedule.query_box(kTile), params.q, Kernel::QueryTile::kRowBytes);
  encode(problem.dout, schedule.query_box(kTile), params.dout, Kernel::QueryTile::kRowBytes);
  encode(problem.k, schedule.key_box(kTile), params.k, Kernel::KeyTile::kRowBytes);
  encode(problem.v, schedule.key_box(kTile), params.v, Kernel::KeyTile::kRowBytes);

  Status status = encode.status;
  if (const int slots = params.q_tiles * kTile.q; status.ok() && slots != prepared) {
    status = prepare<Kernel>(problem, params, stream);
    prepared = kSlotsAreTokens<Schedules> ? slots : 0;
  }
  if (status.ok() && Kernel::kStays && params.q_tiles == 0) {  // no row was prepared, and the counter was not
    status = clear(params.workspace.taken, sizeof(int), stream);
  }
  const std::int64_t key_pieces =
      2 * params.key_sums.tiles * (kTile.k / kPiece) * (Kernel::kHeadDim / kPiece);  // of dK and dV
  if (status.ok() && key_pieces > 0) {
    status = clear(params.key_sums.data, key_pieces * kPiece * kPiece * sizeof(float), stream);
  }
  if (status.ok() && Kernel::kInTurns) {
    status = clear(params.workspace.turns, problem.q.batch() * params.heads * params.q_tiles * sizeof(int), stream);
  }
  if (status.ok() && Kernel::kSumsQueries && problem.dbias != nullptr) {
    status = clear(problem.dbias, params.heads * sizeof(float), stream);
  }
  if (kOwnsKeys && status.ok() && problem.dkey_bias != nullptr) {
    status = clear(problem.dkey_bias, problem.q.batch() * params.heads * problem.k.seq() * sizeof(float), stream);
  }
  if (status.ok()) {
    const int blocks = Kernel::kStays ? min_of(params.works.count, num_multiprocessors()) : params.works.count;
    status = launch(gradient_kernel<Kernel>, blocks, (Kernel::kWarpgroups + 1) * kWarpgroupThreads,
                    sizeof(typename Kernel::Shared), stream, params);
  }
  if constexpr (Kernel::kSumsBias) {
    if (status.ok() && problem.dbias != nullptr) {
      const BiasParams bias{problem.dbias, params.workspace.delta, static_cast<int>(problem.q.batch()), params.heads,
                            params.q_tiles * kTile.q};
      status = launch(sum_bias_kernel<kHelperThreads>, params.heads, kHelperThreads, 0, stream, bias);
    }
  }
  if constexpr (Kernel::kSumsQueries) {
    if constexpr (Kernel::kMaySumKeys) {
      if (status.ok()) {  // before dQ, which takes their place
        status = launch(finish_keys_kernel<Kernel>, key_pieces, kWarpgroupThreads, 0, stream, params);
      }
    }
    if (status.ok()) {
      status = launch(finish_kernel<Kernel>, problem.q.batch() * params.heads * params.q_tiles * Kernel::kWarpgroups,
                      kWarpgroupThreads, 0, stream, params);
    }
  }
  return status;
}

// The kernels of a variant's gradients, for one of its configurations.
template <class Variant, int kIndex>
using AllGradientsKernel = KeyGradientKernel<Variant, Variant::kGradients[kIndex], QuerySums::kInAnyOrder>;
template <class Variant, int kIndex>
using AllGradientsWithBiasKernel =
    KeyGradientKernel<Variant, Variant::kGradientsWithBias[kIndex], QuerySums::kInAnyOrder>;
template <class Variant, int kIndex>
using AllGradientsInTurnsKernel = KeyGradientKernel<Variant, Variant::kGradients[kIndex], QuerySums::kInTurns>;
template <class Variant, int kIndex>
using KeyGradientsKernel =
    std::conditional_t<(Variant::kKeyGradients[kIndex].head_dim > 128),
                       WideKeyGradientKernel<Variant, Variant::kKeyGradients[kIndex]>,
                       KeyGradientKernel<Variant, Variant::kKeyGradients[kIndex], QuerySums::kNone>>;
template <class Variant, int kIndex>
using QueryGradientsKernel = QueryGradientKernel<Variant, Variant::kQueryGradients[kIndex]>;

// The longest rows that a list of configurations is for.
template <const auto& kConfigs>
constexpr int max_head_dim() {
  return kConfigs[std::size(kConfigs) - 1].head_dim;
}

// The width of tiles that hold rows of queries, keys and values.
inline std::int64_t row_width(const TensorView& q, const TensorView& v) { return max_of(q.head_dim(), v.head_dim()); }

// How a problem's gradients are computed.
enum class Way { kAtOnce, kAtOnceWithBias, kAtOnceInTurns, kByTwoKernels };

template <class Variant>
inline constexpr bool kCanBeAtOnce = requires { Variant::kGradients; };
template <class Variant>
inline constexpr bool kCanBeInTurns = kCanBeAtOnce<Variant> && kTellsLastKeyTile<typename Variant::Schedule>;

// Is the gradient of a score's bias wanted? It is summed in no certain order where key tiles take turns, too.
template <class Problem>
bool wants_bias_gradient(const Problem& problem) {
  if constexpr (requires { problem.dbias; }) {
    return problem.dbias != nullptr;
  } else {
    return false;
  }
}

// The way for all gradients but a bias's. Two kernels have two products more, but no sums of dQ, which are zeroed,
// added to and read again: that takes longer where there are many sequences of few keys. In turns the last works end
// later, by about the time of one, which is much of the whole where there are few (H200, attention.md).
template <class Variant>
Way way_of_all(const TensorView& k, std::int64_t width, bool deterministic) {
  constexpr std::int64_t kFewestWorks = 5, kFewKeys = 256, kFewKeysInTurns = 512;
  const std::int64_t keys = k.seq();
  const std::int64_t works = k.batch() * k.heads() * ceil_div<std::int64_t>(keys, Variant::kGradients[0].tile.k);
  const bool many = works >= kFewestWorks * num_multiprocessors();
  if (deterministic) {
    return kCanBeInTurns<Variant> && many && keys > kFewKeysInTurns ? Way::kAtOnceInTurns : Way::kByTwoKernels;
  }
  const bool few = keys <= kFewKeys && width > 64 && kSlotsAreTokens<typename Variant::Schedule>;
  return many && few ? Way::kByTwoKernels : Way::kAtOnce;
}

// The way for `problem`, of `k`, whose rows are `width` long.
template <class Variant, class Problem>
Way way_of(const Problem& problem, const TensorView& k, std::int64_t width) {
  if constexpr (kCanBeAtOnce<Variant>) {
    if (problem.dq.data != nullptr && problem.dk.data != nullptr && problem.dv.data != nullptr &&
        width <= max_head_dim<Variant::kGradients>()) {
      if (!wants_bias_gradient(problem)) {
        return way_of_all<Variant>(k, width, problem.deterministic);
      }
      return problem.deterministic ? Way::kByTwoKernels : Way::kAtOnceWithBias;
    }
  }
  return Way::kByTwoKernels;
}

// Calls run.operator()<Kernel>() with the kernel for one of the first three ways.
template <class Variant, class Run>
Status with_kernel_at_once(const char* op, Way way, std::int64_t width, Run&& run) {
  if constexpr (Variant::Score::kBiasGradient) {
    if (way == Way::kAtOnceWithBias) {
      return dispatch<Variant::kGradientsWithBias>(op, width, [&]<int kIndex>() {
        static_assert(AllGradientsWithBiasKernel<Variant, kIndex>::kBiasGradient);
        return run.template operator()<AllGradientsWithBiasKernel<Variant, kIndex>>();
      });
    }
  }
  if constexpr (kCanBeAtOnce<Variant>) {
    return dispatch<Variant::kGradients>(op, width, [&]<int kIndex>() {
      if constexpr (kCanBeInTurns<Variant>) {
        if (way == Way::kAtOnceInTurns) {
          return run.template operator()<AllGradientsInTurnsKernel<Variant, kIndex>>();
        }
      }
      return run.template operator()<AllGradientsKernel<Variant, kIndex>>();
    });
  } else {
    return {};
  }
}

template <class Variant>
Status run_query_gradients(const char* op, const BackwardProblem<Variant>& problem, int& prepared, Stream stream) {
  return dispatch<Variant::kQueryGradients>(op, row_width(problem.q, problem.v), [&]<int kIndex>() {
    return launch_gradients<QueryGradientsKernel<Variant, kIndex>, false>(problem, prepared, stream);
  });
}

template <class Variant>
Status run_key_gradients(const char* op, const BackwardProblem<Variant>& problem, int& prepared, Stream stream) {
  return dispatch<Variant::kKeyGradients>(op, row_width(problem.q, problem.v), [&]<int kIndex>() {
    return launch_gradients<KeyGradientsKernel<Variant, kIndex>, true>(problem, prepared, stream);
  });
}

// `of_queries` is the same problem with the schedule for query tiles, where another tiling of a grid suits these.
template <class Variant, class OfQueries = Variant>
Status run_backward(const char* op, const BackwardProblem<Variant>& problem,
                    const BackwardProblem<OfQueries>& of_queries, Stream stream) {
  const std::int64_t width = row_width(problem.q, problem.v);
  int prepared = 0;
  if (const Way way = way_of<Variant>(problem, problem.k, width); way != Way::kByTwoKernels) {
    return with_kernel_at_once<Variant>(
        op, way, width, [&]<class Kernel>() { return launch_gradients<Kernel, true>(problem, prepared, stream); });
  }
  Status status;
  if (problem.dq.data != nullptr || problem.dbias != nullptr) {
    status = run_query_gradients(op, of_queries, prepared, stream);
  }
  if (status.ok() && (problem.dk.data != nullptr || problem.dv.data != nullptr || problem.dkey_bias != nullptr)) {
    status = run_key_gradients(op, problem, prepared, stream);
  }
  return status;
}

template <class Variant>
Status run_backward(const char* op, const BackwardProblem<Variant>& problem, Stream stream) {
  return run_backward(op, problem, problem, stream);
}

// Bytes of workspace for `problem`, an op's; 0 if there is no kernel for it. The schedules are those of run_backward.
template <class Variant, class OfQueries = Variant, class Problem>
std::size_t backward_workspace(const Problem& problem, const typename Variant::Schedule& schedule,
                               const typename OfQueries::Schedule& of_queries) {
  const TensorView& q = forward_of(problem).q;
  const std::int64_t width = row_width(q, forward_of(problem).v);
  std::size_t bytes = 0;
  const auto plan = [&]<class Kernel>(const auto& schedule) {
    BackwardWorkspace workspace;
    bytes = max_of(bytes, plan_workspace<Kernel>(q, schedule, nullptr, workspace));
    return Status{};
  };
  if (const Way way = way_of<Variant>(problem, forward_of(problem).k, width); way != Way::kByTwoKernels) {
    with_kernel_at_once<Variant>("", way, width,
                                 [&]<class Kernel>() { return plan.template operator()<Kernel>(schedule); });
    return bytes;
  }
  dispatch<OfQueries::kQueryGradients>("", width, [&]<int kIndex>() {
    return plan.template operator()<QueryGradientsKernel<OfQueries, kIndex>>(of_queries);
  });
  dispatch<Variant::kKeyGradients>(
      "", width, [&]<int kIndex>() { return plan.template operator()<KeyGradientsKernel<Variant, kIndex>>(schedule); });
  return bytes;
}

template <class Variant, class Problem>
std::size_t backward_workspace(const Problem& problem, const typename Variant::Schedule& schedule) {
  return backward_workspace<Variant>(problem, schedule, schedule);
}

}  // namespace fastattn::sm90

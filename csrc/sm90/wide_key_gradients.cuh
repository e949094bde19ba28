// Gradients of keys and values whose rows are too long for one warpgroup to hold both: a thread block owns 64 keys, one
// warpgroup their weights and dV, the other their score gradients and dK.
//
//   warpgroup 0   Sᵀ = K Qᵀ → P = weight(S) ──(shared memory)─┐   dV += Pᵀ dO
//   warpgroup 1   dPᵀ = V dOᵀ                                 └→ dS = score_gradient(P, dP) → dK += dSᵀ Q
//
// Both accumulators are 64 × head_dim, and both second products read their left operand from registers. The two work on
// different tiles at a time, so that the products of one run while the other computes weights; and each issues the
// first product of the next tile behind the second of this one, so that the tensor cores need not wait for it (3 to 5 %
// of the time).
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "fastattn/schedule/schedule.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/backward.cuh"
#include "sm90/block.cuh"
#include "sm90/config.hpp"
#include "sm90/key_tile.cuh"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

template <class Variant, Config kConfig_>
struct WideKeyGradientKernel {
  static constexpr bool kSumsQueries = false, kInTurns = false, kMaySumKeys = false, kSharesWorks = false,
                        kStays = false, kSumsBias = false;
  static constexpr Config kConfig = kConfig_;
  static constexpr TileShape kTile = kConfig.tile;
  static constexpr TileShape kTransposed = {kTile.k, kTile.q};
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kWarpgroups = kConfig.warpgroups;
  static_assert(kTile.k == kWarpgroupRows && kWarpgroups == 2);

  static constexpr bool kModified = Variant::Modifier::kExists;

  using Element = typename Variant::Element;
  using Score = typename Variant::Score;
  using Params = BackwardParams<Variant>;
  using Position = RingPosition<kStages>;
  using KeyTile = SharedTile<Element, kTile.k, kHeadDim>;
  using QueryTile = SharedTile<Element, kTile.q, kHeadDim>;

  struct Shared {
    KeyTile k, v;  // at the end: dV, dK
    QueryTile q[kStages], dout[kStages];
    float4 weights[kTile.q / 8][kWarpgroupThreads];  // Pᵀ in the order of the accumulator's registers
    alignas(16) float lse2[kStages][kTile.q], delta[kStages][kTile.q];
    Barrier kv_full;
    Ring<kStages, Announcement> q_ring;  // with lse2
    Ring<kStages> dout_ring;             // with delta
  };

  // Named barriers, beside the ones of the warpgroups' own at the end (1 and 2).
  static constexpr int kWeightsFull = 3, kWeightsEmpty = 4, kThreads = 2 * kWarpgroupThreads;

  static __device__ void run(const Params& params) {
    extern __shared__ std::byte shared_bytes[];
    auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const auto work = key_tile_work<WideKeyGradientKernel>(params, static_cast<int>(blockIdx.x));
    if (!work.exists) {
      return;
    }
    divide_block<kConfig>(
        [&] {
          shared.kv_full.init(1);
          shared.q_ring.init(kWarpgroups);
          shared.dout_ring.init(kWarpgroups);
        },
        [&] { stream_queries(params, shared, work); },
        [&](int warpgroup) {
          if (warpgroup == 0) {
            sum_values(params, shared, work);
          } else {
            sum_keys(params, shared, work);
          }
        });
  }

  // Producer: loads K and V of the tile, then into two rings Q with lse2 and dO with delta of each query tile that sees
  // it.
  static __device__ void stream_queries(const Params& params, Shared& shared, const KeyTileWork& work) {
    constexpr bool kStatistics = Score::kRowStatistics;
    constexpr int kRowBytes = kStatistics ? kTile.q * sizeof(float) : 0;
    const auto place = slots_of(params.schedule, work.sequence);
    const auto key_origin = place.key_origin(work.k_tile, kTile);
    if (cute::elect_one_sync()) {
      shared.kv_full.arrive_and_expect_tx(2 * KeyTile::kBytes);
      params.k.load(shared.k, key_origin, work.kv_head, work.batch, shared.kv_full);
      params.v.load(shared.v, key_origin, work.kv_head, work.batch, shared.kv_full);
    }
    Position at;
    announce([&](auto&& report) { visit_queries<WideKeyGradientKernel>(params, work, report); },
             [&](Announcement run) {
               if (run.count == 0) {
                 shared.q_ring.fill(at, 0, run, [](Barrier&) {});
               }
               for (int q_tile = run.first; q_tile < run.first + run.count; ++q_tile) {
                 const std::int64_t tile = first_tile_of<WideKeyGradientKernel>(params, work, run.head) + q_tile;
                 const auto origin = place.query_origin(q_tile, kTile);
                 shared.q_ring.fill(at, QueryTile::kBytes + kRowBytes, run, [&](Barrier& full) {
                   params.q.load(shared.q[at.stage], origin, run.head, work.batch, full);
                   if constexpr (kStatistics) {
                     load_bytes(shared.lse2[at.stage], params.workspace.lse2 + tile * kTile.q, kRowBytes, full);
                   }
                 });
                 shared.dout_ring.fill(at, QueryTile::kBytes + kRowBytes, {}, [&](Barrier& full) {
                   params.dout.load(shared.dout[at.stage], origin, run.head, work.batch, full);
                   if constexpr (kStatistics) {
                     load_bytes(shared.delta[at.stage], params.workspace.delta + tile * kTile.q, kRowBytes, full);
                   }
                 });
                 at.advance();
               }
             });
  }

  // In the producer's order: issue(position), the first product, for the first tile; then begin(run) for each run and
  // step(q_tile, coverage, cells, run, position, is_last) for each of its tiles.
  template <class Begin, class Issue, class Step>
  static __device__ void for_each_query_tile(Shared& shared, Begin&& begin, Issue&& issue, Step&& step) {
    Position position;
    wait_for(shared.kv_full, 0);
    Announcement run = shared.q_ring.next(position);
    if (run.count > 0) {
      issue(position);
    }
    do {
      run = shared.q_ring.next(position);
      begin(run);
      for_each_tile(run, [&](int q_tile, auto coverage, std::uint16_t cells) {
        step(q_tile, coverage, cells, run, position, run.last && q_tile == run.first + run.count - 1);
        position.advance();
      });
    } while (!run.last);
  }

  // The first product of the tile at `at`, once it is there. Where there is none, of whatever lies there; nothing reads
  // it.
  template <class QueryRing>
  static __device__ void issue_first(QueryRing& ring, const KeyTile& keys, const QueryTile (&queries)[kStages],
                                     Position at, bool exists, float (&product)[kTile.q / 2]) {
    if (exists) {
      ring.wait(at);
    }
    wgmma::pin(product);
    wgmma::fence();
    wgmma::multiply<Element, kHeadDim>(keys.k_major(), queries[at.stage].k_major(), product, false);
    wgmma::commit();
  }

  static __device__ void sum_values(const Params& params, Shared& shared, KeyTileWork work) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
    float dv[kHeadDim / 2] = {}, scores[kTile.q / 2];
    const auto issue = [&](Position at, bool exists = true) {
      issue_first(shared.q_ring, shared.k, shared.q, at, exists, scores);
    };
    Score score = params.score;
    KeyBiasRows rows;
    int head = -1;
    const auto begin = [&](const Announcement& run) {
      score = params.score.at(run.head);
      if constexpr (kModified) {
        if (run.head != head) {
          head = run.head;
          rows.begin(params, work, head, work.k_tile * kTile.k, at);
        }
      }
    };
    const auto step = [&](int q_tile, auto coverage, std::uint16_t cells, const Announcement& run, Position position,
                          bool is_last) {
      const int stage = position.stage;
      std::uint32_t operand[kTile.q / 4];
      constexpr bool kPartial = coverage() == Coverage::kPartial;
      KeptBits kept;
      if constexpr (kPartial) {
        const auto transposed = params.schedule.at(work.sequence, run.head).transposed();
        kept = kept_bits(transposed.tile_mask(work.k_tile, q_tile, kTransposed, cells), 0, at);
      }
      wgmma::wait<0>();
      wgmma::pin(scores);
      weigh(score, params.modifier, rows.bias_log2, shared.lse2[stage], at, scores);
      shared.q_ring.release(position);
      if constexpr (kPartial) {
        kept.apply(scores, 0.f);
      }
      cutlass::arch::NamedBarrier::sync(kThreads, kWeightsEmpty);
#pragma unroll
      for (int j = 0; j < kTile.q / 8; ++j) {
        shared.weights[j][thread] = {scores[4 * j], scores[4 * j + 1], scores[4 * j + 2], scores[4 * j + 3]};
      }
      arrive_at(kThreads, kWeightsFull);
      pack<Element>(scores, operand);
      shared.dout_ring.wait(position);
      wgmma::pin(dv);
      wgmma::pin(operand);
      wgmma::fence();
      wgmma::multiply<Element, Element>(operand, shared.dout[stage].mn_major(), dv, true);
      wgmma::commit();
      issue(position.next(), !is_last);
      wgmma::wait<1>();
      wgmma::pin(dv);
      wgmma::pin(operand);
      shared.dout_ring.release(position);
    };
    for_each_query_tile(shared, begin, issue, step);
    wgmma::wait<0>();
    wgmma::pin(scores);
    cutlass::arch::NamedBarrier::sync(kThreads, kWeightsEmpty);
    store_key_gradient<Element>(params, work, params.dv, dv, 1.f, shared.k, 0, 1);
  }

  static __device__ void sum_keys(const Params& params, Shared& shared, KeyTileWork work) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
    float dk[kHeadDim / 2] = {}, dscores[kTile.q / 2];
    const auto issue = [&](Position at, bool exists = true) {
      issue_first(shared.dout_ring, shared.v, shared.dout, at, exists, dscores);
    };
    Score score = params.score;
    KeyBiasRows rows;
    int head = -1;
    const auto begin = [&](const Announcement& run) {
      score = params.score.at(run.head);
      if constexpr (kModified) {
        rows.move_to(run, head, params, work, work.k_tile * kTile.k, at);
      }
    };
    const auto step = [&](int, auto coverage, std::uint16_t, const Announcement&, Position position, bool is_last) {
      const int stage = position.stage;
      float weights[kTile.q / 2];
      std::uint32_t operand[kTile.q / 4];
      wgmma::wait<0>();
      wgmma::pin(dscores);
      cutlass::arch::NamedBarrier::sync(kThreads, kWeightsFull);
#pragma unroll
      for (int j = 0; j < kTile.q / 8; ++j) {
        reinterpret_cast<float4&>(weights[4 * j]) = shared.weights[j][thread];
        const float2 delta = row_statistics<Score>(shared.delta[stage], at.column(j));
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) {
          dscores[i] = score.score_gradient(weights[i], dscores[i], i % 2 == 0 ? delta.x : delta.y);
          if constexpr (coverage() == Coverage::kPartial || kModified) {  // 0 · ∞ is not 0
            dscores[i] = weights[i] == 0.f ? 0.f : dscores[i];
          }
        }
      }
      if constexpr (kModified) {
        shared.q_ring.wait(position);
        rows.modify(params.modifier, shared.lse2[stage], at, weights, dscores);
      }
      arrive_at(kThreads, kWeightsEmpty);
      shared.dout_ring.release(position);
      pack<Element>(dscores, operand);
      shared.q_ring.wait(position);
      wgmma::pin(dk);
      wgmma::pin(operand);
      wgmma::fence();
      wgmma::multiply<Element, Element>(operand, shared.q[stage].mn_major(), dk, true);
      wgmma::commit();
      issue(position.next(), !is_last);
      wgmma::wait<1>();
      wgmma::pin(dk);
      wgmma::pin(operand);
      shared.q_ring.release(position);
    };
    arrive_at(kThreads, kWeightsEmpty);
    for_each_query_tile(shared, begin, issue, step);
    wgmma::wait<0>();
    wgmma::pin(dscores);
    if constexpr (kModified) {
      rows.end(params, work, head, work.k_tile * kTile.k, at);
    }
    store_key_gradient<Element>(params, work, params.dk, dk, params.scale, shared.v, 0, 2);
  }
};

}  // namespace fastattn::sm90

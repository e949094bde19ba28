// Gradients of queries: a thread block owns a query tile, each of its warpgroups 64 queries. Q and dO stay in shared
// memory, dQ in registers, while the block walks the key tiles that the schedule shows it:
//
//   S = Q Kᵀ, dP = dO Vᵀ → P = weight(S), dS = score_gradient(P, dP) → dQ += dS K
//
// S, dP and dS have queries for rows, so that dS is the last product's left operand as it lies in registers.
#pragma once

#include <cstdint>

#include "fastattn/schedule/schedule.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/backward.cuh"
#include "sm90/block.cuh"
#include "sm90/config.hpp"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

template <class Variant, Config kConfig_>
struct QueryGradientKernel {
  static constexpr bool kSumsQueries = false, kInTurns = false, kMaySumKeys = false, kSharesWorks = false,
                        kStays = false, kSumsBias = Variant::Score::kBiasGradient;
  static constexpr Config kConfig = kConfig_;
  static constexpr TileShape kTile = kConfig.tile;
  static constexpr int kHeadDim = kConfig.head_dim;
  // V is done with before K, and where there is no room for two stages of both, one is enough for it.
  static constexpr int kStages = kConfig.stages, kValueStages = kHeadDim > 128 ? 1 : kStages;
  static constexpr int kWarpgroups = kConfig.warpgroups;
  static_assert(kTile.q == kWarpgroups * kWarpgroupRows);

  static constexpr bool kModified = Variant::Modifier::kExists;
  // Warpgroups take turns at issuing S and dP, or dQ: the better of the two for each head_dim (attention.md).
  static constexpr bool kTurnsAtScores = kHeadDim == 128;

  using Element = typename Variant::Element;
  using Score = typename Variant::Score;
  using Params = BackwardParams<Variant>;
  using KeyTile = SharedTile<Element, kTile.k, kHeadDim>;
  using QueryTile = SharedTile<Element, kTile.q, kHeadDim>;

  struct Shared {
    QueryTile q, dout;  // at the end q: dQ
    KeyTile k[kStages], v[kValueStages];
    Barrier q_full;
    Ring<kStages, Announcement> k_ring;
    Ring<kValueStages> v_ring;
  };

  struct Work {
    int tile;  // among all of the head in this batch entry
    int q_tile, head, sequence, batch;

    __device__ explicit Work(const Params& params) {
      const WorkOrder::Place place = params.order.at(static_cast<int>(blockIdx.x));
      tile = params.order.tiles - 1 - place.rank;
      head = place.head % params.heads;
      const SequenceTile at = sequence_tile(params.schedule, place.head / params.heads, tile, kTile);
      q_tile = at.q_tile;
      sequence = at.sequence;
      batch = batch_of(params.schedule, sequence);
    }
  };

  static __device__ void run(const Params& params) {
    extern __shared__ std::byte shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const Work work(params);
    if (work.q_tile * kTile.q >= slots_of(params.schedule, work.sequence).num_q) {
      return;
    }
    divide_block<kConfig>(
        [&] {
          shared.q_full.init(1);
          shared.k_ring.init(kWarpgroups);
          shared.v_ring.init(kWarpgroups);
        },
        [&] { produce(params, shared, work); }, [&](int warpgroup) { consume(params, shared, work, warpgroup); });
  }

  static __device__ void produce(const Params& params, Shared& shared, Work work) {
    const auto schedule = params.schedule.at(work.sequence, work.head);
    const int kv_head = work.head / params.heads_per_kv_head;
    const auto query_origin = schedule.query_origin(work.q_tile, kTile);
    if (cute::elect_one_sync()) {
      shared.q_full.arrive_and_expect_tx(2 * QueryTile::kBytes);
      params.q.load(shared.q, query_origin, work.head, work.batch, shared.q_full);
      params.dout.load(shared.dout, query_origin, work.head, work.batch, shared.q_full);
    }
    RingPosition<kStages> k_at;
    RingPosition<kValueStages> v_at;
    announce(
        [&](auto&& report) {
          auto cursor = schedule.runs(work.q_tile, kTile);
          for (TileRun run; cursor.next(run);) {
            report(work.head, run);
          }
        },
        [&](Announcement run) {
          if (run.count == 0) {
            shared.k_ring.fill(k_at, 0, run, [](Barrier&) {});
          }
          for (int k_tile = run.first; k_tile < run.first + run.count; ++k_tile) {
            const auto origin = schedule.key_origin(k_tile, kTile);
            shared.k_ring.fill(k_at, KeyTile::kBytes, run, [&](Barrier& full) {
              params.k.load(shared.k[k_at.stage], origin, kv_head, work.batch, full);
            });
            shared.v_ring.fill(v_at, KeyTile::kBytes, {}, [&](Barrier& full) {
              params.v.load(shared.v[v_at.stage], origin, kv_head, work.batch, full);
            });
            k_at.advance();
            v_at.advance();
          }
        });
  }

  static __device__ void consume(const Params& params, Shared& shared, Work work, int warpgroup) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
    const int first_row = warpgroup * kWarpgroupRows;
    const Score score = params.score.at(work.head);
    const std::int64_t tile = (std::int64_t{work.batch} * params.heads + work.head) * params.q_tiles + work.tile;
    const std::int64_t first_slot = tile * kTile.q + first_row;
    float lse2[2] = {}, delta[2] = {};
    if constexpr (Score::kRowStatistics) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        lse2[h] = params.workspace.lse2[first_slot + at.row(h)];
        delta[h] = params.workspace.delta[first_slot + at.row(h)];
      }
    }
    float dq[kHeadDim / 2] = {};
    [[maybe_unused]] float dbias[2] = {};  // this thread's share of its rows'
    std::uint32_t seen = 0;                // bit h: does this thread's row h keep a score?
    RingPosition<kStages> k_at;
    RingPosition<kValueStages> v_at;

    const WarpgroupTurns<kWarpgroups, 1 + kWarpgroups> turns(warpgroup);

    // The term of the key in whose column register i of the scores is.
    const auto bias_of = [&](int k_tile, int i) {
      if constexpr (kModified) {
        const int key = min_of(k_tile * kTile.k + at.column(i / 4) + i % 2, params.num_keys - 1);
        return params.modifier.bias_log2(work.batch, work.head, key);
      } else {
        return 0.f;
      }
    };

    const auto step = [&](int k_tile, auto coverage, std::uint16_t cells) {
      float scores[kTile.k / 2], dscores[kTile.k / 2];
      std::uint32_t operand[kTile.k / 4];
      constexpr bool kPartial = coverage() == Coverage::kPartial;
      shared.k_ring.wait(k_at);
      if constexpr (kTurnsAtScores) {
        turns.wait();
      }
      wgmma::pin(scores);
      wgmma::fence();
      wgmma::multiply<Element, kHeadDim>(shared.q.k_major(first_row), shared.k[k_at.stage].k_major(), scores, false);
      wgmma::commit();
      shared.v_ring.wait(v_at);
      wgmma::pin(dscores);
      wgmma::fence();
      wgmma::multiply<Element, kHeadDim>(shared.dout.k_major(first_row), shared.v[v_at.stage].k_major(), dscores,
                                         false);
      wgmma::commit();
      if constexpr (kTurnsAtScores) {
        turns.pass();
      }
      KeptBits kept;
      if constexpr (kPartial) {
        const auto schedule = params.schedule.at(work.sequence, work.head);
        kept = kept_bits(schedule.tile_mask(work.q_tile, k_tile, kTile, cells), first_row, at);
        seen |= std::uint32_t{kept.row[0] != 0} | std::uint32_t{kept.row[1] != 0} << 1;
      } else {
        seen = 3;
      }

      wgmma::wait<1>();
      wgmma::pin(scores);
      apply_to_scores<decltype(score.weight(0.f))>([&](auto&& step) {
#pragma unroll
        for (int i = 0; i < kTile.k / 2; ++i) {
          scores[i] = step(score.weight(lse2[i / 2 % 2]), params.modifier(scores[i], bias_of(k_tile, i)));
        }
      });
      if constexpr (kPartial) {
        kept.apply(scores, 0.f);
      }

      wgmma::wait<0>();
      wgmma::pin(dscores);
      shared.v_ring.release(v_at);
      v_at.advance();
#pragma unroll
      for (int i = 0; i < kTile.k / 2; ++i) {
        dscores[i] = score.score_gradient(scores[i], dscores[i], delta[i / 2 % 2]);
        if constexpr (kPartial || kModified) {  // 0 · ∞ is not 0
          dscores[i] = scores[i] == 0.f ? 0.f : dscores[i];
        }
        if constexpr (kModified) {
          if (scores[i] != 0.f) {
            dscores[i] *= params.modifier.slope(scores[i], lse2[i / 2 % 2], bias_of(k_tile, i));
          }
        }
      }
      if constexpr (Score::kBiasGradient) {
#pragma unroll
        for (int i = 0; i < kTile.k / 2; ++i) {
          dbias[i / 2 % 2] += dscores[i];
        }
      }
      pack<Element>(dscores, operand);
      if constexpr (!kTurnsAtScores) {
        turns.wait();
      }
      wgmma::pin(dq);
      wgmma::pin(operand);
      wgmma::fence();
      wgmma::multiply<Element, Element>(operand, shared.k[k_at.stage].mn_major(), dq, true);
      wgmma::commit();
      if constexpr (!kTurnsAtScores) {
        turns.pass();
      }
      wgmma::wait<0>();
      wgmma::pin(dq);
      wgmma::pin(operand);
      shared.k_ring.release(k_at);
      k_at.advance();
    };
    wait_for(shared.q_full, 0);
    Announcement run;
    do {
      run = shared.k_ring.next(k_at);
      for_each_tile(run, step);
    } while (!run.last);
    turns.finish();

    if constexpr (Score::kBiasGradient) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_over_row(dbias[h]);
        if (at.first_column == 0) {
          params.workspace.delta[first_slot + at.row(h)] = sum;
        }
      }
    }
    if (params.dq.data == nullptr) {
      return;
    }
    // A row that sees nothing has 0: its sums are of 0 times keys, which may be NaN.
    seen |= __shfl_xor_sync(0xffffffffu, seen, 1);
    seen |= __shfl_xor_sync(0xffffffffu, seen, 2);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      dq[i] = (seen >> i / 2 % 2 & 1) != 0 ? dq[i] * params.scale : 0.f;
    }
    const auto slots = slots_of(params.schedule, work.sequence);
    store_rows<Element>(dq, shared.q, first_row, thread, 1 + warpgroup, params.dq, work.batch, work.head, 0,
                        [&](int row) { return slots.query_token(work.q_tile, first_row + row, kTile); });
  }
};

}  // namespace fastattn::sm90

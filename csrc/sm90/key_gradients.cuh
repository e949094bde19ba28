// Gradients of keys and values: a thread block owns a key tile, each of its warpgroups 64 keys. K and V stay in shared
// memory, dK and dV in registers, while the block walks the query tiles that see the tile (the schedule, transposed),
// for every query head that shares the key head. Or several blocks own it, for a head each or a share of the query
// tiles, and their dK and dV are added up in memory:
//
//   Sᵀ = K Qᵀ, dPᵀ = V dOᵀ → P = weight(S), dS = score_gradient(P, dP) → dV += Pᵀ dO, dK += dSᵀ Q (, dQ += dS K)
//
// S and dP are computed transposed because P and dS then lie in registers as the next products want them; only dS also
// goes through shared memory, for dQ (FlashAttention-3, arXiv 2407.08608). dQ is summed over key tiles in fp32 in
// global memory, in the order of the accumulator's registers, so that every reduction is a coalesced 16-byte one.
//
// dQ is that of the tile before: its dS is there, so that the product runs while this tile's P and dS are computed, and
// no warpgroup waits for another. Its reductions come after the fence that publishes this tile's dS, for a fence waits
// for those under way: before it they cost a fifth of the time, after dK 4 % (attention.md).
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

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

template <class Variant, Config kConfig_, QuerySums kQuerySums>
struct KeyGradientKernel {
  static constexpr bool kSumsQueries = kQuerySums != QuerySums::kNone, kSumsBias = false;
  static constexpr bool kInTurns = kQuerySums == QuerySums::kInTurns;
  static constexpr bool kMaySumKeys = kQuerySums == QuerySums::kInAnyOrder;
  static constexpr bool kSharesWorks = kMaySumKeys && kHostKnowsRuns<typename Variant::Schedule>;
  static constexpr Config kConfig = kConfig_;
  static constexpr TileShape kTile = kConfig.tile;
  static constexpr TileShape kTransposed = {kTile.k, kTile.q};
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kWarpgroups = kConfig.warpgroups;
  static constexpr int kRowPieces = kTile.q / kPiece;
  static_assert(kTile.k == kWarpgroups * kWarpgroupRows);
  static_assert(!kSumsQueries || (kRowPieces * (kHeadDim / kPiece) == kWarpgroups && kStages >= 2));

  static constexpr bool kModified = Variant::Modifier::kExists;
  static_assert(!kSumsQueries || !kModified);  // for want of registers

  using Element = typename Variant::Element;
  using Score = typename Variant::Score;
  // Is dQ that of the tile before? A bias's gradient leaves too few registers for that.
  static constexpr bool kTileBehind = kSumsQueries && kConfig.tile_behind;
  static constexpr bool kBiasGradient = kSumsQueries && !kTileBehind && Score::kBiasGradient;
  // Is dS stored before dQ is issued? That takes 4 to 8 % more time, but weights that are not a mere exponential leave
  // no registers for a product meanwhile (C7512: it would be serialised).
  static constexpr bool kStoresFirst = kTileBehind && !Score::kRowStatistics;
  // Warpgroups take turns, from P on, or with long rows, which have fewer weights, from the first product after dS on;
  // until dV is issued, or, from P on, dQ, if that comes before. Where one needs the other's dS of the same tile, turns
  // are vain.
  static constexpr bool kTakesTurns = kTileBehind || !kSumsQueries;
  static constexpr bool kTurnsFromWeights = kTakesTurns && kHeadDim <= 64;
  static constexpr bool kTurnsFromProducts = kTakesTurns && !kTurnsFromWeights;
  static constexpr bool kTurnsUntilQueries = kTurnsFromWeights && kTileBehind;
  using Params = BackwardParams<Variant>;
  using Position = RingPosition<kStages>;
  using KeyTile = SharedTile<Element, kTile.k, kHeadDim>;
  using QueryTile = SharedTile<Element, kTile.q, kHeadDim>;
  using ScoreTile = SharedTile<Element, kTile.k, kTile.q>;  // keys × queries

  struct Shared {
    KeyTile k, v;  // at the end: dK, dV
    QueryTile q[kStages], dout[kStages];
    // Of this tile, of the one before, and of one more, which a warpgroup that is a tile behind may still read.
    std::conditional_t<kSumsQueries, ScoreTile, Nothing> dscores[2 * kStages];
    alignas(16) float lse2[kStages][kTile.q], delta[kStages][kTile.q];
    int sums[2 * kStages];  // which of all query tiles the tile in a slot is; −1: none
    Barrier kv_full, dscores_full[kStages];
    Turns<kStages> turns;
    Ring<kStages, Announcement> q_ring;  // with lse2
    Ring<kStages> dout_ring;             // with delta

    __device__ void init_sums() {
      for (int& tile : sums) {
        tile = -1;
      }
      for (Barrier& full : dscores_full) {
        full.init(kWarpgroups * kWarpgroupWarps * kReleasingLanes);
      }
      turns.init(kWarpgroups);
    }
  };

  static __device__ void run(const Params& params) {
    own_key_tile<KeyGradientKernel>(
        params, [&](Shared& shared, KeyTileWork work, int warpgroup) { consume(params, shared, work, warpgroup); });
  }

  static __device__ void consume(const Params& params, Shared& shared, KeyTileWork work, int warpgroup) {
    constexpr int kConsumers = kWarpgroups * kWarpgroupThreads;
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
    const int shared_row = warpgroup * kWarpgroupRows;
    [[maybe_unused]] const int piece_row = warpgroup % kRowPieces * kPiece,
                               piece_column = warpgroup / kRowPieces * kPiece;

    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
    Position position;

    wait_for(shared.kv_full, 0);
    const WarpgroupTurns<kWarpgroups, 1 + kWarpgroups> turns(warpgroup);
    Announcement run{};
    Score score = params.score;
    [[maybe_unused]] const int first_slot = work.k_tile * kTile.k + shared_row;
    KeyBiasRows rows;
    const auto step = [&](int q_tile, auto coverage, std::uint16_t cells) {
      const int stage = position.stage;
      float scores[kTile.q / 2], dscores[kTile.q / 2];  // transposed: this warpgroup's keys × the tile's queries
      std::uint32_t weights_operand[kTile.q / 4], dscores_operand[kTile.q / 4];
      constexpr bool kPartial = coverage() == Coverage::kPartial;
      KeptBits kept;
      if constexpr (kPartial) {
        const auto transposed = params.schedule.at(work.sequence, run.head).transposed();
        kept = kept_bits(transposed.tile_mask(work.k_tile, q_tile, kTransposed, cells), shared_row, at);
      }

      shared.q_ring.wait(position);
      wgmma::pin(scores);
      wgmma::fence();
      wgmma::multiply<Element, kHeadDim>(shared.k.k_major(shared_row), shared.q[stage].k_major(), scores, false);
      wgmma::commit();
      shared.dout_ring.wait(position);
      wgmma::pin(dscores);
      wgmma::fence();
      wgmma::multiply<Element, kHeadDim>(shared.v.k_major(shared_row), shared.dout[stage].k_major(), dscores, false);
      wgmma::commit();

      wgmma::wait<1>();
      wgmma::pin(scores);
      if constexpr (kTurnsFromWeights) {
        turns.wait();
      }
      weigh(score, params.modifier, rows.bias_log2, shared.lse2[stage], at, scores);
      if constexpr (kPartial) {
        kept.apply(scores, 0.f);
      }

      wgmma::wait<0>();
      wgmma::pin(dscores);
#pragma unroll
      for (int j = 0; j < kTile.q / 8; ++j) {
        const float2 delta = row_statistics<Score>(shared.delta[stage], at.column(j));
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) {
          dscores[i] = score.score_gradient(scores[i], dscores[i], i % 2 == 0 ? delta.x : delta.y);
        }
      }
      if constexpr (kPartial || kModified) {  // a masked score has weight 0, but 0 · ∞ is not 0
#pragma unroll
        for (int i = 0; i < kTile.q / 2; ++i) {
          dscores[i] = scores[i] == 0.f ? 0.f : dscores[i];
        }
      }
      if constexpr (kModified) {
        rows.modify(params.modifier, shared.lse2[stage], at, scores, dscores);
      }
      if constexpr (kBiasGradient) {
        if (params.dbias != nullptr) {
          float share = 0.f;
#pragma unroll
          for (int i = 0; i < kTile.q / 2; ++i) {
            share += dscores[i];
          }
          add_bias_gradient(params.dbias + run.head, share);
        }
      }
      pack<Element>(scores, weights_operand);
      pack<Element>(dscores, dscores_operand);
      if constexpr (kStoresFirst) {
        store_packed(dscores_operand, shared.dscores[position.slot()], shared_row, thread);
      }

      if constexpr (kTurnsFromProducts) {
        turns.wait();
      }
      [[maybe_unused]] float dq[kPiece / 2];
      if constexpr (kTileBehind) {
        multiply_keys(shared, position.before(), piece_row, piece_column, dq);
      }
      if constexpr (kTurnsUntilQueries) {
        turns.pass();
      }
      wgmma::pin(dv);
      wgmma::pin(weights_operand);
      wgmma::fence();
      wgmma::multiply<Element, Element>(weights_operand, shared.dout[stage].mn_major(), dv, true);
      wgmma::commit();
      if constexpr (kTakesTurns && !kTurnsUntilQueries) {
        turns.pass();
      }
      if constexpr (kSumsQueries) {
        if constexpr (!kStoresFirst) {
          store_packed(dscores_operand, shared.dscores[position.slot()], shared_row, thread);
        }
        publish_shared();
      }
      if constexpr (kTileBehind) {
        __syncwarp();
        if (thread % 32 < kReleasingLanes) {
          shared.dscores_full[stage].arrive();
        }
        wgmma::wait<1>();
        wgmma::pin(dq);
        const Position before = position.before();
        add_piece(params, shared, before, shared.sums[before.slot()], warpgroup, thread, dq);
      } else if constexpr (kSumsQueries) {
        cutlass::arch::NamedBarrier::sync(kConsumers, 0);
        multiply_keys(shared, position, piece_row, piece_column, dq);
      }
      wgmma::pin(dk);
      wgmma::pin(dscores_operand);
      wgmma::fence();
      wgmma::multiply<Element, Element>(dscores_operand, shared.q[stage].mn_major(), dk, true);
      wgmma::commit();

      wgmma::wait<1>();
      wgmma::pin(dv);
      wgmma::pin(weights_operand);
      shared.dout_ring.release(position);
      if constexpr (kSumsQueries && !kTileBehind) {
        wgmma::pin(dq);
        const std::int64_t tile = first_tile_of<KeyGradientKernel>(params, work, run.head) + q_tile;
        add_piece(params, shared, position, static_cast<int>(tile), warpgroup, thread, dq);
      }

      wgmma::wait<0>();
      wgmma::pin(dk);
      wgmma::pin(dscores_operand);
      shared.q_ring.release(position);
      position.advance();
    };
    int head = -1;
    do {
      run = shared.q_ring.next(position);
      score = params.score.at(run.head);
      if constexpr (kModified) {
        rows.move_to(run, head, params, work, first_slot, at);
      }
      for_each_tile(run, step);
    } while (!run.last);
    turns.finish();
    if constexpr (kModified) {
      rows.end(params, work, head, first_slot, at);
    }

    // Epilogue: dQ of the last tile; then dK and dV take the place of K and V, once no warpgroup reads them any more,
    // or are added to other blocks'.
    if constexpr (kTileBehind) {
      float dq[kPiece / 2];
      const Position last = position.before();
      multiply_keys(shared, last, piece_row, piece_column, dq);
      wgmma::wait<0>();
      wgmma::pin(dq);
      add_piece(params, shared, last, shared.sums[last.slot()], warpgroup, thread, dq);
    }
    if constexpr (kMaySumKeys) {
      if (params.key_sums.data != nullptr) {
        int block;
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));  // anew, as below
        if (const int tile = params.key_sums.tile_of(params.order, block); tile >= 0) {
          add_key_gradients(params.key_sums, tile, dk, dv);
          return;
        }
      }
    }
    if constexpr (kSumsQueries) {
      cutlass::arch::NamedBarrier::sync(kConsumers, 0);
    }
    store_key_gradient<Element>(params, work, params.dk, dk, params.scale, shared.k, shared_row, 1 + warpgroup);
    store_key_gradient<Element>(params, work, params.dv, dv, 1.f, shared.v, shared_row, 1 + warpgroup);
  }

  // Begins a piece of dQ = dS K of the tile at `at`, which a tile behind waits until all warpgroups have written its
  // dS. Before the first tile this is a product of whatever lies there, which nothing adds.
  static __device__ void multiply_keys(Shared& shared, Position at, int piece_row, int piece_column,
                                       float (&dq)[kPiece / 2]) {
    if constexpr (kTileBehind) {
      wait_for(shared.dscores_full[at.stage], at.parity);
    }
    wgmma::pin(dq);
    wgmma::fence();
    wgmma::multiply<Element, kTile.k>(shared.dscores[at.slot()].mn_major(piece_row), shared.k.mn_major(piece_column),
                                      dq, false);
    wgmma::commit();
  }

  // Adds a 64 × 64 accumulator to its place in global memory; `tile` is which of all query tiles it is of, −1: of none.
  static __device__ void add_piece(const Params& params, Shared& shared, Position at, int tile, int warpgroup,
                                   int thread, const float (&value)[kPiece / 2]) {
    if (tile < 0) {
      return;
    }
    if constexpr (kInTurns) {
      shared.turns.wait(at);
    }
    add_all(params.workspace.dq + (std::int64_t{tile} * kWarpgroups + warpgroup) * (kPiece * kPiece), thread, value);
    if constexpr (kInTurns) {
      shared.turns.pass(at);
    }
  }

  // Adds this warpgroup's 64 rows of dK and dV to what other blocks have for the same tile.
  static __device__ void add_key_gradients(const KeySums& sums, int tile, const float (&dk)[kHeadDim / 2],
                                           const float (&dv)[kHeadDim / 2]) {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));  // anew: among the products no register is left to keep it
    const int thread = index % kWarpgroupThreads, warpgroup = index / kWarpgroupThreads - 1;
    const auto rows_of = [&](std::int64_t tile) {
      return sums.data + (tile * kWarpgroups + warpgroup) * (kWarpgroupRows * kHeadDim);
    };
    add_all(rows_of(tile), thread, dk);
    add_all(rows_of(sums.tiles + tile), thread, dv);
  }

  // Adds accumulators to sums in memory, in the order of their registers: four of a thread at a time.
  template <int kCount>
  static __device__ void add_all(float* sums, int thread, const float (&value)[kCount]) {
    [&]<int... j>(std::integer_sequence<int, j...>) {
      (add_four<j * kWarpgroupThreads * 4>(sums + thread * 4, &value[4 * j]), ...);
    }(std::make_integer_sequence<int, kCount / 4>{});
  }
  template <int kOffset>
  static __device__ void add_four(float* to, const float* value) {
    asm volatile("red.global.add.v4.f32 [%0 + %1], {%2, %3, %4, %5};" ::"l"(to), "n"(kOffset * sizeof(float)),
                 "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3])
                 : "memory");
  }
};

}  // namespace fastattn::sm90

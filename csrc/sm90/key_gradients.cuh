// Gradients of keys and values: a thread block takes one key tile after the other, each of its warpgroups 64 keys. K
// and V stay in shared memory, dK and dV in registers, while the query tiles that see the tile (the schedule,
// transposed) stream past, for every query head that shares the key head. Or several works share a tile, for a head
// each or a share of the query tiles, and their dK and dV are added up in memory:
//
//   Sᵀ = K Qᵀ, dPᵀ = V dOᵀ → P = weight(S), dS = score_gradient(P, dP) → dV += Pᵀ dO, dK += dSᵀ Q (, dQ += dS K)
//
// S and dP are computed transposed because P and dS then lie in registers as the next products want them; only dS also
// goes through shared memory, for dQ (FlashAttention-3, arXiv 2407.08608). dQ is summed over key tiles in fp32 in
// global memory, in the order of the accumulator's registers, so that every reduction is a coalesced 16-byte one.
//
// dQ is that of the tile before: its dS is there, so that the product runs while this tile's P and dS are computed, and
// no warpgroup waits for another; that of a work's last tile is computed in the first step of the next work. Its
// reductions come after the fence that publishes this tile's dS, for a fence waits for those under way: before it they
// cost a fifth of the time, after dK 4 % (attention.md).
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "fastattn/schedule/schedule.hpp"
#include "fastattn/schedule/sequences.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/backward.cuh"
#include "sm90/block.cuh"
#include "sm90/config.hpp"
#include "sm90/key_tile.cuh"
#include "sm90/key_works.cuh"
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
  // What follows from a thread's index is made of it where it is wanted: at the end of a step of a kept copy, before
  // that of the index read anew, where a product is waited for anyway (attention.md). Sequences leave no register for
  // the copy.
  static constexpr bool kKeepsThread = kTileBehind && !std::is_same_v<typename Variant::Schedule, SequenceBands>;
  // Is the lane that hands a stage back elected, for want of a register that says which it is?
  static constexpr bool kElects = kTileBehind && (kHeadDim <= 64 || Variant::Schedule::kInMemory);
  static constexpr bool kStays = true;  // its thread blocks take one work after the other
  // Two tiles of keys, for dQ of a work's last query tile is computed in the first step of the next; of values as many
  // as there is room for; dS of this tile, of the one before, and of one more, which a warpgroup that is a tile behind
  // may still read.
  static constexpr int kKeyStages = 2, kValueStages = kHeadDim <= 64 ? 2 : 1, kScoreSlots = 3;
  using Params = BackwardParams<Variant>;
  using Position = RingPosition<kStages>;
  using KeyTile = SharedTile<Element, kTile.k, kHeadDim>;
  using QueryTile = SharedTile<Element, kTile.q, kHeadDim>;
  using ScoreTile = SharedTile<Element, kTile.k, kTile.q>;  // keys × queries

  struct Shared {
    KeyTile k[kKeyStages], v[kValueStages];  // at the end of a work V's place is dV's, then dK's
    QueryTile q[kStages], dout[kStages];
    std::conditional_t<kSumsQueries, ScoreTile, Nothing> dscores[kScoreSlots];
    alignas(16) float lse2[kStages][kTile.q], delta[kStages][kTile.q];
    int sums[2 * kStages];  // which of all query tiles the tile in a slot is; −1: none
    Barrier k_free[kKeyStages], v_free[kValueStages], dscores_full[kStages];
    TakenWorks<kStages> works;
    Turns<kStages> turns;
    Ring<kStages, Announcement> q_ring;  // with lse2
    Ring<kStages> dout_ring;             // with delta

    __device__ void init() {
      works.count = 0;
      q_ring.init(kWarpgroups);
      dout_ring.init(kWarpgroups);
      for (Barrier& free : k_free) {
        free.init(releases(kWarpgroups));
      }
      for (Barrier& free : v_free) {
        free.init(releases(kWarpgroups));
      }
      if constexpr (kSumsQueries) {
        for (int& tile : sums) {
          tile = -1;
        }
        for (Barrier& full : dscores_full) {
          full.init(releases(kWarpgroups));
        }
        turns.init(kWarpgroups);
      }
    }
  };

  static __device__ void run(const Params& params) {
    auto& shared = shared_memory<Shared>();
    divide_block<kConfig>([&] { shared.init(); }, [&] { stream_works<KeyGradientKernel>(params, shared); },
                          [&](int warpgroup) { consume(params, shared, warpgroup); },
                          [&] {
                            if constexpr (kInTurns) {
                              take_turns<KeyGradientKernel>(params, shared);
                            }
                          });
  }

  // Where a consumer is, from one work to the next.
  struct Place {
    Position queries;
    RingPosition<kKeyStages> keys;
    RingPosition<kValueStages> values;
    int dscores = 0, dscores_before = kScoreSlots - 1;  // the slots of this tile's and of the one before
    int keys_behind = 0;                                // the stage of the keys for dQ of the tile before
  };

  static __device__ void consume(const Params& params, Shared& shared, int warpgroup) {
    const WarpgroupTurns<kWarpgroups, 1 + kWarpgroups> turns(warpgroup);
    Place place;
    // From the exchange the compiler learns that a warp stays together, and keeps its uniform values in uniform
    // registers.
    for (int index = 0; __shfl_sync(0xffffffffu, shared.q_ring.next(place.queries).head, 0) >= 0; ++index) {
      sum_gradients(params, shared, shared.works[index], warpgroup, turns, place);
    }
    turns.finish();
    if constexpr (kTileBehind) {
      float dq[kPiece / 2];
      multiply_keys(shared, place.queries.before(), place.dscores_before, shared.k[place.keys_behind], warpgroup, dq);
      wgmma::wait<0>();
      wgmma::pin(dq);
      add_piece_behind(params, shared, place.queries.before(), warpgroup, threadIdx.x % kWarpgroupThreads, dq);
    }
  }

  // One work: all query tiles that see a key tile, or a share of them.
  static __device__ void sum_gradients(const Params& params, Shared& shared, const KeyTileWork& work, int warpgroup,
                                       const WarpgroupTurns<kWarpgroups, 1 + kWarpgroups>& turns, Place& place) {
    constexpr int kConsumers = kWarpgroups * kWarpgroupThreads;
    Position& position = place.queries;
    const KeyTile& keys = shared.k[__shfl_sync(0xffffffffu, place.keys.stage, 0)];
    KeyTile& values = shared.v[__shfl_sync(0xffffffffu, place.values.stage, 0)];
    const int thread = kKeepsThread ? kept_thread() : static_cast<int>(threadIdx.x % kWarpgroupThreads);
    const int shared_row = warpgroup * kWarpgroupRows;
    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
    Announcement run{};
    Score score = params.score;
    [[maybe_unused]] const int first_slot = work.k_tile * kTile.k + shared_row;
    KeyBiasRows rows;
    const auto step = [&](int q_tile, auto coverage, std::uint16_t cells) {
      const int stage = position.stage;
      const AccumulatorThread at(kKeepsThread ? static_cast<int>(thread_anew() % kWarpgroupThreads) : thread);
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
      wgmma::multiply<Element, kHeadDim>(keys.k_major(shared_row), shared.q[stage].k_major(), scores, false);
      wgmma::commit();
      shared.dout_ring.wait(position);
      wgmma::pin(dscores);
      wgmma::fence();
      wgmma::multiply<Element, kHeadDim>(values.k_major(shared_row), shared.dout[stage].k_major(), dscores, false);
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
        store_packed(dscores_operand, shared.dscores[place.dscores], shared_row, thread);
      }

      if constexpr (kTurnsFromProducts) {
        turns.wait();
      }
      [[maybe_unused]] float dq[kPiece / 2];
      if constexpr (kTileBehind) {
        multiply_keys(shared, position.before(), place.dscores_before, shared.k[place.keys_behind], warpgroup, dq);
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
          store_packed(dscores_operand, shared.dscores[place.dscores], shared_row, thread);
        }
        publish_shared();
      }
      if constexpr (kTileBehind) {
        hand_back(shared.dscores_full[stage]);
        wgmma::wait<1>();
        wgmma::pin(dq);
        add_piece_behind(params, shared, position.before(), warpgroup, thread, dq);
        if (place.keys_behind != place.keys.stage) {
          hand_back(shared.k_free[place.keys_behind]);
          place.keys_behind = place.keys.stage;
        }
      } else if constexpr (kSumsQueries) {
        cutlass::arch::NamedBarrier::sync(kConsumers, 0);
        multiply_keys(shared, position, place.dscores, keys, warpgroup, dq);
      }
      wgmma::pin(dk);
      wgmma::pin(dscores_operand);
      wgmma::fence();
      wgmma::multiply<Element, Element>(dscores_operand, shared.q[stage].mn_major(), dk, true);
      wgmma::commit();

      wgmma::wait<1>();
      wgmma::pin(dv);
      wgmma::pin(weights_operand);
      hand_back(shared.dout_ring.empty[stage]);
      if constexpr (kSumsQueries && !kTileBehind) {
        wgmma::pin(dq);
        const std::int64_t tile = first_tile_of<KeyGradientKernel>(params, work, run.head) + q_tile;
        add_piece(params, shared, position, static_cast<int>(tile), warpgroup, thread, dq);
      }

      wgmma::wait<0>();
      wgmma::pin(dk);
      wgmma::pin(dscores_operand);
      hand_back(shared.q_ring.empty[stage]);
      position.advance();
      place.dscores_before = place.dscores;
      place.dscores = place.dscores == kScoreSlots - 1 ? 0 : place.dscores + 1;
    };
    int head = -1;
    do {
      run = shared.q_ring.next(position);
      score = params.score.at(run.head);
      if constexpr (kModified) {
        rows.move_to(run, head, params, work, first_slot, AccumulatorThread(thread));
      }
      for_each_tile(run, step);
    } while (!run.last);
    if constexpr (kModified) {
      rows.end(params, work, head, first_slot, AccumulatorThread(thread));
    }

    // dV and then dK take the place of this warpgroup's rows of V, which no other reads, or are added to other works'.
    // dQ of the last tile comes in the next work's first step.
    if (kMaySumKeys && work.summed >= 0) {
      add_key_gradients(params.key_sums, work.summed, dk, dv);
    } else {
      store_key_gradient<Element>(params, work, params.dv, dv, 1.f, values, shared_row, 1 + warpgroup);
      cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, 1 + warpgroup);
      store_key_gradient<Element>(params, work, params.dk, dk, params.scale, values, shared_row, 1 + warpgroup);
      publish_shared();  // the next values are copied over what this thread has read
    }
    hand_back(shared.v_free[place.values.stage]);
    place.values.advance();
    if constexpr (!kTileBehind) {
      hand_back(shared.k_free[place.keys.stage]);
    }
    place.keys.advance();
  }

  // Every thread of a warp: hands back what the barrier guards.
  static __device__ void hand_back(Barrier& barrier) { release<kElects>(barrier); }

  // Begins a warpgroup's piece of dQ = dS K of the tile at `at`, whose dS is in a slot; a tile behind, once all
  // warpgroups have written it. Before the first tile this is a product of whatever lies there, which nothing adds.
  static __device__ void multiply_keys(Shared& shared, Position at, int slot, const KeyTile& keys, int warpgroup,
                                       float (&dq)[kPiece / 2]) {
    auto dscores_operand = shared.dscores[slot].mn_major(warpgroup % kRowPieces * kPiece);
    auto keys_operand = keys.mn_major(warpgroup / kRowPieces * kPiece);
    dscores_operand.pin();  // before the wait, so that the product follows it at once
    keys_operand.pin();
    if constexpr (kTileBehind) {
      wait_for(shared.dscores_full[at.stage], at.parity);
    }
    wgmma::pin(dq);
    wgmma::fence();
    wgmma::multiply<Element, kTile.k>(dscores_operand, keys_operand, dq, false);
    wgmma::commit();
  }

  // Adds a piece of dQ of the tile at `at`, the one before.
  static __device__ void add_piece_behind(const Params& params, Shared& shared, Position at, int warpgroup, int thread,
                                          const float (&value)[kPiece / 2]) {
    add_piece(params, shared, at, shared.sums[at.slot()], warpgroup, thread, value);
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
      hand_back(shared.turns.passed[at.stage]);
    }
  }

  // Adds this warpgroup's 64 rows of dK and dV to what other works have for the same tile.
  static __device__ void add_key_gradients(const KeySums& sums, int tile, const float (&dk)[kHeadDim / 2],
                                           const float (&dv)[kHeadDim / 2]) {
    const unsigned index = thread_anew();
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

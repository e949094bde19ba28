// What the kernels whose thread blocks own a key tile share: which tile it is, the queries that stream past, the end.
#pragma once

#include <cstdint>

#include "fastattn/schedule/schedule.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/backward.cuh"
#include "sm90/block.cuh"
#include "sm90/output.cuh"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"

namespace fastattn::sm90 {

struct KeyTileWork {
  int k_tile, kv_head, sequence, batch;
  int first_head;  // of queries
  bool exists;
};

// This block's tile.
template <class Kernel>
__device__ KeyTileWork key_tile_work(const typename Kernel::Params& params) {
  const int block = static_cast<int>(blockIdx.x);
  const WorkOrder& order = params.order;
  const WorkOrder::Place place =
      Kernel::kInTurns ? order.at_in_turns(block) : order.at(Kernel::kSharesWorks ? order.share_of(block).work : block);
  const int tile = Kernel::kInTurns ? order.tiles - 1 - place.rank : place.rank;
  const int head_block = place.head % params.head_blocks;
  const SequenceKeyTile at = sequence_key_tile(params.schedule, place.head / params.head_blocks, tile, Kernel::kTile);
  return {.k_tile = at.k_tile,
          .kv_head = params.heads_per_block == 1 ? head_block / params.heads_per_kv_head : head_block,
          .sequence = at.sequence,
          .batch = batch_of(params.schedule, at.sequence),
          .first_head = head_block * params.heads_per_block,
          .exists = at.k_tile * Kernel::kTile.k < slots_of(params.schedule, at.sequence).num_k};
}

// Whether dQ is computed too, and in which order key tiles add to it: in any, or one after the other.
enum class QuerySums { kNone, kInAnyOrder, kInTurns };

// How the warps of a thread block learn that it is its turn to add to a query tile, and tell that they have.
template <int kStages>
struct Turns {
  Barrier come[kStages], passed[kStages];

  __device__ void init(int consumer_warpgroups) {
    for (int i = 0; i < kStages; ++i) {
      come[i].init(1);
      passed[i].init(consumer_warpgroups * kWarpgroupWarps * kReleasingLanes);
    }
  }
  __device__ void wait(RingPosition<kStages> at) { wait_for(come[at.stage], at.parity); }
  __device__ void pass(RingPosition<kStages> at) {
    __syncwarp();
    if (threadIdx.x % 32 < kReleasingLanes) {
      passed[at.stage].arrive();
    }
  }
};

// Are all key tiles that a query tile sees consecutive, and is the last one known?
template <class Schedules>
inline constexpr bool kTellsLastKeyTile =
    requires(Schedules schedules) { schedules.at(0, 0).last_k_tile(0, TileShape{}); };

// May the host count the query tiles that see a key tile? Those of a band of all heads; lists are in memory of the
// device, whatever kInMemory says of them.
template <class Schedules>
inline constexpr bool kHostKnowsRuns = !Schedules::kInMemory && kTellsLastKeyTile<Schedules>;

// Calls visit(head, run) for the runs of query tiles that see a key tile, head after head, or for this block's share of
// each run.
template <class Kernel, class Visit>
__device__ void visit_queries(const typename Kernel::Params& params, KeyTileWork work, Visit&& visit) {
  [[maybe_unused]] const WorkOrder::Share share = params.order.share_of(static_cast<int>(blockIdx.x));
  for (int head = work.first_head; head < work.first_head + params.heads_per_block; ++head) {
    auto cursor = params.schedule.at(work.sequence, head).transposed().runs(work.k_tile, Kernel::kTransposed);
    for (TileRun run; cursor.next(run);) {
      if constexpr (Kernel::kSharesWorks) {
        if (share.parts > 1) {  // else not two divisions before the first copy
          run = run.share(share.part, share.parts);
        }
      }
      if (run.count > 0) {
        visit(head, run);
      }
    }
  }
}

// Which of all query tiles the first of a head is.
template <class Kernel>
__device__ std::int64_t first_tile_of(const typename Kernel::Params& params, KeyTileWork work, int head) {
  return (std::int64_t{work.batch} * params.heads + head) * params.q_tiles +
         first_q_tile(params.schedule, work.sequence, Kernel::kTile);
}

// Assistant: waits for this block's turn at each of the query tiles, and passes it on. Key tiles take turns from the
// last to the first, which is the order in which their blocks begin (a block waits only for others that run or are
// done), and in which under a causal mask they come to a query tile.
template <class Kernel>
__device__ void take_turns(const typename Kernel::Params& params, typename Kernel::Shared& shared, KeyTileWork work) {
  if (!cute::elect_one_sync()) {
    return;
  }
  typename Kernel::Position at;
  visit_queries<Kernel>(params, work, [&](int head, TileRun run) {
    const auto schedule = params.schedule.at(work.sequence, head);
    int* const turns = params.workspace.turns + first_tile_of<Kernel>(params, work, head);
    for (int q_tile = run.first; q_tile < run.first + run.count; ++q_tile) {
      const int turn = schedule.last_k_tile(q_tile, Kernel::kTile) - work.k_tile;
      int passed;
      do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(passed) : "l"(turns + q_tile) : "memory");
      } while (passed < turn);
      shared.turns.come[at.stage].arrive();
      wait_for(shared.turns.passed[at.stage], at.parity);
      asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turns + q_tile), "r"(turn + 1) : "memory");
      at.advance();
    }
  });
}

// Producer: loads K and V of the tile, then into two rings Q with lse2 and dO with delta of each query tile that sees
// it.
template <class Kernel>
__device__ void stream_queries(const typename Kernel::Params& params, typename Kernel::Shared& shared,
                               KeyTileWork work) {
  using KeyTile = typename Kernel::KeyTile;
  using QueryTile = typename Kernel::QueryTile;
  constexpr TileShape kTile = Kernel::kTile;
  constexpr bool kStatistics = Kernel::Score::kRowStatistics;
  constexpr int kRowBytes = kStatistics ? kTile.q * sizeof(float) : 0;
  const auto place = slots_of(params.schedule, work.sequence);
  const auto key_origin = place.key_origin(work.k_tile, kTile);
  if (cute::elect_one_sync()) {
    shared.kv_full.arrive_and_expect_tx(2 * KeyTile::kBytes);
    params.k.load(shared.k, key_origin, work.kv_head, work.batch, shared.kv_full);
    params.v.load(shared.v, key_origin, work.kv_head, work.batch, shared.kv_full);
  }
  typename Kernel::Position at;
  announce([&](auto&& report) { visit_queries<Kernel>(params, work, report); },
           [&](Announcement run) {
             if (run.count == 0) {
               shared.q_ring.fill(at, 0, run, [](Barrier&) {});
             }
             for (int q_tile = run.first; q_tile < run.first + run.count; ++q_tile) {
               const std::int64_t tile = first_tile_of<Kernel>(params, work, run.head) + q_tile;
               const auto origin = place.query_origin(q_tile, kTile);
               if constexpr (Kernel::kTileBehind) {
                 if (cute::elect_one_sync()) {
                   shared.sums[at.slot()] = static_cast<int>(tile);
                 }
               }
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

// A thread block of such a kernel: its producer streams queries, its other warpgroups consume(shared, work, warpgroup).
template <class Kernel, class Consume>
__device__ void own_key_tile(const typename Kernel::Params& params, Consume&& consume) {
  extern __shared__ std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(shared_bytes);
  const KeyTileWork work = key_tile_work<Kernel>(params);
  if (!work.exists) {
    return;
  }
  divide_block<Kernel::kConfig>(
      [&] {
        shared.kv_full.init(1);
        shared.q_ring.init(Kernel::kWarpgroups);
        shared.dout_ring.init(Kernel::kWarpgroups);
        if constexpr (Kernel::kSumsQueries) {
          shared.init_sums();
        }
      },
      [&] { stream_queries<Kernel>(params, shared, work); }, [&](int warpgroup) { consume(shared, work, warpgroup); },
      [&] {
        if constexpr (Kernel::kInTurns) {
          take_turns<Kernel>(params, shared, work);
        }
      });
}

// The statistics of the queries in columns `column` and `column` + 1 of a transposed score tile.
template <class Score, int kCount>
__device__ float2 row_statistics(const float (&values)[kCount], int column) {
  if constexpr (Score::kRowStatistics) {
    return *reinterpret_cast<const float2*>(&values[column]);
  } else {
    return {};
  }
}

// Adds a thread's share of one tile to the gradient of a head's bias. Tile by tile: kept over a run, the share would
// cost a register that head_dim 64 does not have (C7512: its products would be serialised).
__device__ inline void add_bias_gradient(float* dbias, float share) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    share += __shfl_xor_sync(0xffffffffu, share, distance);
  }
  if (threadIdx.x % 32 == 0) {
    atomicAdd(dbias, share);
  }
}

template <class Params>
__device__ int key_token(const Params& params, KeyTileWork work, int slot) {
  return slots_of(params.schedule, work.sequence).key_token(slot);
}

// Stores 64 rows of dK or dV, times `scale`, by way of rows [first_row, first_row + 64) of `staging`.
template <class Element, class Params, int kCount, class Tile>
__device__ void store_key_gradient(const Params& params, KeyTileWork work, const TensorView& to,
                                   float (&gradient)[kCount], float scale, Tile& staging, int first_row, int barrier) {
  if (to.data == nullptr) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    gradient[i] *= scale;
  }
  store_rows<Element>(gradient, staging, first_row, threadIdx.x % kWarpgroupThreads, barrier, to, work.batch,
                      work.kv_head, 0,
                      [&](int row) { return key_token(params, work, work.k_tile * Tile::kRows + first_row + row); });
}

// Makes weights of a transposed score tile; `bias_log2` are the terms of this thread's two keys.
template <class Score, class Modifier, int kQueries, int kCount>
__device__ void weigh(const Score& score, const Modifier& modifier, const float (&bias_log2)[2],
                      const float (&lse2)[kQueries], AccumulatorThread at, float (&scores)[kCount]) {
  apply_to_scores<decltype(score.weight(0.f))>([&](auto&& step) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float2 of_queries = row_statistics<Score>(lse2, at.column(j));
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        scores[i] =
            step(score.weight(i % 2 == 0 ? of_queries.x : of_queries.y), modifier(scores[i], bias_log2[i / 2 % 2]));
      }
    }
  });
}

// Of this thread's two keys in one head: the terms of their scores, and the sums of these scores' gradients.
struct KeyBiasRows {
  float bias_log2[2] = {}, gradient[2] = {};

  // Row 0 of the accumulator is slot `first_slot`.
  template <class Params>
  __device__ void begin(const Params& params, KeyTileWork work, int head, int first_slot, AccumulatorThread at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = key_token(params, work, first_slot + at.row(h));
      bias_log2[h] = token < 0 ? 0.f : params.modifier.bias_log2(work.batch, head, token);
      gradient[h] = 0.f;
    }
  }
  template <class Params>
  __device__ void end(const Params& params, KeyTileWork work, int head, int first_slot, AccumulatorThread at) const {
    if (params.dkey_bias == nullptr || head < 0) {
      return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = sum_over_row(gradient[h]);
      const int token = key_token(params, work, first_slot + at.row(h));
      if (at.first_column == 0 && token >= 0) {
        params.dkey_bias[(std::int64_t{work.batch} * params.heads + head) * params.num_keys + token] = sum;
      }
    }
  }
  // From the scores of `head` to those of the run's.
  template <class Params>
  __device__ void move_to(const Announcement& run, int& head, const Params& params, KeyTileWork work, int first_slot,
                          AccumulatorThread at) {
    if (run.count > 0 && run.head != head) {
      end(params, work, head, first_slot, at);
      head = run.head;
      begin(params, work, head, first_slot, at);
    }
  }

  // Adds up the gradients of transposed scores with these weights, and makes those of products of them.
  template <class Modifier, int kQueries, int kCount>
  __device__ void modify(const Modifier& modifier, const float (&lse2)[kQueries], AccumulatorThread at,
                         const float (&weights)[kCount], float (&gradients)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float2 of_queries = *reinterpret_cast<const float2*>(&lse2[at.column(j)]);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        const int h = i / 2 % 2;
        gradient[h] += gradients[i];
        if (weights[i] != 0.f) {
          gradients[i] *= modifier.slope(weights[i], i % 2 == 0 ? of_queries.x : of_queries.y, bias_log2[h]);
        }
      }
    }
  }
};

}  // namespace fastattn::sm90

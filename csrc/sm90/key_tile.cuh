// What the kernels whose thread blocks own key tiles share: which tile a work is of, the queries that see it, the end.
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
  int first_head;   // of queries
  int part, parts;  // which share of the query tiles is this work's
  int summed;       // which of the tiles whose dK and dV are sums; −1: none
  bool exists;
};

// A work's tile.
template <class Kernel>
__device__ KeyTileWork key_tile_work(const typename Kernel::Params& params, int index) {
  const WorkOrder& order = params.order;
  const WorkOrder::Place place = Kernel::kInTurns
                                     ? order.at_in_turns(index)
                                     : order.at(Kernel::kSharesWorks ? order.share_of(index).index : index);
  const int tile = Kernel::kInTurns ? order.tiles - 1 - place.rank : place.rank;
  const int head_work = place.head % params.head_works;
  const SequenceKeyTile at = sequence_key_tile(params.schedule, place.head / params.head_works, tile, Kernel::kTile);
  return {.k_tile = at.k_tile,
          .kv_head = params.heads_per_work == 1 ? head_work / params.heads_per_kv_head : head_work,
          .sequence = at.sequence,
          .batch = batch_of(params.schedule, at.sequence),
          .first_head = head_work * params.heads_per_work,
          .part = Kernel::kSharesWorks ? order.share_of(index).part : 0,
          .parts = Kernel::kSharesWorks ? order.share_of(index).parts : 1,
          .summed = params.key_sums.data == nullptr ? -1 : params.key_sums.tile_of(order, index),
          .exists = at.k_tile * Kernel::kTile.k < slots_of(params.schedule, at.sequence).num_k};
}

// Whether dQ is computed too, and in which order key tiles add to it: in any, or one after the other.
enum class QuerySums { kNone, kInAnyOrder, kInTurns };

// Are all key tiles that a query tile sees consecutive, and is the last one known?
template <class Schedules>
inline constexpr bool kTellsLastKeyTile =
    requires(Schedules schedules) { schedules.at(0, 0).last_k_tile(0, TileShape{}); };

// May the host count the query tiles that see a key tile? Those of a band of all heads; lists are in memory of the
// device, whatever kInMemory says of them.
template <class Schedules>
inline constexpr bool kHostKnowsRuns = !Schedules::kInMemory && kTellsLastKeyTile<Schedules>;

// Calls visit(head, run) for the runs of query tiles that see a key tile, head after head, or for a work's share of
// each run.
template <class Kernel, class Visit>
__device__ void visit_queries(const typename Kernel::Params& params, KeyTileWork work, Visit&& visit) {
  for (int head = work.first_head; head < work.first_head + params.heads_per_work; ++head) {
    auto cursor = params.schedule.at(work.sequence, head).transposed().runs(work.k_tile, Kernel::kTransposed);
    for (TileRun run; cursor.next(run);) {
      if constexpr (Kernel::kSharesWorks) {
        if (work.parts > 1) {  // else not two divisions before the first copy
          run = run.share(work.part, work.parts);
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
  store_rows<Element>(gradient, staging, first_row, thread_anew() % kWarpgroupThreads, barrier, to, work.batch,
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

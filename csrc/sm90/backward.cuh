// The backward kernels. The main one owns a key tile: its K and V stay in shared memory, dK and dV in registers, while
// it walks the query tiles that see it (the schedule, transposed), for every query head that shares the key head:
//
//   Sᵀ = K Qᵀ, dPᵀ = V dOᵀ → P = weight(S), dS = score_gradient(P, dP) → dV += Pᵀ dO, dK += dSᵀ Q, dQ += dS K
//
// S and dP are computed transposed because P and dS then lie in registers as the next products want them; only dS also
// goes through shared memory, for dQ (FlashAttention-3, arXiv 2407.08608). dQ is summed over key tiles in fp32 in
// global memory, in the order of the accumulator's registers, so that every reduction is a coalesced 16-byte one.
//
// Before it, `prepare_kernel` computes each row's delta; after it, `finish_kernel` scales dQ, rounds it and puts it in
// order.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>

#include "fastattn/schedule/schedule.hpp"
#include "fastattn/score/score.hpp"
#include "fastattn/tensor_view.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/config.hpp"
#include "sm90/output.cuh"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

// The caller's workspace, for the slots of whole query tiles. Scores without row statistics have no lse2 and delta.
struct BackwardWorkspace {
  float* lse2;   // [batch, heads, query slots]: base-2 log-sum-exp, +∞ where a row keeps nothing or does not exist
  float* delta;  // [batch, heads, query slots]: Σ(out · dout) − dlse
  float* dq;     // [batch, heads, query tiles, warpgroups, 8, 128, 4]: 64 × 64 pieces in register order
};

template <class Variant>
struct BackwardParams {
  using Origin = OriginOf<typename Variant::Schedule>;
  TensorMap<Origin> q, k, v, dout;
  TensorView dk, dv;
  typename Variant::Schedule schedule;  // of all heads; as in the forward: queries × keys
  typename Variant::Score score;        // of all heads
  float scale;
  float* dbias;  // [heads], for a score with a bias; may be null
  BackwardWorkspace workspace;
  int heads, kv_heads, heads_per_kv_head, q_tiles, k_tiles;
};

template <class Variant, int kIndex>
struct BackwardKernel {
  static constexpr Config kConfig = Variant::kBackward[kIndex];
  static constexpr TileShape kTile = kConfig.tile;
  static constexpr TileShape kTransposed = {kTile.k, kTile.q};
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kWarpgroups = kConfig.warpgroups;
  static constexpr int kPiece = 64;  // dQ is computed in 64 × 64 pieces, one per warpgroup
  static constexpr int kRowPieces = kTile.q / kPiece;
  static_assert(kTile.k == kWarpgroups * kWarpgroupRows);
  static_assert(kRowPieces * (kHeadDim / kPiece) == kWarpgroups && kStages >= 2);

  using Element = typename Variant::Element;
  using Score = typename Variant::Score;
  using Params = BackwardParams<Variant>;
  using Position = RingPosition<kStages>;
  using KeyTile = SharedTile<Element, kTile.k, kHeadDim>;
  using QueryTile = SharedTile<Element, kTile.q, kHeadDim>;
  using ScoreTile = SharedTile<Element, kTile.k, kTile.q>;  // keys × queries

  struct Shared {
    KeyTile k, v;  // at the end: dK, dV
    QueryTile q[kStages], dout[kStages];
    ScoreTile dscores[kStages];  // at least two: one barrier an iteration separates writers from readers
    float lse2[kStages][kTile.q], delta[kStages][kTile.q];
    Barrier kv_full;
    Ring<kStages, Announcement> q_ring;  // with lse2
    Ring<kStages> dout_ring;             // with delta
  };

  struct Work {
    int k_tile, kv_head, batch;

    __device__ explicit Work(const Params& params) {
      const int row = static_cast<int>(blockIdx.x) / params.k_tiles;
      k_tile = static_cast<int>(blockIdx.x) % params.k_tiles;  // first tiles are the longest under a causal mask
      kv_head = row % params.kv_heads;
      batch = row / params.kv_heads;
    }
  };

  static __device__ void run(const Params& params) {
    extern __shared__ std::byte shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    if (threadIdx.x == 0) {
      shared.kv_full.init(1);
      shared.q_ring.init(kWarpgroups);
      shared.dout_ring.init(kWarpgroups);
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();

    const Work work(params);
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);
    if (warpgroup == 0) {
      cutlass::arch::warpgroup_reg_dealloc<kConfig.producer_registers()>();
      if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0) {
        produce(params, shared, work);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<kConfig.consumer_registers()>();
      consume(params, shared, work, warpgroup - 1);
    }
  }

  static __device__ void produce(const Params& params, Shared& shared, Work work) {
    const auto place = params.schedule.slots();
    const auto key_origin = place.key_origin(work.k_tile, kTile);
    if (cute::elect_one_sync()) {
      shared.kv_full.arrive_and_expect_tx(2 * KeyTile::kBytes);
      params.k.load(shared.k, key_origin, work.kv_head, work.batch, shared.kv_full);
      params.v.load(shared.v, key_origin, work.kv_head, work.batch, shared.kv_full);
    }
    constexpr int kRowBytes = Score::kRowStatistics ? kTile.q * sizeof(float) : 0;
    Position at;
    announce(
        [&](auto&& report) {
          for (int i = 0; i < params.heads_per_kv_head; ++i) {
            const int head = work.kv_head * params.heads_per_kv_head + i;
            auto cursor = params.schedule.at(work.batch, head).transposed().runs(work.k_tile, kTransposed);
            for (TileRun run; cursor.next(run);) {
              report(head, run);
            }
          }
        },
        [&](Announcement run) {
          if (run.count == 0) {
            shared.q_ring.fill(at, 0, run, [](Barrier&) {});
          }
          for (int q_tile = run.first; q_tile < run.first + run.count; ++q_tile) {
            const std::int64_t tile = (std::int64_t{work.batch} * params.heads + run.head) * params.q_tiles + q_tile;
            const auto origin = place.query_origin(q_tile, kTile);
            shared.q_ring.fill(at, QueryTile::kBytes + kRowBytes, run, [&](Barrier& full) {
              params.q.load(shared.q[at.stage], origin, run.head, work.batch, full);
              if constexpr (Score::kRowStatistics) {
                load_bytes(shared.lse2[at.stage], params.workspace.lse2 + tile * kTile.q, kRowBytes, full);
              }
            });
            shared.dout_ring.fill(at, QueryTile::kBytes + kRowBytes, {}, [&](Barrier& full) {
              params.dout.load(shared.dout[at.stage], origin, run.head, work.batch, full);
              if constexpr (Score::kRowStatistics) {
                load_bytes(shared.delta[at.stage], params.workspace.delta + tile * kTile.q, kRowBytes, full);
              }
            });
            at.advance();
          }
        });
  }

  static __device__ void consume(const Params& params, Shared& shared, Work work, int warpgroup) {
    constexpr int kConsumers = kWarpgroups * kWarpgroupThreads;
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
    const int shared_row = warpgroup * kWarpgroupRows;
    const int piece_row = warpgroup % kRowPieces * kPiece, piece_column = warpgroup / kRowPieces * kPiece;

    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
    Position position;

    wait_for(shared.kv_full, 0);
    Announcement run{};
    Score score = params.score;
    const auto step = [&](int q_tile, auto coverage, std::uint16_t cells) {
      const int stage = position.stage;
      float scores[kTile.q / 2], dscores[kTile.q / 2];  // transposed: this warpgroup's keys × the tile's queries
      std::uint32_t weights_operand[kTile.q / 4], dscores_operand[kTile.q / 4];
      constexpr bool kPartial = coverage() == Coverage::kPartial;
      KeptBits kept;
      if constexpr (kPartial) {
        const auto transposed = params.schedule.at(work.batch, run.head).transposed();
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
      apply_to_scores<decltype(score.weight(0.f))>([&](auto&& step) {
#pragma unroll
        for (int j = 0; j < kTile.q / 8; ++j) {
          const float2 lse2 = row_statistics(shared.lse2[stage], at.column(j));
#pragma unroll
          for (int i = 4 * j; i < 4 * j + 4; ++i) {
            scores[i] = step(score.weight(i % 2 == 0 ? lse2.x : lse2.y), scores[i]);
          }
        }
      });
      if constexpr (kPartial) {
        kept.apply(scores, 0.f);
      }
      pack<Element>(scores, weights_operand);

      wgmma::wait<0>();
      wgmma::pin(dscores);
#pragma unroll
      for (int j = 0; j < kTile.q / 8; ++j) {
        const float2 delta = row_statistics(shared.delta[stage], at.column(j));
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) {
          dscores[i] = score.score_gradient(scores[i], dscores[i], i % 2 == 0 ? delta.x : delta.y);
        }
      }
      if constexpr (kPartial) {  // a masked score has weight 0, but 0 times a gradient that is not finite is not 0
#pragma unroll
        for (int i = 0; i < kTile.q / 2; ++i) {
          dscores[i] = scores[i] == 0.f ? 0.f : dscores[i];
        }
      }
      if constexpr (Score::kBiasGradient) {
        if (params.dbias != nullptr) {
          float share = 0.f;
#pragma unroll
          for (int i = 0; i < kTile.q / 2; ++i) {
            share += dscores[i];
          }
          add_bias_gradient(params.dbias + run.head, share);
        }
      }
      pack<Element>(dscores, dscores_operand);

      wgmma::pin(dv);
      wgmma::pin(weights_operand);
      wgmma::fence();
      wgmma::multiply<Element, Element>(weights_operand, shared.dout[stage].mn_major(), dv, true);
      wgmma::commit();

      store_packed(dscores_operand, shared.dscores[stage], shared_row, thread);
      publish_shared();
      cutlass::arch::NamedBarrier::sync(kConsumers, 0);

      float dq[kPiece / 2];
      wgmma::pin(dq);
      wgmma::fence();
      wgmma::multiply<Element, kTile.k>(shared.dscores[stage].mn_major(piece_row), shared.k.mn_major(piece_column), dq,
                                        false);
      wgmma::commit();
      wgmma::pin(dk);
      wgmma::pin(dscores_operand);
      wgmma::fence();
      wgmma::multiply<Element, Element>(dscores_operand, shared.q[stage].mn_major(), dk, true);
      wgmma::commit();

      wgmma::wait<1>();
      wgmma::pin(dq);
      wgmma::pin(dv);
      wgmma::pin(weights_operand);
      shared.dout_ring.release(position);
      const int tile = (work.batch * params.heads + run.head) * params.q_tiles + q_tile;
      add_piece(params.workspace.dq + (std::int64_t{tile} * kWarpgroups + warpgroup) * (kPiece * kPiece), thread, dq);

      wgmma::wait<0>();
      wgmma::pin(dk);
      wgmma::pin(dscores_operand);
      shared.q_ring.release(position);
      position.advance();
    };
    do {
      run = shared.q_ring.next(position);
      score = params.score.at(run.head);
      for_each_tile(run, step);
    } while (!run.last);

    // Epilogue: dK and dV take the place of K and V, once no warpgroup reads them any more.
    cutlass::arch::NamedBarrier::sync(kConsumers, 0);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      dk[i] *= params.scale;
    }
    const auto token_of = [&](int row) {
      return params.schedule.slots().key_token(work.k_tile * kTile.k + shared_row + row);
    };
    store_rows<Element>(dk, shared.k, shared_row, thread, 1 + warpgroup, params.dk, work.batch, work.kv_head, 0,
                        token_of);
    store_rows<Element>(dv, shared.v, shared_row, thread, 1 + warpgroup, params.dv, work.batch, work.kv_head, 0,
                        token_of);
  }

  // The statistics of the queries in columns `column` and `column` + 1 of a transposed score tile.
  static __device__ float2 row_statistics(const float (&values)[kTile.q], int column) {
    if constexpr (Score::kRowStatistics) {
      return *reinterpret_cast<const float2*>(&values[column]);
    } else {
      return {};
    }
  }

  // Adds a thread's share of one tile to the gradient of a head's bias. Tile by tile: kept over a run, the share would
  // cost a register that head_dim 64 does not have (C7512: its products would be serialised).
  static __device__ void add_bias_gradient(float* dbias, float share) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      share += __shfl_xor_sync(0xffffffffu, share, distance);
    }
    if (threadIdx.x % 32 == 0) {
      atomicAdd(dbias, share);
    }
  }

  // Adds a 64 × 64 accumulator to its place in global memory: four registers of a thread at a time.
  static __device__ void add_piece(float* piece, int thread, const float (&value)[kPiece / 2]) {
#pragma unroll
    for (int j = 0; j < kPiece / 8; ++j) {
      float* address = piece + (j * kWarpgroupThreads + thread) * 4;
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value[4 * j]),
                   "f"(value[4 * j + 1]), "f"(value[4 * j + 2]), "f"(value[4 * j + 3])
                   : "memory");
    }
  }
};

template <class Variant, int kIndex>
__global__ void __launch_bounds__((BackwardKernel<Variant, kIndex>::kWarpgroups + 1) * kWarpgroupThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams<Variant> params) {
  BackwardKernel<Variant, kIndex>::run(params);
}

inline constexpr int kRowLanes = 16;  // lanes that share a row in prepare_kernel
inline constexpr int kHelperThreads = 256;

template <class Schedules>
struct PrepareParams {
  TensorView out, dout;
  const float* lse;   // [batch, heads, tokens]
  const float* dlse;  // likewise, or null
  BackwardWorkspace workspace;
  Schedules schedule;
  int slots;  // of whole query tiles
};

// lse2 and delta of every row: sixteen lanes a row, 16 bytes a lane and step.
template <class Element, class Schedules>
__global__ void prepare_kernel(const __grid_constant__ PrepareParams<Schedules> params) {
  const std::int64_t index = (std::int64_t{blockIdx.x} * kHelperThreads + threadIdx.x) / kRowLanes;
  const int lane = threadIdx.x % kRowLanes;
  const int token = params.schedule.slots().query_token(static_cast<int>(index % params.slots));
  const std::int64_t head_index = index / params.slots;
  const std::int64_t heads = params.out.heads(), head = head_index % heads, batch = head_index / heads;
  const bool exists = batch < params.out.batch() && token >= 0;

  float sum = 0.f;
  if (exists) {
    const auto* out = params.out.template row<const Element>(batch, token, head);
    const auto* dout = params.dout.template row<const Element>(batch, token, head);
    for (int column = lane * 8; column < params.out.head_dim(); column += kRowLanes * 8) {
      const uint4 a = *reinterpret_cast<const uint4*>(out + column);
      const uint4 b = *reinterpret_cast<const uint4*>(dout + column);
      const auto dot = [](std::uint32_t x, std::uint32_t y) {
        const float2 p = DeviceElement<Element>::unpack(x), q = DeviceElement<Element>::unpack(y);
        return p.x * q.x + p.y * q.y;
      };
      sum += dot(a.x, b.x) + dot(a.y, b.y) + dot(a.z, b.z) + dot(a.w, b.w);
    }
  }
#pragma unroll
  for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (lane == 0 && batch < params.out.batch()) {
    float lse2 = kInfinity;
    if (exists) {
      const std::int64_t at = head_index * params.out.seq() + token;
      const float lse = params.lse[at];
      lse2 = lse == -kInfinity ? kInfinity : lse * kLog2E;
      sum -= params.dlse == nullptr ? 0.f : params.dlse[at];
    }
    params.workspace.lse2[index] = lse2;
    params.workspace.delta[index] = sum;
  }
}

template <class Schedules>
struct FinishParams {
  TensorView dq;
  const float* sums;  // BackwardWorkspace::dq
  Schedules schedule;
  float scale;
  int q_tiles;
};

// dQ = scale · the sums, rounded and back in row order; one block per 64 × 64 piece.
template <class Element, class Kernel, class Schedules>
__global__ void finish_kernel(const __grid_constant__ FinishParams<Schedules> params) {
  constexpr int kPiece = Kernel::kPiece;
  __shared__ SharedTile<Element, kPiece, kPiece> staging;
  const int warpgroup = blockIdx.x % Kernel::kWarpgroups;
  const std::int64_t tile = blockIdx.x / Kernel::kWarpgroups;
  const int q_tile = static_cast<int>(tile % params.q_tiles);
  const std::int64_t heads = params.dq.heads(), head = tile / params.q_tiles % heads;
  const std::int64_t batch = tile / params.q_tiles / heads;
  const int first_row = q_tile * Kernel::kTile.q + warpgroup % Kernel::kRowPieces * kPiece;
  const int first_column = warpgroup / Kernel::kRowPieces * kPiece;
  const float* piece = params.sums + std::int64_t{blockIdx.x} * (kPiece * kPiece);

  float dq[kPiece / 2];
#pragma unroll
  for (int j = 0; j < kPiece / 8; ++j) {
    const float4 sum = *reinterpret_cast<const float4*>(piece + (j * kWarpgroupThreads + threadIdx.x) * 4);
    dq[4 * j] = sum.x * params.scale;
    dq[4 * j + 1] = sum.y * params.scale;
    dq[4 * j + 2] = sum.z * params.scale;
    dq[4 * j + 3] = sum.w * params.scale;
  }
  const auto schedule = params.schedule.slots();
  store_rows<Element>(dq, staging, 0, threadIdx.x, 0, params.dq, batch, head, first_column,
                      [&](int row) { return schedule.query_token(first_row + row); });
}

}  // namespace fastattn::sm90

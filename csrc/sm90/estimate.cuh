// The estimate of estimate_blocks: a thread block judges the scores of one query tile of a head after the other.
//
//   producer warp       take a query tile, load Q; load each key tile whose blocks are not all near       (into rings)
//   consumer warpgroup  for each key tile: S = Q Kᵀ in integers; does a score reach its floor? mark its block
//
// A second kernel makes lists of the marks.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/schedule/sink_and_window.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/config.hpp"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

// What both kernels know of a problem.
struct EstimateParams {
  TensorMap<int> q, k;
  Band band;
  const float *q_scales, *k_scales, *floor, *key_term;
  float scale;
  int run_shift;  // 2^run_shift tokens of keys have four scales
  TileShape block;
  int sink, window;
  int batch, heads, heads_per_kv_head, q_tiles;
  std::int32_t *counts, *indices;
  std::uint8_t* marks;  // [batch, heads, query blocks, key blocks], zeros before
  WorkQueue works;      // query tiles of all heads

  __device__ int blocks_q() const { return ceil_div(band.num_q, block.q); }
  __device__ int blocks_k() const { return ceil_div(band.num_k, block.k); }
  __device__ int column_of(int key) const { return key >> (block.k == 128 ? 7 : 6); }
  __device__ SinkAndWindow near(int row) const {
    return sink_and_window(row, band.num_q, band.num_k, block, sink, window);
  }
};

inline constexpr Config kEstimate[] = {{.head_dim = 64, .tile = {128, 128}, .stages = 6, .warpgroups = 2},
                                       {.head_dim = 128, .tile = {128, 128}, .stages = 6, .warpgroups = 2}};

template <int kIndex>
struct EstimateKernel {
  static constexpr Config kConfig = kEstimate[kIndex];
  static constexpr TileShape kTile = kConfig.tile;
  static constexpr int kHeadDim = kConfig.head_dim, kStages = kConfig.stages, kWarpgroups = kConfig.warpgroups;
  static constexpr int kQueryStages = 2;
  static constexpr int kHalves = 2;            // of a tile's columns: blocks of 64 keys
  static constexpr int kRuns = kTile.k / 32;   // of columns that share this thread's scale, whatever the group
  static constexpr int kScores = kTile.k / 2;  // a thread has

  using Params = EstimateParams;
  using QueryTile = SharedTile<std::int8_t, kTile.q, kHeadDim>;
  using KeyTile = SharedTile<std::int8_t, kTile.k, kHeadDim>;

  struct alignas(16) Work {
    int q_tile, head, batch;
    bool exists;
  };

  struct Shared {
    QueryTile q[kQueryStages];
    KeyTile k[kStages];
    Ring<kQueryStages, Work> q_ring;
    Ring<kStages, Announcement> k_ring;
  };

  struct Positions {
    RingPosition<kQueryStages> q;
    RingPosition<kStages> k;
  };

  static __device__ void run(const Params& params) {
    extern __shared__ std::byte shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    if (threadIdx.x == 0) {
      shared.q_ring.init(kWarpgroups);
      shared.k_ring.init(kWarpgroups);
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);
    if (warpgroup == 0) {
      cutlass::arch::warpgroup_reg_dealloc<kConfig.producer_registers()>();
      if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0) {
        produce(params, shared);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<kConfig.consumer_registers()>();
      consume(params, shared, warpgroup - 1);
    }
  }

  // Are all blocks of a tile listed anyway?
  static __device__ bool is_near(const Params& params, int q_tile, int k_tile) {
    const int row = q_tile * kTile.q / params.block.q, column = params.column_of(k_tile * kTile.k);
    const int rows = kTile.q / params.block.q, columns = kTile.k / params.block.k;
    bool near = true;
    for (int i = row; i < min_of(row + rows, params.blocks_q()); ++i) {
      const SinkAndWindow of_row = params.near(i);
      near = near && of_row.contains(column) && of_row.contains(column + columns - 1);
    }
    return near;
  }

  static __device__ void produce(const Params& params, Shared& shared) {
    Positions position;
    for (int index = params.works.first(); index < params.works.count; index = params.works.next()) {
      const int row = index / params.q_tiles;  // the last tile of a head first, see ForwardKernel::Work
      const Work work{params.q_tiles - 1 - index % params.q_tiles, row % params.heads, row / params.heads, true};
      const int kv_head = work.head / params.heads_per_kv_head;
      shared.q_ring.fill(position.q, QueryTile::kBytes, work, [&](Barrier& full) {
        params.q.load(shared.q[position.q.stage], work.q_tile * kTile.q, work.head, work.batch, full);
      });
      position.q.advance();
      announce(
          [&](auto&& report) {
            auto cursor = params.band.runs(work.q_tile, kTile);
            for (TileRun run; cursor.next(run);) {
              const int end = run.first + run.count;
              for (int tile = run.first; tile < end; ++tile) {
                if (!is_near(params, work.q_tile, tile)) {
                  report(work.head, TileRun{tile, 1, run.coverage});
                }
              }
            }
          },
          [&](Announcement run) {
            shared.k_ring.fill(position.k, run.count * KeyTile::kBytes, run, [&](Barrier& full) {
              if (run.count > 0) {
                params.k.load(shared.k[position.k.stage], run.first * kTile.k, kv_head, work.batch, full);
              }
            });
            position.k.advance();
          });
    }
    shared.q_ring.fill(position.q, 0, {.exists = false}, [](Barrier&) {});
  }

  static __device__ void consume(const Params& params, Shared& shared, int warpgroup) {
    Positions position;
    for (Work work; (work = shared.q_ring.next(position.q)).exists; position.q.advance()) {
      judge(params, shared, work, warpgroup, position);
      shared.q_ring.release(position.q);
    }
  }

  // One query tile against all of its key tiles, one announced at a time.
  static __device__ void judge(const Params& params, Shared& shared, Work work, int warpgroup, Positions& position) {
    const AccumulatorThread at(threadIdx.x % kWarpgroupThreads);
    const int first_row = warpgroup * kWarpgroupRows, first_query = work.q_tile * kTile.q + first_row;
    const std::int64_t head = std::int64_t{work.batch} * params.heads + work.head;
    const int num_q = params.band.num_q, num_k = params.band.num_k;
    const int scales_of_head = ceil_div(num_k, 1 << params.run_shift) * 4;
    const float* const key_scales =
        params.k_scales + head / params.heads_per_kv_head * scales_of_head + at.first_column / 2;
    const float* const terms = params.key_term == nullptr ? nullptr : params.key_term + head * num_k;
    const int block_row = first_query / params.block.q;
    std::uint8_t* const marks = params.marks + (head * params.blocks_q() + block_row) * params.blocks_k();
    float query_scale[2], floor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = min_of(first_query + at.row(h), num_q - 1);  // one past the end is masked
      query_scale[h] = __fmul_rn(params.scale, params.q_scales[head * num_q + query]);
      floor[h] = params.floor[head * num_q + query];
    }

    for (bool last = false; !last;) {
      const Announcement run = shared.k_ring.next(position.k);
      last = run.last;
      if (run.count > 0) {
        const int first_key = run.first * kTile.k;
        std::uint32_t sums[kScores];
        wgmma::pin(sums);
        wgmma::fence();
        wgmma::multiply<std::int8_t, kHeadDim>(shared.q[position.q.stage].k_major(first_row),
                                               shared.k[position.k.stage].k_major(), sums, false);
        wgmma::commit();
        float key_scale[kRuns];
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {  // the last runs of a head may have no scale, and are masked then
          key_scale[i] =
              key_scales[min_of((first_key + 32 * i) >> params.run_shift, (num_k - 1) >> params.run_shift) * 4];
        }
        const auto judge_as = [&](auto coverage, auto with_term) {
          KeptBits kept{{~0u, ~0u}};
          if constexpr (coverage() == Coverage::kPartial) {
            kept = kept_bits(params.band.tile_mask(work.q_tile, run.first, kTile, 0), first_row, at);
          }
          bool reached[kHalves] = {};
#pragma unroll
          for (int i = 0; i < kRuns; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float scale = __fmul_rn(query_scale[h], key_scale[i]);
              const std::uint32_t of_run = kept.row[h] >> (8 * i) & 0xffu;
              bool& reached_here = reached[i / (kRuns / kHalves)];
              if constexpr (with_term()) {
                reached_here |= reaches(sums, i, h, of_run, scale, floor[h], terms, first_key + at.first_column, num_k);
              } else {
                reached_here |= reaches(sums, i, h, of_run, scale, floor[h]);
              }
            }
          }
          mark(params, marks, first_key, reached);
        };
        wgmma::wait<0>();
        wgmma::pin(sums);
        with_coverage(run.coverage, [&](auto coverage) {
          terms == nullptr ? judge_as(coverage, std::false_type{}) : judge_as(coverage, std::true_type{});
        });
      }
      shared.k_ring.release(position.k);
      position.k.advance();
    }
  }

  template <class Body>
  static __device__ void with_coverage(Coverage coverage, Body&& body) {
    coverage == Coverage::kFull ? body(CoverageTag<Coverage::kFull>{}) : body(CoverageTag<Coverage::kPartial>{});
  }

  // Column e of octet j, of row h.
  static __device__ int product(const std::uint32_t (&sums)[kScores], int j, int h, int e) {
    return static_cast<int>(sums[4 * j + 2 * h + e]);
  }

  // Does one of this thread's scores of a run reach the floor? They share a scale that is not negative, or NaN: the
  // greatest product decides, whatever the rounding.
  static __device__ bool reaches(const std::uint32_t (&sums)[kScores], int run, int h, std::uint32_t kept, float scale,
                                 float floor) {
    int greatest = INT_MIN;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int sum = product(sums, 4 * run + i / 2, h, i % 2);
      greatest = max_of(greatest, (kept >> i & 1) != 0 ? sum : INT_MIN);
    }
    return kept != 0 && !(__fmul_rn(scale, __int2float_rn(greatest)) < floor);
  }

  // The same with a term of each key.
  static __device__ bool reaches(const std::uint32_t (&sums)[kScores], int run, int h, std::uint32_t kept, float scale,
                                 float floor, const float* terms, int first_key, int num_keys) {
    bool reached = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = first_key + 8 * (4 * run + i / 2) + i % 2;
      const float term = key < num_keys ? terms[key] : 0.f;
      const float score = __fmaf_rn(scale, __int2float_rn(product(sums, 4 * run + i / 2, h, i % 2)), term);
      reached |= (kept >> i & 1) != 0 && !(score < floor);
    }
    return reached;
  }

  // Marks the blocks in which a score of this warp reaches its floor. Whoever marks a block writes the same.
  static __device__ void mark(const Params& params, std::uint8_t* marks, int first_key,
                              const bool (&reached)[kHalves]) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (__any_sync(0xffffffffu, reached[half]) && threadIdx.x % 32 == 0) {
        marks[params.column_of(first_key + half * (kTile.k / kHalves))] = 1;
      }
    }
  }
};

template <int kIndex>
__global__ void __launch_bounds__((EstimateKernel<kIndex>::kWarpgroups + 1) * kWarpgroupThreads, 1)
    estimate_kernel(const __grid_constant__ EstimateParams params) {
  EstimateKernel<kIndex>::run(params);
}

inline constexpr int kListThreads = 128;

// The list of a row of blocks, a warp each: those that are seen, and near or marked; behind them all others.
__global__ void __launch_bounds__(kListThreads) list_kernel(const __grid_constant__ EstimateParams params) {
  const int lane = static_cast<int>(threadIdx.x) % 32, width = params.blocks_k(), rows = params.blocks_q();
  const std::int64_t row = (std::int64_t{blockIdx.x} * kListThreads + threadIdx.x) / 32;
  if (row >= std::int64_t{params.batch} * params.heads * rows) {
    return;  // all of the warp
  }
  const int block_row = static_cast<int>(row % rows);
  const SinkAndWindow near = params.near(block_row);
  const int last_query = min_of((block_row + 1) * params.block.q, params.band.num_q) - 1;
  const int seen_keys =
      min_of(last_query + params.band.num_k - params.band.num_q + params.band.right + 1, params.band.num_k);
  const std::uint8_t* const marks = params.marks + row * width;
  std::int32_t* const indices = params.indices + row * width;
  int count = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const bool wanted = pass == 0;
    for (int first = 0; first < width; first += 32) {
      const int column = first + lane;
      const bool exists = column < width, seen = exists && column * params.block.k < seen_keys;
      const bool listed = seen && (near.contains(column) || marks[column] != 0);
      const std::uint32_t chosen = __ballot_sync(0xffffffffu, exists && listed == wanted);
      if (exists && listed == wanted) {
        indices[count + __popc(chosen & ((1u << lane) - 1))] = column;
      }
      count += __popc(chosen);
    }
    if (wanted && lane == 0) {
      params.counts[row] = count;
    }
  }
}

}  // namespace fastattn::sm90

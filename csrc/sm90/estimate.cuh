// The estimate of estimate_blocks: a thread block judges the scores of one query tile of a head after the other.
//
//   producer warp       take a query tile, load Q; load each key tile whose blocks are not all near       (into rings)
//   consumer warpgroup  for each key tile: S = Q Kᵀ in integers; does a score reach its floor? mark its block
//
// A second kernel makes lists of the marks.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/sink_and_window.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/block.cuh"
#include "sm90/config.hpp"
#include "sm90/key_terms.cuh"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

// What both kernels know of a problem.
struct EstimateParams {
  TensorMap<int> q, k;
  int num_q, num_k;  // all tokens
  int query_stride;  // row i of q is query i · query_stride
  bool causal;
  const float *q_scales, *k_scales, *floor;
  KeyTerms terms;
  float scale;
  int run_shift;  // 2^run_shift tokens of keys have four scales
  TileShape block;
  int sink, window;
  int batch, heads, heads_per_kv_head, q_tiles;
  std::int32_t *counts, *indices;
  std::uint8_t* marks;  // [batch, heads, query blocks, key blocks], zeros before
  WorkQueue works;      // query tiles of all heads

  __device__ int num_rows() const { return ceil_div(num_q, query_stride); }
  __device__ int blocks_q() const { return ceil_div(num_q, block.q); }
  __device__ int blocks_k() const { return ceil_div(num_k, block.k); }
  __device__ int column_of(int key) const { return key >> (block.k == 128 ? 7 : 6); }
  __device__ SinkAndWindow near(int row) const { return sink_and_window(row, num_q, num_k, block, sink, window); }
  // A query sees the first keys, so many.
  __device__ int seen_keys(int query) const {
    return causal ? max_of(0, min_of(query + num_k - num_q + 1, num_k)) : num_k;
  }
};

// A judgement is short and waits often: four warpgroups hide more of that than two with two accumulators each.
inline constexpr Config kEstimate[] = {{.head_dim = 64, .tile = {256, 128}, .stages = 6, .warpgroups = 4},
                                       {.head_dim = 128, .tile = {256, 128}, .stages = 6, .warpgroups = 4}};

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
    TermTile<kTile.k> key_terms[kStages];
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
    divide_block<kConfig>(
        [&] {
          shared.q_ring.init(kWarpgroups);
          shared.k_ring.init(kWarpgroups);
        },
        [&] { produce(params, shared); }, [&](int warpgroup) { consume(params, shared, warpgroup); });
  }

  // Reports the key tiles of a query tile, without those whose blocks are all listed anyway.
  template <class Report>
  static __device__ void far_runs(const Params& params, int q_tile, Report&& report) {
    const int queries = kTile.q * params.query_stride, first_query = q_tile * queries;
    const int last_query = min_of(first_query + queries, params.num_q) - 1;
    const bool is_whole = last_query - first_query + 1 == queries;
    const int end = ceil_div(params.seen_keys(last_query), kTile.k);
    const int full_end = is_whole ? params.seen_keys(first_query) / kTile.k : 0;
    const auto report_between = [&](int first, int last) {
      const int middle = max_of(first, min_of(last, full_end));
      if (first < middle) {
        report(TileRun{first, middle - first, Coverage::kFull});
      }
      if (middle < last) {
        report(TileRun{middle, last - middle, Coverage::kPartial});
      }
    };
    // The windows of all rows of blocks have these in common: rows move on to the right.
    const int columns = kTile.k / params.block.k;
    const SinkAndWindow of_first = params.near(first_query / params.block.q);
    const Interval window{params.near(last_query / params.block.q).window.begin, of_first.window.end};
    const int sink_end = min_of(of_first.sink, params.blocks_k()) / columns;
    const int window_begin = max_of(sink_end, ceil_div(max_of(window.begin, 0), columns));
    const int window_end = max_of(window_begin, window.end / columns);
    report_between(sink_end, min_of(window_begin, end));
    report_between(window_end, end);
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
      announce([&](auto&& report) { far_runs(params, work.q_tile, [&](TileRun run) { report(work.head, run); }); },
               [&](Announcement run) {
                 if (run.count == 0) {
                   shared.k_ring.fill(position.k, 0, run, [](Barrier&) {});
                   position.k.advance();
                 }
                 for (int k_tile = run.first; k_tile < run.first + run.count; ++k_tile) {
                   TermTile<kTile.k>& key_terms = shared.key_terms[position.k.stage];
                   const int bytes = KeyTile::kBytes + params.terms.bytes(key_terms, k_tile);
                   shared.k_ring.fill(position.k, bytes, run, [&](Barrier& full) {
                     params.k.load(shared.k[position.k.stage], k_tile * kTile.k, kv_head, work.batch, full);
                     params.terms.load(key_terms, work.batch, work.head, k_tile, full);
                   });
                   position.k.advance();
                 }
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

  // One query tile against all of its key tiles.
  static __device__ void judge(const Params& params, Shared& shared, Work work, int warpgroup, Positions& position) {
    const AccumulatorThread at(threadIdx.x % kWarpgroupThreads);
    const int first_row = warpgroup * kWarpgroupRows, num_rows = params.num_rows(), num_k = params.num_k;
    const std::int64_t head = std::int64_t{work.batch} * params.heads + work.head;
    const int scales_of_head = ceil_div(num_k, 1 << params.run_shift) * 4;
    const float* const key_scales =
        params.k_scales + head / params.heads_per_kv_head * scales_of_head + at.first_column / 2;
    float query_scale[2], floor[2];
    int seen_keys[2];
    std::uint8_t* marks[2];  // of the rows' blocks
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = work.q_tile * kTile.q + first_row + at.row(h);
      const std::int64_t place = head * num_rows + min_of(row, num_rows - 1);
      query_scale[h] = __fmul_rn(params.scale, params.q_scales[place]);
      floor[h] = params.floor[place];
      const int query = row * params.query_stride;
      seen_keys[h] = row < num_rows ? params.seen_keys(query) : 0;
      marks[h] = params.marks + (head * params.blocks_q() + query / params.block.q) * params.blocks_k();
    }

    const auto judge_tile = [&](int k_tile, Coverage run_coverage) {
      const int first_key = k_tile * kTile.k;
      float key_scale[kRuns];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {  // the last runs of a head may have no scale, and are masked then
        key_scale[i] =
            key_scales[min_of((first_key + 32 * i) >> params.run_shift, (num_k - 1) >> params.run_shift) * 4];
      }
      shared.k_ring.wait(position.k);
      std::uint32_t sums[kScores];
      wgmma::pin(sums);
      wgmma::fence();
      wgmma::multiply<std::int8_t, kHeadDim>(shared.q[position.q.stage].k_major(first_row),
                                             shared.k[position.k.stage].k_major(), sums, false);
      wgmma::commit();
      wgmma::wait<0>();
      wgmma::pin(sums);
      const auto judge_as = [&](auto coverage, auto with_terms) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const std::uint32_t kept =
              coverage() == Coverage::kFull ? ~0u : lane_bits_below(seen_keys[h] - first_key, at.first_column);
          bool reached[kHalves] = {};
#pragma unroll
          for (int i = 0; i < kRuns; ++i) {
            const Run of_run{sums, i, h, kept >> (8 * i) & 0xffu};
            const float scale = __fmul_rn(query_scale[h], key_scale[i]);
            bool& reached_here = reached[i / (kRuns / kHalves)];
            if constexpr (with_terms()) {
              const float* const terms = &shared.key_terms[position.k.stage].term[at.first_column];
              reached_here |= of_run.reaches(scale, floor[h], terms);
            } else {
              reached_here |= of_run.reaches(scale, floor[h]);
            }
          }
          // Whoever marks a block writes the same.
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            if (reached[half]) {
              marks[h][params.column_of(first_key + half * (kTile.k / kHalves))] = 1;
            }
          }
        }
      };
      with_coverage(run_coverage, [&](auto coverage) {
        params.terms.exist() ? judge_as(coverage, std::true_type{}) : judge_as(coverage, std::false_type{});
      });
      shared.k_ring.release(position.k);
      position.k.advance();
    };

    for (Announcement run{}; !run.last;) {
      run = shared.k_ring.next(position.k);
      if (run.count == 0) {
        shared.k_ring.release(position.k);
        position.k.advance();
      }
      for (int k_tile = run.first; k_tile < run.first + run.count; ++k_tile) {
        judge_tile(k_tile, run.coverage);
      }
    }
  }

  template <class Body>
  static __device__ void with_coverage(Coverage coverage, Body&& body) {
    coverage == Coverage::kFull ? body(CoverageTag<Coverage::kFull>{}) : body(CoverageTag<Coverage::kPartial>{});
  }

  // Eight products of a row h with a run of 32 keys, of which this thread holds columns 8 j + first_column and the
  // next.
  struct Run {
    const std::uint32_t (&sums)[kScores];
    int run, h;
    std::uint32_t kept;  // a bit for each

    __device__ bool keeps(int i) const { return (kept >> i & 1) != 0; }
    __device__ int product(int i) const { return static_cast<int>(sums[16 * run + i / 2 * 4 + 2 * h + i % 2]); }

    // Does one of the scores reach the floor? They share a scale that is not negative, or NaN: the greatest product
    // decides, whatever the rounding.
    __device__ bool reaches(float scale, float floor) const {
      int greatest = INT_MIN;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        greatest = max_of(greatest, keeps(i) ? product(i) : INT_MIN);
      }
      return kept != 0 && !(__fmul_rn(scale, __int2float_rn(greatest)) < floor);
    }

    // The same with a term of each key, from this thread's first column on.
    __device__ bool reaches(float scale, float floor, const float* terms) const {
      float greatest = -kInfinity;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 term = *reinterpret_cast<const float2*>(&terms[32 * run + 8 * j]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float score = __fmaf_rn(scale, __int2float_rn(product(2 * j + e)), e == 0 ? term.x : term.y);
          greatest = larger_or_nan(greatest, keeps(2 * j + e) ? score : -kInfinity);
        }
      }
      return kept != 0 && !(greatest < floor);
    }
  };
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
  const int seen_keys = params.seen_keys(min_of((block_row + 1) * params.block.q, params.num_q) - 1);
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

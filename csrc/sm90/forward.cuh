// The forward kernel: a thread block computes the output of one query tile of a head after the other.
//
//   producer warp       take a query tile, load Q; for each key tile of the schedule: load K, load V      (into rings)
//   consumer warpgroup  for each key tile: S = Q Kᵀ · score policy · O += P V; store O             (64 query rows each)
//
// The rings run on from one query tile to the next, whose first loads thus hide under the last products of the one
// before and under the store of its output.
//
// S of the next tile is issued together with P V of the last one, and warpgroups take turns at issuing, so that the
// score policy of one runs under the products of the others (FlashAttention-3, arXiv 2407.08608).
#pragma once

#include <cstdint>
#include <type_traits>

#include "fastattn/schedule/schedule.hpp"
#include "fastattn/score/score.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/block.cuh"
#include "sm90/config.hpp"
#include "sm90/operands.cuh"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"
#include "sm90/work_order.hpp"

namespace fastattn::sm90 {

template <class Variant>
struct ForwardParams {
  using Origin = OriginOf<typename Variant::Schedule>;  // of keys
  TensorMap<QueryOriginOf<typename Variant::Schedule>> q;
  TensorMap<Origin> k;
  typename Variant::Operands::template ValueMap<Origin> v;
  typename Variant::Schedule schedule;  // of all heads
  typename Variant::Score score;        // of all heads
  typename Variant::Epilogue epilogue;
  int heads, heads_per_kv_head;
  WorkOrder order;  // of the query tiles of all heads
  WorkQueue works;
  [[no_unique_address]] typename Variant::Operands::Scales scales;
};

template <class Variant, int kIndex>
struct ForwardKernel {
  static constexpr Config kConfig = Variant::kForward[kIndex];
  static constexpr TileShape kTile = kConfig.tile;
  static constexpr int kHeadDim = kConfig.head_dim, kValueDim = kConfig.value_dim;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kQueryStages = kConfig.query_stages;
  static constexpr int kWarpgroups = kConfig.warpgroups;
  static_assert(kTile.q == kWarpgroups * kWarpgroupRows && kTile.k <= 256);  // 64 scores of a row in each lane

  using Operands = typename Variant::Operands;
  using Key = typename Operands::Key;
  using Score = typename Variant::Score;
  using Params = ForwardParams<Variant>;

  // Is a run read before it begins? With three warpgroups the products of two others fill the gap (lists are 1.5 %
  // slower). Weights of 8 bits, wide outputs and the masks of a grid leave no registers for it.
  static constexpr bool kLooksAhead = kWarpgroups == 2 && kHeadDim <= 128 &&
                                      sizeof(typename Operands::Weight) == sizeof(std::uint16_t) &&
                                      !std::is_same_v<typename Params::Origin, PerAxis<int>>;

  using QueryTile = SharedTile<Key, kTile.q, kHeadDim>;
  using KeyTile = SharedTile<Key, kTile.k, kHeadDim>;
  using KeyTermTile = typename Operands::template KeyTermTile<kTile>;
  using ValueTile = typename Operands::template ValueTile<kTile, kValueDim>;
  using Staging = SharedTile<typename Operands::Staged, kTile.q, kValueDim>;  // of the output

  // A schedule that is read from memory is handed on by the producer.
  using Schedules = typename Variant::Schedule;
  using Schedule = decltype(std::declval<const Schedules&>().at(0, 0));
  static constexpr bool kHandsOn = Schedules::kInMemory;

  // Which query tile of which head.
  struct alignas(16) QueryTileWork {
    int q_tile, head, sequence;
    bool exists;
  };
  // (With [[no_unique_address]] instead nvcc 13.0 copies a message from the place of the empty member on.)
  struct ScheduledWork : QueryTileWork {
    Schedule schedule;
  };
  using Work = std::conditional_t<kHandsOn, ScheduledWork, QueryTileWork>;

  static __device__ Work work_at(const Params& params, int index) {
    const WorkOrder::Place place = params.order.at(index);
    const int q_tile = params.order.tiles - 1 - place.rank;
    const SequenceTile tile = sequence_tile(params.schedule, place.head / params.heads, q_tile, kTile);
    Work work{};
    work.q_tile = tile.q_tile;
    work.head = place.head % params.heads;
    work.sequence = tile.sequence;
    work.exists = true;
    return work;
  }

  // The output's rows take the place of the queries that a warpgroup is done with, where their panels are as wide.
  static constexpr bool kStagedInQueries =
      Staging::kPanelBytes == QueryTile::kPanelBytes && Staging::kPanels <= QueryTile::kPanels;

  struct Shared {
    QueryTile q[kQueryStages];
    KeyTile k[kStages];
    ValueTile v[kStages];
    std::conditional_t<kStagedInQueries, Nothing, Staging> output;
    KeyTermTile key_terms[kStages];
    Ring<kQueryStages, Work> q_ring;
    Ring<kStages, Announcement> k_ring;
    Ring<kStages> v_ring;

    __device__ Staging& staging([[maybe_unused]] int q_stage) {
      if constexpr (kStagedInQueries) {
        return reinterpret_cast<Staging&>(q[q_stage]);
      } else {
        return output;
      }
    }
  };

  struct Positions {
    RingPosition<kQueryStages> q;
    RingPosition<kStages> k, v;
  };

  using Turns = WarpgroupTurns<kWarpgroups, kWarpgroups>;  // the barriers before these are the epilogue's

  static __device__ void run(const Params& params) {
    if constexpr (requires { Variant::Epilogue::kContinues; }) {
      cudaTriggerProgrammaticLaunchCompletion();  // the kernel that goes on with the output may be launched
    }
    extern __shared__ std::byte shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    divide_block<kConfig>(
        [&] {
          shared.q_ring.init(kWarpgroups);
          shared.k_ring.init(kWarpgroups);
          shared.v_ring.init(kWarpgroups);
        },
        [&] { produce(params, shared); }, [&](int warpgroup) { consume(params, shared, warpgroup); });
  }

  static __device__ void produce(const Params& params, Shared& shared) {
    Positions position;
    int index = params.works.first();
    while (index < params.works.count) {
      Work work = work_at(params, index);
      const Schedule schedule = params.schedule.at(work.sequence, work.head);
      if constexpr (kHandsOn) {
        if (work.q_tile * kTile.q >= schedule.num_q) {  // past the end of a sequence
          index = params.works.next();
          continue;
        }
        work.schedule = schedule;
      }
      const int batch = batch_of(params.schedule, work.sequence);
      const int kv_head = work.head / params.heads_per_kv_head;
      const auto query_origin = schedule.query_origin(work.q_tile, kTile);
      shared.q_ring.fill(position.q, QueryTile::kBytes, work, [&](Barrier& full) {
        params.q.load(shared.q[position.q.stage], query_origin, work.head, batch, full);
      });
      position.q.advance();

      bool values_pending = false;  // values run one tile behind keys, as in the consumer
      typename Params::Origin values_origin{};
      const auto load_values = [&] {
        if (values_pending) {
          shared.v_ring.fill(position.v, ValueTile::kBytes, {}, [&](Barrier& full) {
            params.v.load(shared.v[position.v.stage], values_origin, kv_head, batch, full);
          });
          position.v.advance();
        }
      };
      announce(
          [&](auto&& report) {
            auto cursor = schedule.runs(work.q_tile, kTile);
            for (TileRun run; cursor.next(run);) {
              report(work.head, run);
            }
          },
          [&](Announcement run) {
            if (run.count == 0) {
              shared.k_ring.fill(position.k, 0, run, [](Barrier&) {});
              position.k.advance();
            }
            for (int k_tile = run.first; k_tile < run.first + run.count; ++k_tile) {
              const auto origin = schedule.key_origin(k_tile, kTile);  // found before there is a stage to wait for
              KeyTermTile& key_terms = shared.key_terms[position.k.stage];
              const int bytes = KeyTile::kBytes + params.scales.terms.bytes(key_terms, k_tile);
              shared.k_ring.fill(position.k, bytes, run, [&](Barrier& full) {
                params.k.load(shared.k[position.k.stage], origin, kv_head, batch, full);
                params.scales.terms.load(key_terms, batch, work.head, k_tile, full);
              });
              position.k.advance();
              load_values();
              values_pending = true;
              values_origin = origin;
            }
          });
      index = params.works.next();  // so late that no block holds work which another could begin
      load_values();
    }
    shared.q_ring.fill(position.q, 0, Work{}, [](Barrier&) {});
  }

  static __device__ void consume(const Params& params, Shared& shared, int warpgroup) {
    Positions position;
    const Turns turns(warpgroup);
    for (Work work; (work = shared.q_ring.next(position.q)).exists; position.q.advance()) {
      attend(params, shared, work, warpgroup, turns, position);
    }
    turns.finish();
  }

  // One query tile: leaves `position` where the next one begins, but for its queries.
  static __device__ void attend(const Params& params, Shared& shared, Work work, int warpgroup, const Turns& turns,
                                Positions& position) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const AccumulatorThread at(thread);
    const Score score = params.score.at(work.head);
    const int batch = batch_of(params.schedule, work.sequence), first_row = warpgroup * kWarpgroupRows;
    QueryTile& queries = shared.q[position.q.stage];
    // What was handed on is read anew for each use: it would take registers among the products.
    const auto schedule = [&] {
      if constexpr (kHandsOn) {
        return [&] { return shared.q_ring.messages[position.q.stage].schedule; };
      } else {
        return [own = params.schedule.at(work.sequence, work.head)] { return own; };
      }
    }();
    const auto token_of = [&](int row) {
      if constexpr (kHandsOn) {
        return schedule().query_token(work.q_tile, first_row + row, kTile);
      } else {
        return params.schedule.slots().query_token(work.q_tile, first_row + row, kTile);
      }
    };
    const auto scales = params.scales.at(batch, work.head, params.heads, params.heads_per_kv_head, token_of, at);

    Products<wgmma::Sum<Key>, kTile.k / 2> scores;
    typename Operands::template Output<kTile, kValueDim> out;
    typename Score::State state[2];

    const auto issue_scores = [&] {
      wgmma::pin(scores.sums());
      wgmma::fence();
      wgmma::multiply<Key, kHeadDim>(queries.k_major(first_row), shared.k[position.k.stage].k_major(), scores.sums(),
                                     false);
      wgmma::commit();
    };
    const auto issue_output = [&] { out.issue(shared.v[position.v.stage]); };
    const auto release = [](auto& ring, auto& at) {
      ring.release(at);
      at.advance();
    };
    // Masks the scores and calls use(rows). The keys are handed back on the way.
    const auto use_rows = [&](int k_tile, Coverage coverage, std::uint16_t cells, auto of_keys, auto&& use) {
      const auto ready = [&] {
        release(shared.k_ring, position.k);
        if (coverage == Coverage::kPartial) {
          kept_bits(schedule().tile_mask(work.q_tile, k_tile, kTile, cells), first_row, at)
              .apply(scores.value, -kInfinity);
        }
      };
      params.scales.template use_rows<Score>(scales, of_keys, scores, out, shared.key_terms[position.k.stage], at,
                                             coverage == Coverage::kFull, ready, use);
    };
    // Scores become weights; decay is what the output so far must be multiplied by.
    float decay[2];
    const auto absorb = [&](const auto& rows) {
      rows.each([&](const auto& row, int h) { decay[h] = score.absorb(state[h], row); });
    };
    const auto take_weights = [&] { out.take_weights(scores.value, state); };
    // The same for a policy that needs nothing but the scores. To be called after finish_output().
    const auto weigh_each = [&](auto) {
      if constexpr (Score::kElementwise) {
        score.weigh(RoundedRows<typename Operands::Weight, kTile.k / 2>{scores.value, out.weights});
      }
    };
    // The product of the last tile is done, and its weights' registers are free.
    const auto finish_output = [&] {
      wgmma::wait<0>();
      out.finish();
      release(shared.v_ring, position.v);
    };

    Announcement run = shared.k_ring.next(position.k);
    if (run.count == 0) {
      release(shared.k_ring, position.k);
    } else {
      // The run after this one, read when the keys of this one's last tile were handed back: P V is under way then.
      Announcement next_run;
      const auto look_ahead = [&](int k_tile) {
        if (kLooksAhead && k_tile + 1 == run.first + run.count && !run.last) {
          next_run = shared.k_ring.next(position.k);
        }
      };
      const auto of_keys = scales.of_keys(run.first);
      turns.wait();
      issue_scores();
      turns.pass();
      wgmma::wait<0>();
      wgmma::pin(scores.sums());
      if constexpr (Score::kElementwise) {
        use_rows(run.first, run.coverage, run.cells, of_keys, weigh_each);
      } else {
        use_rows(run.first, run.coverage, run.cells, of_keys, absorb);
        take_weights();
      }
      look_ahead(run.first);
      ++run.first, --run.count;

      const auto step = [&](int k_tile, auto coverage, std::uint16_t cells) {
        const auto of_keys = scales.of_keys(k_tile);
        shared.k_ring.wait(position.k);
        turns.wait();
        issue_scores();
        shared.v_ring.wait(position.v);
        issue_output();
        turns.pass();
        wgmma::wait<1>();
        wgmma::pin(scores.sums());
        if constexpr (Score::kElementwise) {
          use_rows(k_tile, coverage(), cells, of_keys, [&](const auto& rows) {
            look_ahead(k_tile);
            finish_output();
            weigh_each(rows);
          });
        } else if constexpr (Score::kOptimistic) {
          use_rows(k_tile, coverage(), cells, of_keys, [&](const auto& rows) {
            const auto original = scores;
            float sum[2];
            look_ahead(k_tile);
            finish_output();
            rows.each([&](const auto& row, int h) { sum[h] = score.weigh(state[h], row); });
            take_weights();
            if (__all_sync(0xffffffffu, score.is_near(sum[0]) && score.is_near(sum[1]))) {
              score.add(state[0], sum[0]);
              score.add(state[1], sum[1]);
            } else {  // seldom: once more, with a look at the largest scores
              scores = original;
              absorb(rows);
              take_weights();
              out.rescale(decay);
            }
          });
        } else {
          use_rows(k_tile, coverage(), cells, of_keys, absorb);
          look_ahead(k_tile);
          finish_output();
          take_weights();
          if (__any_sync(0xffffffffu, decay[0] != 1.f || decay[1] != 1.f) || out.is_due()) {
            out.rescale(decay);  // seldom, as the policy sees to
          }
        }
      };
      for (;;) {
        for_each_tile(run, step);
        if (run.last) {
          break;
        }
        run = kLooksAhead ? next_run : shared.k_ring.next(position.k);
      }

      shared.v_ring.wait(position.v);
      issue_output();
      finish_output();
    }

    const RowResult rows[2] = {score.finish(state[0], sum_over_row), score.finish(state[1], sum_over_row)};
    if constexpr (!kStagedInQueries) {
      cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, warpgroup);  // all have read the output of the tile before
    }
    params.epilogue.store(out.total(), rows, shared.staging(position.q.stage), warpgroup, batch, work.head, token_of);
    publish_shared();  // the next queries are copied over what this thread has read
    shared.q_ring.release(position.q);
  }
};

template <class Variant, int kIndex>
__global__ void __launch_bounds__((ForwardKernel<Variant, kIndex>::kWarpgroups + 1) * kWarpgroupThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams<Variant> params) {
  ForwardKernel<Variant, kIndex>::run(params);
}

}  // namespace fastattn::sm90

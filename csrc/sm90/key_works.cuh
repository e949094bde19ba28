// Thread blocks that stay and take one key tile after the other: how a block's warps learn of its works, the tiles that
// stream past, and turns at sums of dQ.
#pragma once

#include <cstdint>

#include "fastattn/schedule/schedule.hpp"
#include "sm90/backward.cuh"
#include "sm90/block.cuh"
#include "sm90/key_tile.cuh"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"

namespace fastattn::sm90 {

// The works that a block takes, told to its other warps by the producer, which alone asks the queue. There are places
// for more than are under way: producer and consumers are at most the stages of queries apart, a tile each.
template <int kStages>
struct TakenWorks {
  static constexpr int kPlaces = kStages + 2;
  KeyTileWork works[kPlaces];  // work i at place_of(i)
  int count;

  static __device__ int place_of(int index) { return index % kPlaces; }

  // The producer, one lane, once the work is written down, and before its first query tile is on its way.
  __device__ void tell(int index) {
    asm volatile("st.release.cta.shared::cta.s32 [%0], %1;" ::"r"(address()), "r"(index + 1) : "memory");
  }
  // Consumers, once a query tile of it is there.
  __device__ const KeyTileWork& operator[](int index) const { return works[place_of(index)]; }
  // A warp that does not wait for query tiles.
  __device__ KeyTileWork wait(int index) const {
    int told;
    do {
      asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];" : "=r"(told) : "r"(address()) : "memory");
    } while (told <= index);
    return works[place_of(index)];
  }

 private:
  __device__ std::uint32_t address() const { return static_cast<std::uint32_t>(__cvta_generic_to_shared(&count)); }
};

// How the warps of a thread block learn that it is its turn to add to a query tile, and tell that they have.
template <int kStages>
struct Turns {
  Barrier come[kStages], passed[kStages];

  __device__ void init(int consumer_warpgroups) {
    for (int i = 0; i < kStages; ++i) {
      come[i].init(1);
      passed[i].init(releases(consumer_warpgroups));
    }
  }
  __device__ void wait(RingPosition<kStages> at) { wait_for(come[at.stage], at.parity); }
};

// Assistant: waits for a work's turn at each of the query tiles, and passes it on. Key tiles take turns from the
// last to the first, which is the order in which blocks take them (a block waits only for others that run or are
// done), and in which under a causal mask they come to a query tile.
template <class Kernel>
__device__ void take_turns(const typename Kernel::Params& params, typename Kernel::Shared& shared) {
  if (!cute::elect_one_sync()) {
    return;
  }
  typename Kernel::Position at;
  KeyTileWork work = shared.works.wait(0);
  for (int index = 0; work.exists; work = shared.works.wait(++index)) {
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
}

// Zeros for dK and dV of a key tile that no query sees, by a whole warp.
template <class Kernel>
__device__ void clear_keys(const typename Kernel::Params& params, const KeyTileWork& work) {
  using Element = typename Kernel::Element;
  constexpr int kUnits = Kernel::kHeadDim / 8;
  const auto place = slots_of(params.schedule, work.sequence);
  for (const TensorView* to : {&params.dk, &params.dv}) {
    if (to->data == nullptr || work.summed >= 0) {
      continue;
    }
#pragma unroll 1
    for (int i = thread_anew() % 32; i < Kernel::kTile.k * kUnits; i += 32) {
      const int token = place.key_token(work.k_tile * Kernel::kTile.k + i / kUnits), column = i % kUnits * 8;
      if (token >= 0 && column < to->head_dim()) {
        *reinterpret_cast<uint4*>(to->template row<Element>(work.batch, token, work.kv_head) + column) = uint4{};
      }
    }
  }
}

// Producer of a block that stays: for each key tile that it takes, K and V, and the query tiles that see it, with lse2
// and delta. K arrives with the first Q and V with the first dO, so that a key tile that no query sees is never loaded.
// It has 24 registers: what it need not remember it writes down, or makes again from the number of works. (By a member
// function of TakenWorks it would spill three times as many words in walking a list.)
template <class Kernel>
__device__ void stream_works(const typename Kernel::Params& params, typename Kernel::Shared& shared) {
  using KeyTile = typename Kernel::KeyTile;
  using QueryTile = typename Kernel::QueryTile;
  constexpr TileShape kTile = Kernel::kTile;
  constexpr bool kStatistics = Kernel::Score::kRowStatistics;
  constexpr int kRowBytes = kStatistics ? kTile.q * sizeof(float) : 0;
  typename Kernel::Position at;
  int works = 0;  // that queries see
  for (int index = params.works.first(); index < params.works.count; index = params.works.next()) {
    const KeyTileWork work = key_tile_work<Kernel>(params, index);
    if (!work.exists) {
      continue;
    }
    if (cute::elect_one_sync()) {
      shared.works.works[shared.works.place_of(works)] = work;
    }
    const auto place = slots_of(params.schedule, work.sequence);
    const auto key_origin = place.key_origin(work.k_tile, kTile);
    bool first = true;
    announce([&](auto&& report) { visit_queries<Kernel>(params, work, report); },
             [&](Announcement run) {
               if (run.count == 0) {
                 clear_keys<Kernel>(params, work);
                 return;
               }
               for (int q_tile = run.first; q_tile < run.first + run.count; ++q_tile) {
                 const std::int64_t tile = first_tile_of<Kernel>(params, work, run.head) + q_tile;
                 const auto origin = place.query_origin(q_tile, kTile);
                 const auto k_at = RingPosition<Kernel::kKeyStages>::after(works);
                 const auto v_at = RingPosition<Kernel::kValueStages>::after(works);
                 if (first) {
                   shared.k_free[k_at.stage].wait(k_at.parity ^ 1);
                 }
                 if (cute::elect_one_sync()) {
                   if constexpr (Kernel::kTileBehind) {
                     shared.sums[at.slot()] = static_cast<int>(tile);
                   }
                   if (first) {
                     shared.works.tell(works);
                   }
                 }
                 const int bytes = QueryTile::kBytes + kRowBytes + (first ? KeyTile::kBytes : 0);
                 shared.q_ring.fill(at, bytes, run, [&](Barrier& full) {
                   if (first) {
                     params.k.load(shared.k[k_at.stage], key_origin, work.kv_head, work.batch, full);
                   }
                   params.q.load(shared.q[at.stage], origin, run.head, work.batch, full);
                   if constexpr (kStatistics) {
                     load_bytes(shared.lse2[at.stage], params.workspace.lse2 + tile * kTile.q, kRowBytes, full);
                   }
                 });
                 if (first) {
                   shared.v_free[v_at.stage].wait(v_at.parity ^ 1);
                 }
                 shared.dout_ring.fill(at, bytes, {}, [&](Barrier& full) {
                   if (first) {
                     params.v.load(shared.v[v_at.stage], key_origin, work.kv_head, work.batch, full);
                   }
                   params.dout.load(shared.dout[at.stage], origin, run.head, work.batch, full);
                   if constexpr (kStatistics) {
                     load_bytes(shared.delta[at.stage], params.workspace.delta + tile * kTile.q, kRowBytes, full);
                   }
                 });
                 works += first;
                 first = false;
                 at.advance();
               }
             });
  }
  if (cute::elect_one_sync()) {
    shared.works.works[shared.works.place_of(works)].exists = false;
    shared.works.tell(works);
  }
  shared.q_ring.fill(at, 0, {.head = -1}, [](Barrier&) {});  // there is no other
}

}  // namespace fastattn::sm90

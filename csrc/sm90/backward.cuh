// The backward, in kernels for two kinds of tiles:
//
//   key_gradients.cuh    a thread block takes one key tile after the other, and walks the query tiles that see it: dK,
//                        dV, and dQ as sums over key tiles in memory, or without dQ; wide_key_gradients.cuh, for long
//                        rows, owns one, without dQ
//   query_gradients.cuh  a thread block owns a query tile and walks the key tiles it sees: dQ
//
// All three gradients at once are five matrix products a score, dK and dV four and dQ three: the first way is the
// fastest where a row is short, also in one order of summation, if key tiles take turns. The two after each other
// always have one, and are all there is for long rows; each by itself is what is left to do where the other's gradients
// are not wanted.
//
// Before them, `prepare_kernel` computes each row's delta; after sums in memory, `finish_kernel` scales those of dQ,
// rounds them and puts them in order, and `finish_keys_kernel` those of dK and dV.
#pragma once

#include <cstdint>

#include "fastattn/portable.hpp"
#include "fastattn/schedule/schedule.hpp"
#include "fastattn/tensor_view.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/key_sums.hpp"
#include "sm90/modifier.cuh"
#include "sm90/output.cuh"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"
#include "sm90/work_order.hpp"

namespace fastattn::sm90 {

// Room for the counter of a WorkQueue, as much as leaves what follows it aligned.
inline constexpr std::int64_t kTakenBytes = 256;

// The caller's workspace, for the slots of whole query tiles. Scores without row statistics have no lse2 and delta.
struct BackwardWorkspace {
  int* taken;    // a WorkQueue's; zeroed with the sums of dQ, which follow it
  float* lse2;   // [batch, heads, query slots]: base-2 log-sum-exp, +∞ where a row keeps nothing or does not exist
  float* delta;  // likewise: Σ(out · dout) − dlse, or the row's share of the gradient of a score's bias
  float* dq;     // [batch, heads, query tiles, warpgroups, 8, 128, 4]: 64 × 64 pieces in register order; null: no sums
  int* turns;    // [batch, heads, query tiles]: how many key tiles have added to a query tile; null: not in turns
};

template <class Variant>
struct BackwardParams {
  using Origin = OriginOf<typename Variant::Schedule>;
  TensorMap<Origin> q, k, v, dout;
  TensorView dq, dk, dv;                // without data: not wanted
  typename Variant::Schedule schedule;  // of all heads; as in the forward: queries × keys
  typename Variant::Score score;        // of all heads
  typename Variant::Modifier modifier;
  float scale;
  float* dbias;      // [heads], for a score with a bias; may be null
  float* dkey_bias;  // [batch, heads, num_keys], for biases of keys; may be null
  int num_keys;      // of the tensors
  BackwardWorkspace workspace;
  int heads, heads_per_kv_head;
  int head_works;      // works of a tile and batch entry: one for each key head, or, if the tile is of queries or a
                       // work for one head of a group, for each query head
  int heads_per_work;  // of queries
  int q_tiles;         // of a head
  WorkOrder order;     // of the works: tiles, or shares of them
  KeySums key_sums;
  WorkQueue works;
};

inline constexpr int kPiece = 64;  // sums in memory are of 64 × 64 pieces, one of a warpgroup

// A kernel that is one of the structs above.
template <class Kernel>
__global__ void __launch_bounds__((Kernel::kWarpgroups + 1) * kWarpgroupThreads, 1)
    gradient_kernel(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

inline constexpr int kHelperThreads = 256;

// prepare_kernel: so many threads a row, 16 bytes of it each; so many rows a thread, whose copies are under way
// together.
template <class Kernel>
inline constexpr int kRowLanes = Kernel::kHeadDim / 8;
inline constexpr int kRowsOfThread = 4;
template <class Kernel>
inline constexpr int kRowsOfBlock = kHelperThreads / kRowLanes<Kernel> * kRowsOfThread;

template <class Schedules>
struct PrepareParams {
  TensorView out, dout;
  const float* lse;   // [batch, heads, tokens]
  const float* dlse;  // likewise, or null
  BackwardWorkspace workspace;
  Schedules schedule;
  int q_tiles, blocks_of_head;
};

// lse2 and delta of every row, and zeros for the sums of dQ, for a kernel.
template <class Kernel, class Schedules>
__global__ void prepare_kernel(const __grid_constant__ PrepareParams<Schedules> params) {
  using Element = typename Kernel::Element;
  constexpr TileShape kTile = Kernel::kTile;
  constexpr int kLanes = kRowLanes<Kernel>, kUnit = 8;  // elements of 16 bytes
  static_assert(kRowsOfThread <= kLanes);
  const int head_index = static_cast<int>(blockIdx.x) / params.blocks_of_head;
  const int heads = static_cast<int>(params.out.heads()), head = head_index % heads, batch = head_index / heads;
  const int first_slot = static_cast<int>(blockIdx.x) % params.blocks_of_head * kRowsOfBlock<Kernel>;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, column = lane * kUnit;
  const auto slot_of = [&](int i) {
    return first_slot + (i * kHelperThreads + static_cast<int>(threadIdx.x)) / kLanes;
  };
  const int slots = params.q_tiles * kTile.q;
  const std::int64_t first_row = std::int64_t{head_index} * slots;
  const auto token_of = [&](int slot) {
    if (slot >= slots) {
      return -1;
    }
    const SequenceTile at = sequence_tile(params.schedule, batch, slot / kTile.q, kTile);
    return slots_of(params.schedule, at.sequence).query_token(at.q_tile, slot % kTile.q, kTile);
  };

  const Element* const first_out = params.out.template row<const Element>(batch, 0, head) + column;
  const Element* const first_dout = params.dout.template row<const Element>(batch, 0, head) + column;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *params.workspace.taken = 0;
  }
  std::uint32_t out[kRowsOfThread][4] = {}, dout[kRowsOfThread][4] = {};
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    const std::int64_t token = token_of(slot_of(i));
    if (token >= 0 && column < params.out.head_dim()) {
      reinterpret_cast<uint4&>(out[i]) = *reinterpret_cast<const uint4*>(first_out + token * params.out.stride[1]);
      reinterpret_cast<uint4&>(dout[i]) = *reinterpret_cast<const uint4*>(first_dout + token * params.dout.stride[1]);
    }
  }
  // Each lane has the statistics of one of the rows.
  const int own_slot = slot_of(lane);
  const bool has_row = lane < kRowsOfThread && own_slot < slots;
  float lse = -kInfinity, dlse = 0.f;
  if (const int token = has_row ? token_of(own_slot) : -1; token >= 0) {
    const std::int64_t at = std::int64_t{head_index} * params.out.seq() + token;
    lse = params.lse[at];
    dlse = params.dlse == nullptr ? 0.f : params.dlse[at];
  }
  if (params.workspace.dq != nullptr) {
    float4* const sums = reinterpret_cast<float4*>(params.workspace.dq + first_row * (kLanes * kUnit));
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      if (slot_of(i) < slots) {
        float4* const row = sums + std::int64_t{slot_of(i)} * (2 * kLanes);
        row[lane] = row[kLanes + lane] = float4{};
      }
    }
  }
  float own_sum = 0.f;
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    // Else the compiler takes the halves of a word apart as soon as it is there, and waits for each row before the
    // next.
    wgmma::pin(out[i]);
    wgmma::pin(dout[i]);
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 p = DeviceElement<Element>::unpack(out[i][j]), q = DeviceElement<Element>::unpack(dout[i][j]);
      sum += p.x * q.x + p.y * q.y;
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    own_sum = lane == i ? sum : own_sum;
  }
  if (has_row) {
    params.workspace.lse2[first_row + own_slot] = lse == -kInfinity ? kInfinity : lse * kLog2E;
    params.workspace.delta[first_row + own_slot] = own_sum - dlse;
  }
}

struct BiasParams {
  float* dbias;         // [heads]
  const float* shares;  // [batch, heads, slots]
  int batch, heads, slots;
};

// The gradient of each head's bias, a block for each: its rows' shares, always in the same order.
template <int kThreads>
__global__ void sum_bias_kernel(const __grid_constant__ BiasParams params) {
  __shared__ float sums[kThreads];
  float sum = 0.f;
  for (int batch = 0; batch < params.batch; ++batch) {
    const float* shares = params.shares + (std::int64_t{batch} * params.heads + blockIdx.x) * params.slots;
    for (int slot = static_cast<int>(threadIdx.x); slot < params.slots; slot += kThreads) {
      sum += shares[slot];
    }
  }
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0) {
    params.dbias[blockIdx.x] = sums[0];
  }
}

// Rounds a piece of sums, times `scale`, and puts it back in row order; rows that are blind, of a thread's two, are 0.
template <class Element, class TokenOf>
__device__ void finish_piece(const float* sums, float scale, const bool (&is_blind)[2], const TensorView& to,
                             std::int64_t batch, std::int64_t head, int first_column, TokenOf&& token_of) {
  __shared__ SharedTile<Element, kPiece, kPiece> staging;
  float value[kPiece / 2];
#pragma unroll
  for (int j = 0; j < kPiece / 8; ++j) {
    const float4 sum = *reinterpret_cast<const float4*>(sums + (j * kWarpgroupThreads + threadIdx.x) * 4);
    value[4 * j] = is_blind[0] ? 0.f : sum.x * scale;
    value[4 * j + 1] = is_blind[0] ? 0.f : sum.y * scale;
    value[4 * j + 2] = is_blind[1] ? 0.f : sum.z * scale;
    value[4 * j + 3] = is_blind[1] ? 0.f : sum.w * scale;
  }
  store_rows<Element>(value, staging, 0, threadIdx.x, 0, to, batch, head, first_column, token_of);
}

// dK = scale · the sums, and dV; one block per piece.
template <class Kernel>
__global__ void finish_keys_kernel(const __grid_constant__ typename Kernel::Params params) {
  constexpr int kAcross = Kernel::kHeadDim / kPiece, kPieces = Kernel::kWarpgroups * kAcross;
  const int piece = static_cast<int>(blockIdx.x) % kPieces, tile = static_cast<int>(blockIdx.x) / kPieces;
  const bool of_values = tile >= params.key_sums.tiles;
  const auto [head, rank] = params.key_sums.place_of(params.order, tile % params.key_sums.tiles);
  const int heads = static_cast<int>(params.dk.heads());
  const SequenceKeyTile at = sequence_key_tile(params.schedule, head / heads, rank, Kernel::kTile);
  const auto slots = slots_of(params.schedule, at.sequence);
  const int first_slot = at.k_tile * Kernel::kTile.k + piece / kAcross * kPiece;
  finish_piece<typename Kernel::Element>(
      params.key_sums.data + std::int64_t{blockIdx.x} * (kPiece * kPiece), of_values ? 1.f : params.scale,
      {false, false}, of_values ? params.dv : params.dk, batch_of(params.schedule, at.sequence), head % heads,
      piece % kAcross * kPiece, [&](int row) { return slots.key_token(first_slot + row); });
}

// dQ = scale · the sums; one block per piece. A row that sees nothing has 0: its sums are of 0 times keys, which may be
// NaN.
template <class Kernel>
__global__ void finish_kernel(const __grid_constant__ typename Kernel::Params params) {
  const int warpgroup = blockIdx.x % Kernel::kWarpgroups;
  const std::int64_t tile = blockIdx.x / Kernel::kWarpgroups;
  const int q_tile = static_cast<int>(tile % params.q_tiles);
  const std::int64_t heads = params.dq.heads(), head = tile / params.q_tiles % heads;
  const std::int64_t batch = tile / params.q_tiles / heads;
  const SequenceTile place = sequence_tile(params.schedule, static_cast<int>(batch), q_tile, Kernel::kTile);
  const int first_row = warpgroup % Kernel::kRowPieces * kPiece;  // of the tile

  const AccumulatorThread at(static_cast<int>(threadIdx.x));
  bool is_blind[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + at.row(h);
    if constexpr (Kernel::Score::kRowStatistics) {
      is_blind[h] = params.workspace.lse2[tile * Kernel::kTile.q + row] == kInfinity;
    }
    if constexpr (requires { slots_of(params.schedule, 0).is_blind(row); }) {  // a sink's log-sum-exp does not tell
      is_blind[h] |=
          params.schedule.at(place.sequence, static_cast<int>(head)).is_blind(place.q_tile * Kernel::kTile.q + row);
    }
  }
  const auto slots = slots_of(params.schedule, place.sequence);
  finish_piece<typename Kernel::Element>(
      params.workspace.dq + std::int64_t{blockIdx.x} * (kPiece * kPiece), params.scale, is_blind, params.dq,
      batch_of(params.schedule, place.sequence), head, warpgroup / Kernel::kRowPieces * kPiece,
      [&](int row) { return slots.query_token(place.q_tile, first_row + row, Kernel::kTile); });
}

}  // namespace fastattn::sm90

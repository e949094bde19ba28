// Attention in parts of the keys: what a part leaves behind, and how that is made whole.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/split.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/launch.cuh"
#include "sm90/ring.cuh"
#include "sm90/split_plan.hpp"

namespace fastattn::sm90 {

// What the parts leave behind: an output of its own for each, in float32, and its log-sum-exp. The heads are the
// kernel's.
struct PartialOutput {
  static constexpr bool kContinues = true;  // combine_kernel takes it up
  TensorView out;                           // [batch, slots, heads, value_dim], a head's slots one after the other
  float* lse;                               // [batch, heads, slots]

  static std::size_t rows(const Attention& p, const SplitBands& parts) {
    return static_cast<std::size_t>(p.q.batch()) * parts.heads() * parts.slots().num_q;
  }
  static std::size_t bytes(const Attention& p, const SplitBands& parts) {
    return rows(p, parts) * (static_cast<std::size_t>(p.v.head_dim()) + 1) * sizeof(float);
  }
  static PartialOutput in(void* memory, const Attention& p, const SplitBands& parts) {
    const std::int64_t slots = parts.slots().num_q, heads = parts.heads(), dim = p.v.head_dim();
    float* const values = static_cast<float*>(memory);
    return {{.data = values,
             .shape = {p.q.batch(), slots, heads, dim},
             .stride = {heads * slots * dim, dim, slots * dim, 1},
             .dtype = DType::kFloat32},
            values + rows(p, parts) * dim};
  }

  template <class Tile, int kCount, class TokenOf>
  __device__ void store(float (&value)[kCount], const RowResult (&rows)[2], Tile&, int, int batch, int head,
                        TokenOf&& token_of) const {
    const AccumulatorThread at(threadIdx.x % kWarpgroupThreads);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int slot = token_of(at.row(h));
      if (slot < 0) {
        continue;
      }
      if (at.first_column == 0) {
        lse[(batch * out.heads() + head) * out.seq() + slot] = rows[h].lse;
      }
      float* const row = out.row<float>(batch, slot, head);
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        if (at.column(j) < out.head_dim()) {
          *reinterpret_cast<float2*>(row + at.column(j)) = {value[4 * j + 2 * h] * rows[h].output_scale,
                                                            value[4 * j + 2 * h + 1] * rows[h].output_scale};
        }
      }
    }
  }
};

struct CombineParams {
  SplitBands parts;
  PartialOutput partial;
  TensorView out;
  float* lse;          // [batch, heads, seq_q]
  const float* sinks;  // [heads]; null: none
  int row_warps;       // that add up the parts of one row: 1, 2 or 4

  // Each reads four parts at once.
  static int warps_for(int parts) { return parts <= 4 ? 1 : parts <= 8 ? 2 : 4; }
};

inline constexpr int kCombineWarps = 4;

// A row of the output is the mean of the parts', weighted by exp(their log-sum-exp). Its warps take turns at the parts.
// Launched while these are still being computed.
template <class Element>
__global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const __grid_constant__ CombineParams p) {
  constexpr int kColumns = 128, kAhead = 4;  // of a warp: columns of a part, and parts on their way
  __shared__ float weights_of_warps[kCombineWarps][kMaxParts];
  __shared__ float4 sums[kCombineWarps][kColumns / 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int heads = static_cast<int>(p.out.heads()), queries = static_cast<int>(p.out.seq());
  const int warp_of_row = warp % p.row_warps;
  const std::int64_t row = (std::int64_t{blockIdx.x} * kCombineWarps + warp) / p.row_warps;  // [batch, query, head]
  const int head = static_cast<int>(row % heads), query = static_cast<int>(row / heads % queries);
  const std::int64_t batch = row / heads / queries;
  const bool exists = batch < p.out.batch();
  const SplitBands& parts = p.parts;
  const int in_group = head % parts.group, in_box = in_group & ((1 << parts.shift) - 1);
  const int box = head / parts.group * parts.boxes + (in_group >> parts.shift);
  const int slot = (query << parts.shift) + in_box, first_part = box * parts.count;
  const std::int64_t slots = p.partial.out.seq();
  const float* const lse = p.partial.lse + (batch * p.partial.out.heads() + first_part) * slots + slot;
  const float* const values = p.partial.out.row<float>(batch, slot, first_part);
  float* const weights = weights_of_warps[warp];
  const float sink = p.sinks == nullptr ? -kInfinity : p.sinks[head];
  const int num_parts = exists ? parts.count : 0;

  float4 value[kAhead];
  const auto load = [&](int first, int column) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int part = first + i * p.row_warps;
      const bool is_one = part < num_parts && column < p.out.head_dim();
      value[i] = is_one ? *reinterpret_cast<const float4*>(values + part * p.partial.out.stride[2] + column) : float4{};
    }
  };
  cudaGridDependencySynchronize();
  load(warp_of_row, 4 * lane);  // before there are weights to wait for

  // A weight is relative to the largest log-sum-exp; fmaxf passes NaN by, which stays in the sum.
  float most = sink;
  for (int part = lane; part < num_parts; part += 32) {
    weights[part] = lse[part * slots];
    most = fmaxf(most, weights[part]);
  }
  for (int step = 16; step > 0; step /= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  const auto weight_of = [most](float lse) { return lse == -kInfinity ? 0.f : exp2((lse - most) * kLog2E); };
  float sum = 0.f;
  for (int part = lane; part < num_parts; part += 32) {
    weights[part] = weight_of(weights[part]);
    sum += weights[part];
  }
  for (int step = 16; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
  sum += weight_of(sink);
  __syncwarp();

  const float scale = sum == 0.f ? 0.f : 1.f / sum;
  Element* const to = p.out.row<Element>(batch, query, head);
  for (int first_column = 0; first_column < p.out.head_dim(); first_column += kColumns) {
    const int column = first_column + 4 * lane;
    float4 total{};
    for (int first = warp_of_row; first < num_parts; first += kAhead * p.row_warps) {
      if (first != warp_of_row || first_column != 0) {
        load(first, column);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int part = first + i * p.row_warps;
        const float weight = part < num_parts ? weights[part] : 0.f;
        if (weight != 0.f) {  // a part without keys may hold NaN
          total = {fmaf(weight, value[i].x, total.x), fmaf(weight, value[i].y, total.y),
                   fmaf(weight, value[i].z, total.z), fmaf(weight, value[i].w, total.w)};
        }
      }
    }
    sums[warp][lane] = total;
    __syncthreads();
    if (exists && warp_of_row == 0 && column < p.out.head_dim()) {
      for (int i = 1; i < p.row_warps; ++i) {
        const float4 other = sums[warp + i][lane];
        total = {total.x + other.x, total.y + other.y, total.z + other.z, total.w + other.w};
      }
      *reinterpret_cast<uint2*>(to + column) = {DeviceElement<Element>::pack(total.x * scale, total.y * scale),
                                                DeviceElement<Element>::pack(total.z * scale, total.w * scale)};
    }
    __syncthreads();
  }
  if (exists && warp_of_row == 0 && lane == 0) {
    p.lse[(batch * heads + head) * queries + query] = sum == 0.f ? -kInfinity : most + log2(sum) * kLn2;
  }
}

template <class Element>
Status combine(const CombineParams& params, Stream stream) {
  const std::int64_t rows = params.out.batch() * params.out.seq() * params.out.heads();
  return launch_early(combine_kernel<Element>, ceil_div<std::int64_t>(rows * params.row_warps, kCombineWarps),
                      kCombineWarps * 32, stream, params);
}

}  // namespace fastattn::sm90

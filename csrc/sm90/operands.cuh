// Operands say what queries, keys, values and weights are made of, what a tile's scores and its share of the output are
// added up in, and what scales they come with.
#pragma once

#include <cstdint>
#include <type_traits>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/schedule.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

template <class Operands, TileShape kTile, int kHeadDim>
struct WideOutput;
template <class Operands, TileShape kTile, int kHeadDim>
struct PackedOutput;

// Queries, keys and values of one 16-bit type, as they are.
template <class Element>
struct PlainOperands {
  using Key = Element;
  using Value = Element;
  using Weight = Element;
  using Staged = Element;  // what the epilogue stages
  struct Scales {};        // none

  // Rows of keys: the product with the weights contracts along the tile's columns of rows.
  template <TileShape kTile, int kHeadDim>
  using ValueTile = SharedTile<Value, kTile.k, kHeadDim>;
  template <class Origin>
  using ValueMap = TensorMap<Origin>;
  template <TileShape kTile, int kHeadDim>
  using Output = WideOutput<PlainOperands, kTile, kHeadDim>;
};

// Scales as a kernel takes them; see QuantizedAttention.
struct QuantizedScales {
  const float *q, *k, *key_term;
  int seq_q, seq_k;
  float scale_log2;

  // What this thread needs of one head: scales of its two rows, in units of log 2, and of its keys in each tile.
  struct Thread {
    float row[2];
    const float *key, *term;
    int num_keys, first_column;

    // Of a tile of 128 keys, which is a run of four groups.
    __device__ float of_keys(int k_tile) const { return key[4 * k_tile]; }

    // What products of the tile become scores by. A term of the keys' is added here, and leaves nothing to multiply by.
    template <int kCount>
    __device__ void of_tile(int k_tile, float key_scale, float (&value)[kCount], float (&scale)[2]) const {
      constexpr float kTiny = 0x1p-100f;  // not 0, which would make NaN of −∞
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scale[h] = fused_multiply_add(row[h], key_scale, kTiny);
      }
      if (term == nullptr) {
        return;
      }
      const int first = k_tile * kCount * 2 + first_column;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = first + 8 * j + e;
          const float of_key = key < num_keys ? term[key] * kLog2E : 0.f;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            value[4 * j + 2 * h + e] = fused_multiply_add(value[4 * j + 2 * h + e], scale[h], of_key);
          }
        }
      }
      scale[0] = scale[1] = 1.f;
    }
  };

  __device__ Thread at(int batch, int head, int heads, int heads_per_kv_head, const int (&tokens)[2],
                       AccumulatorThread thread) const {
    const std::int64_t row = std::int64_t{batch} * heads + head, kv_row = row / heads_per_kv_head;
    Thread result;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      result.row[h] = tokens[h] < 0 ? 0.f : q[row * seq_q + tokens[h]] * scale_log2;
    }
    result.key = k + kv_row * (ceil_div(seq_k, 4 * static_cast<int>(kKeyGroup)) * 4) + thread.first_column / 2;
    result.term = key_term == nullptr ? nullptr : key_term + row * seq_k;
    result.num_keys = seq_k;
    result.first_column = thread.first_column;
    return result;
  }
};

// Queries and keys of int8 or e4m3, with a scale for each query and each group of 32 keys. Values of 16 bits as they
// are, or transposed ones of the type that goes with the weights'.
template <class Key_, class Value_, class Weight_>
struct QuantizedOperands {
  using Key = Key_;
  using Value = Value_;
  using Weight = Weight_;
  static constexpr bool kTransposed = sizeof(Value) == 1;
  using Staged = std::conditional_t<kTransposed, BFloat16, Value>;  // or Float16, of the same size
  using Scales = QuantizedScales;

  template <TileShape kTile, int kHeadDim>
  using ValueTile =
      std::conditional_t<kTransposed, SharedTile<Value, kHeadDim, kTile.k>, SharedTile<Value, kTile.k, kHeadDim>>;
  template <class Origin>
  using ValueMap = std::conditional_t<kTransposed, TransposedMap, TensorMap<Origin>>;
  template <TileShape kTile, int kHeadDim>
  using Output = std::conditional_t<kTransposed, PackedOutput<QuantizedOperands, kTile, kHeadDim>,
                                    WideOutput<QuantizedOperands, kTile, kHeadDim>>;
};

template <class Operands>
inline constexpr bool kIsQuantized = !std::is_empty_v<typename Operands::Scales>;

// The products of a tile's queries and keys, kCount a thread: sums() is what the tensor cores add up, `value` the same
// as floats once convert() is done.
template <class Sum, int kCount>
struct Products {
  Sum integer[kCount];
  float value[kCount];

  __device__ Sum (&sums()) [kCount] { return integer; } __device__ void convert() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] = __int2float_rn(static_cast<int>(integer[i]));
    }
  }
};
template <int kCount>
struct Products<float, kCount> {
  float value[kCount];

  __device__ float (&sums()) [kCount] { return value; } __device__ void convert() {}
};

// The row of the scores that a policy sees, of products that are to be multiplied by `scale`.
template <int kCount>
struct ScaledRow {
  float (&value)[kCount];
  int h;
  float scale;

  __device__ float max() const {
    const float local = multiply_up(AccumulatorRow<kCount>{value, h}.local_max(), scale);
    const float of_two = larger_or_nan(local, __shfl_xor_sync(0xffffffffu, local, 1));
    return larger_or_nan(of_two, __shfl_xor_sync(0xffffffffu, of_two, 2));
  }

  template <class Function>
  __device__ float apply(const Function& function) const {
    return AccumulatorRow<kCount>{value, h}.apply(
        [&function, scale = scale](float product) { return function(product * scale); });
  }

 private:
  static __device__ float larger_or_nan(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
  }
};

// The same, whose weights leave as pairs of 8 bits: their registers are free that much sooner.
template <class Weight, int kCount>
struct PackedRow : ScaledRow<kCount> {
  std::uint32_t (&pairs)[kCount / 2];

  template <class Function>
  __device__ float apply(const Function& function) const {
    float sum[2] = {};  // of the weights before they are rounded
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      float weight[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        weight[e] = function(this->value[4 * j + 2 * this->h + e] * this->scale);
        sum[e] += weight[e];
      }
      pairs[2 * j + this->h] = DeviceElement<Weight>::pair(weight[0], weight[1]);
    }
    return sum[0] + sum[1];
  }
};

// The output of a query tile so far, and the weights that meet their values next. Here of 16 bits: their products are
// added up in the output itself.
template <class Operands, TileShape kTile, int kHeadDim>
struct WideOutput {
  float value[kHeadDim / 2] = {};
  std::uint32_t weights[kTile.k / 4];

  // Issues the product of the weights with the values of a tile.
  template <class Values>
  __device__ void issue(const Values& values) {
    wgmma::pin(value);
    wgmma::pin(weights);
    wgmma::fence();
    wgmma::multiply<typename Operands::Weight, typename Operands::Value>(weights, values.mn_major(), value, true);
    wgmma::commit();
  }
  // That product is done.
  __device__ void finish() {
    wgmma::pin(value);
    wgmma::pin(weights);
  }
  // A row of scaled scores as a policy sees it.
  template <int kCount>
  __device__ ScaledRow<kCount> row(float (&scores)[kCount], int h, float scale) {
    return {scores, h, scale};
  }
  // The policy's weights become an operand. None of its registers may be written while a product that reads the one
  // before is under way: to be called after finish().
  template <class State>
  __device__ void take_weights(const float (&scores)[kTile.k / 2], const State&) {
    pack<typename Operands::Weight>(scores, weights);
  }
};

// The same with weights of 8 bits, which are relative to their tile: so are its products, until they are added to the
// output with the tile's factor.
template <class Operands, TileShape kTile, int kHeadDim>
struct PackedOutput {
  using Weight = typename Operands::Weight;

  float value[kHeadDim / 2] = {};
  Products<wgmma::Sum<typename Operands::Value>, kHeadDim / 2> products;
  std::uint32_t weights[kTile.k / 8], pairs[kTile.k / 4];
  float factor[2];

  template <class Values>
  __device__ void issue(const Values& values) {
    wgmma::pin(products.sums());
    wgmma::pin(weights);
    wgmma::fence();
    wgmma::multiply<Weight, typename Operands::Value>(weights, values.k_major(), products.sums(), false);
    wgmma::commit();
  }
  __device__ void finish() {
    wgmma::pin(products.sums());
    wgmma::pin(weights);
    products.convert();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      value[i] = fused_multiply_add(products.value[i], factor[i / 2 % 2], value[i]);
    }
  }
  template <int kCount>
  __device__ PackedRow<Weight, kCount> row(float (&scores)[kCount], int h, float scale) {
    return {{scores, h, scale}, pairs};
  }
  // Columns 16 i and 16 i + 8 of a row share a register, see token_in_slot().
  template <class State>
  __device__ void take_weights(const float (&)[kTile.k / 2], const State (&state)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < kTile.k / 16; ++i) {
        weights[2 * i + h] = DeviceElement<Weight>::join(pairs[4 * i + h], pairs[4 * i + 2 + h]);
      }
      factor[h] = state[h].factor;
    }
  }
};

}  // namespace fastattn::sm90

// Operands say what queries, keys, values and weights are made of, what a tile's scores and its share of the output are
// added up in, and what scales they come with.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/schedule.hpp"
#include "sm90/accumulator.cuh"
#include "sm90/key_terms.cuh"
#include "sm90/ring.cuh"
#include "sm90/shared_tile.cuh"
#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

template <class Operands, TileShape kTile, int kHeadDim>
struct WideOutput;
template <class Operands, TileShape kTile, int kHeadDim>
struct IntegerOutput;
template <class Operands, TileShape kTile, int kHeadDim>
struct Float8Output;

// This thread's rows of a tile's scores: each(visit) calls visit(row, h) for rows h. The policy writes weights over the
// scores.
template <int kCount>
struct PlainRows {
  float (&scores)[kCount];

  template <class Visit>
  __device__ void each(Visit&& visit) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      visit(AccumulatorRow<kCount>{scores, h}, h);
    }
  }
};

// The same where scores are products times their row's scale. They are seen as the output wants its weights.
template <class Output, class Product, int kCount>
struct ScaledRows {
  Output& out;
  const Product (&products)[kCount];
  float (&weights)[kCount];
  float scale[2];

  template <class Visit>
  __device__ void each(Visit&& visit) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Anew for each visit: scaled products that two had in common would be kept, instead of multiplied and added.
      float own_scale = scale[h];
      asm volatile("" : "+f"(own_scale));
      visit(out.row(products, weights, h, own_scale), h);
    }
  }
};

// Scales products and adds the terms of their columns, which leaves nothing to scale.
template <int kCount, int kKeys>
__device__ inline void add_terms(float (&product)[kCount], float (&scale)[2], const TermTile<kKeys>& tile,
                                 AccumulatorThread at) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const float2 terms = *reinterpret_cast<const float2*>(&tile.term[at.column(j)]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* const pair = &product[4 * j + 2 * h];
      pair[0] = fused_multiply_add(pair[0], scale[h], terms.x * kLog2E);
      pair[1] = fused_multiply_add(pair[1], scale[h], terms.y * kLog2E);
    }
  }
  scale[0] = scale[1] = 1.f;
}

// Queries, keys and values of one 16-bit type, as they are.
template <class Element>
struct PlainOperands {
  using Key = Element;
  using Value = Element;
  using Weight = Element;
  using Staged = Element;  // what the epilogue stages
  template <TileShape>
  using KeyTermTile = Nothing;

  struct Scales {  // none
    struct Head {
      static __device__ Nothing of_keys(int) { return {}; }
    };
    NoTerms terms;

    template <class TokenOf>
    __device__ Head at(int, int, int, int, TokenOf&&, AccumulatorThread) const {
      return {};
    }
    // Calls use(rows) after ready(). See QuantizedScales.
    template <class Score, class Scores, class Output, class Ready, class Use>
    __device__ void use_rows(Head, Nothing, Scores& scores, Output&, const Nothing&, AccumulatorThread, bool,
                             Ready&& ready, Use&& use) const {
      ready();
      constexpr int kCount = sizeof(scores.value) / sizeof(float);
      use(PlainRows<kCount>{scores.value});
    }
  };

  // Rows of keys: the product with the weights contracts along the tile's columns of rows.
  template <TileShape kTile, int kHeadDim>
  using ValueTile = SharedTile<Value, kTile.k, kHeadDim>;
  template <class Origin>
  using ValueMap = TensorMap<Origin>;
  template <TileShape kTile, int kHeadDim>
  using Output = WideOutput<PlainOperands, kTile, kHeadDim>;
};

// The same with scores that are modified, which reach the policy in units of log 2; kCapped: by a softcap.
template <class Element, bool kCapped>
struct ModifiedOperands : PlainOperands<Element> {
  template <TileShape kTile>
  using KeyTermTile = TermTile<kTile.k>;

  struct Scales {
    using Head = typename PlainOperands<Element>::Scales::Head;
    KeyTerms terms;
    std::conditional_t<kCapped, Softcap, float> to_log2;

    template <class TokenOf>
    __device__ Head at(int, int, int, int, TokenOf&&, AccumulatorThread) const {
      return {};
    }
    template <class Score, class Scores, class Output, int kKeys, class Ready, class Use>
    __device__ void use_rows(Head, Nothing, Scores& scores, Output&, const TermTile<kKeys>& tile, AccumulatorThread at,
                             bool, Ready&& ready, Use&& use) const {
      constexpr int kCount = sizeof(scores.value) / sizeof(float);
      float scale[2] = {1.f, 1.f};
      if constexpr (kCapped) {
        constexpr int kGroup = 16;  // more at a time are in the way of the output's registers at head_dim 256
#pragma unroll
        for (int first = 0; first < kCount; first += kGroup) {
          apply_to_scores<Softcap>([&](auto&& step) {
#pragma unroll
            for (int i = first; i < first + kGroup; ++i) {
              scores.value[i] = step(to_log2, scores.value[i]);
            }
          });
        }
      } else {
        scale[0] = scale[1] = to_log2;
      }
      if (!kCapped || terms.exist()) {
        add_terms(scores.value, scale, tile, at);
      }
      ready();
      use(PlainRows<kCount>{scores.value});
    }
  };
};

// Scales as a kernel takes them; see QuantizedAttention.
struct QuantizedScales {
  const float *q, *k;
  KeyTerms terms;
  int seq_q, seq_k;
  float scale_log2;

  // What a thread needs in one head: what products of its two rows with keys of scale 1 become scores in units of log 2
  // by, and where its keys' scales are.
  struct Head {
    float row[2];
    const float* key;

    // Of a tile of 128 keys, which is a run of four groups. To be asked for before there is something to wait for.
    __device__ float of_keys(int k_tile) const { return key[4 * k_tile]; }
  };

  // token_of(row) is the query of a row of the warpgroup's, or −1.
  template <class TokenOf>
  __device__ Head at(int batch, int head, int heads, int heads_per_kv_head, TokenOf&& token_of,
                     AccumulatorThread thread) const {
    const int tokens[2] = {token_of(thread.row(0)), token_of(thread.row(1))};
    const std::int64_t row = std::int64_t{batch} * heads + head, kv_row = row / heads_per_kv_head;
    Head result;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      result.row[h] = tokens[h] < 0 ? 0.f : q[row * seq_q + tokens[h]] * scale_log2;
    }
    result.key = k + kv_row * (ceil_div(seq_k, 4 * static_cast<int>(kKeyGroup)) * 4) + thread.first_column / 2;
    return result;
  }

  // Calls use(rows) for the rows of the scores. ready() comes before, when nothing is needed any more of what came with
  // the keys; it may mask the scores' values, unless they `are_whole`. What an optimistic policy sees are these values,
  // so that it can see them again.
  template <class Score, class Scores, class Output, int kKeys, class Ready, class Use>
  __device__ void use_rows(const Head& head, float key_scale, Scores& scores, Output& out,
                           const TermTile<kKeys>& key_terms, AccumulatorThread at, bool are_whole, Ready&& ready,
                           Use&& use) const {
    constexpr float kTiny = 0x1p-100f;  // not 0, which would make NaN of −∞
    float scale[2] = {fused_multiply_add(head.row[0], key_scale, kTiny),
                      fused_multiply_add(head.row[1], key_scale, kTiny)};
    const auto rows_of = [&]<class Product, int kCount>(const Product(&products)[kCount]) {
      return ScaledRows<Output, Product, kCount>{out, products, scores.value, {scale[0], scale[1]}};
    };
    if (!Score::kOptimistic && are_whole && !terms.exist()) {
      ready();
      use(rows_of(scores.sums()));
    } else {
      scores.convert();
      if (terms.exist()) {
        add_terms(scores.value, scale, key_terms, at);
      }
      ready();
      use(rows_of(scores.value));
    }
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
  template <TileShape kTile>
  using KeyTermTile = TermTile<kTile.k>;

  template <TileShape kTile, int kHeadDim>
  using ValueTile =
      std::conditional_t<kTransposed, SharedTile<Value, kHeadDim, kTile.k>, SharedTile<Value, kTile.k, kHeadDim>>;
  template <class Origin>
  using ValueMap = std::conditional_t<kTransposed, TransposedMap, TensorMap<Origin>>;
  template <TileShape kTile, int kHeadDim>
  using Output = std::conditional_t<
      !kTransposed, WideOutput<QuantizedOperands, kTile, kHeadDim>,
      std::conditional_t<std::is_same_v<Value, std::int8_t>, IntegerOutput<QuantizedOperands, kTile, kHeadDim>,
                         Float8Output<QuantizedOperands, kTile, kHeadDim>>>;
};

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

// A row of scores as a policy sees it: products times `scale`. Its weights go to `weight`, which may be the products'
// place.
template <class Product, int kCount>
struct ScaledRow {
  const Product (&product)[kCount];
  float (&weight)[kCount];
  int h;
  float scale;

  __device__ float max() const {
    const float local = multiply_up(greatest(), scale);
    const float of_two = larger_or_nan(local, __shfl_xor_sync(0xffffffffu, local, 1));
    return larger_or_nan(of_two, __shfl_xor_sync(0xffffffffu, of_two, 2));
  }

  template <class Function>
  __device__ float apply(const Function& function) const {
    return apply_to_pairs(function, [this](int j, const float (&pair)[2]) {
      weight[4 * j + 2 * h] = pair[0];
      weight[4 * j + 2 * h + 1] = pair[1];
    });
  }

 protected:
  // The sum of the function's values, which store(j, pair) takes.
  template <class Function, class Store>
  __device__ float apply_to_pairs(const Function& function, Store&& store) const {
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        pair[e] = function(to_float(product[4 * j + 2 * h + e]) * scale);
        sum[e] += pair[e];
      }
      store(j, pair);
    }
    return sum[0] + sum[1];
  }

 private:
  static __device__ float to_float(float product) { return product; }
  static __device__ float to_float(std::uint32_t product) { return __int2float_rn(static_cast<int>(product)); }

  // Of this thread's products. Three integers take one instruction, and one conversion will do.
  __device__ float greatest() const {
    if constexpr (std::is_same_v<Product, float>) {
      return AccumulatorRow<kCount>{weight, h}.local_max();
    } else {
      int greatest[2] = {INT_MIN, INT_MIN};
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        const Product* const pair = &product[4 * j + 2 * h];
        greatest[j % 2] = max_of(greatest[j % 2], max_of(static_cast<int>(pair[0]), static_cast<int>(pair[1])));
      }
      return __int2float_rn(max_of(greatest[0], greatest[1]));
    }
  }
};

// The same, whose weights leave as pairs of 8 bits: their registers are free that much sooner.
template <class Weight, class Product, int kCount>
struct PackedRow : ScaledRow<Product, kCount> {
  std::uint32_t (&pairs)[kCount / 2];

  template <class Function>
  __device__ float apply(const Function& function) const {  // the sum is of weights before they are rounded
    return this->apply_to_pairs(function, [this](int j, const float (&pair)[2]) {
      pairs[2 * j + this->h] = DeviceElement<Weight>::pair(pair[0], pair[1]);
    });
  }
};

// Multiplies the rows of an accumulator.
template <int kCount>
__device__ inline void multiply_rows(float (&value)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] *= factor[i / 2 % 2];
  }
}

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
  // Multiplies what was added up so far. is_due(): it has to be called although there is nothing to multiply by.
  static __device__ bool is_due() { return false; }
  __device__ void rescale(const float (&decay)[2]) { multiply_rows(value, decay); }
  // A row as a policy sees it, see ScaledRow.
  template <class Product, int kCount>
  __device__ ScaledRow<Product, kCount> row(const Product (&products)[kCount], float (&weights)[kCount], int h,
                                            float scale) {
    return {products, weights, h, scale};
  }
  // The policy's weights become an operand. None of its registers may be written while a product that reads the one
  // before is under way: to be called after finish().
  template <class State>
  __device__ void take_weights(const float (&scores)[kTile.k / 2], const State&) {
    pack<typename Operands::Weight>(scores, weights);
  }
  __device__ auto& total() { return value; }
};

// Weights of 8 bits, packed in two steps: pairs while scores are at hand, the operand once the product before is done.
template <class Weight, int kKeys>
struct PackedWeights {
  std::uint32_t weights[kKeys / 8], pairs[kKeys / 4];

  template <class Product, int kCount>
  __device__ PackedRow<Weight, Product, kCount> row(const Product (&products)[kCount], float (&weights)[kCount], int h,
                                                    float scale) {
    return {{products, weights, h, scale}, pairs};
  }
  // Columns 16 i and 16 i + 8 of a row share a register, see token_in_slot().
  __device__ void join() {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weights[2 * i + h] = DeviceElement<Weight>::join(pairs[4 * i + h], pairs[4 * i + 2 + h]);
      }
    }
  }
};

// The same with weights and values of 8-bit integers. Weights are relative to their tile: so are its products, until
// they are added to the output with the tile's factor.
template <class Operands, TileShape kTile, int kHeadDim>
struct IntegerOutput : PackedWeights<typename Operands::Weight, kTile.k> {
  float value[kHeadDim / 2] = {};
  std::uint32_t products[kHeadDim / 2];
  float factor[2];

  template <class Values>
  __device__ void issue(const Values& values) {
    wgmma::pin(products);
    wgmma::pin(this->weights);
    wgmma::fence();
    wgmma::multiply<typename Operands::Weight, typename Operands::Value>(this->weights, values.k_major(), products,
                                                                         false);
    wgmma::commit();
  }
  __device__ void finish() {
    wgmma::pin(products);
    wgmma::pin(this->weights);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      value[i] = fused_multiply_add(__int2float_rn(static_cast<int>(products[i])), factor[i / 2 % 2], value[i]);
    }
  }
  static __device__ bool is_due() { return false; }
  __device__ void rescale(const float (&decay)[2]) { multiply_rows(value, decay); }
  template <class State>
  __device__ void take_weights(const float (&)[kTile.k / 2], const State (&state)[2]) {
    this->join();
    factor[0] = state[0].factor;
    factor[1] = state[1].factor;
  }
  __device__ auto& total() { return value; }
};

// The same with e4m3. FP8 products are added up with 14 bits, and what falls off is always lost: an accumulator takes
// those of a few tiles, then goes to the output.
template <class Operands, TileShape kTile, int kHeadDim>
struct Float8Output : PackedWeights<typename Operands::Weight, kTile.k> {
  static constexpr int kTiles = 4;

  float value[kHeadDim / 2] = {}, sums[kHeadDim / 2] = {};
  int tiles = 0;  // since `sums` were 0; warps differ in it, so that it cannot tell whether products are to overwrite

  template <class Values>
  __device__ void issue(const Values& values) {
    wgmma::pin(sums);
    wgmma::pin(this->weights);
    wgmma::fence();
    wgmma::multiply<typename Operands::Weight, typename Operands::Value>(this->weights, values.k_major(), sums, true);
    wgmma::commit();
    ++tiles;
  }
  __device__ void finish() {
    wgmma::pin(sums);
    wgmma::pin(this->weights);
  }
  __device__ bool is_due() const { return tiles == kTiles; }
  __device__ void rescale(const float (&decay)[2]) { multiply_rows(total(), decay); }
  template <class State>
  __device__ void take_weights(const float (&)[kTile.k / 2], const State (&)[2]) {
    this->join();
  }
  __device__ auto& total() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      value[i] += sums[i];
      sums[i] = 0.f;
    }
    tiles = 0;
    return value;
  }
};

}  // namespace fastattn::sm90

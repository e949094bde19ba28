// Operands of 8 bits for the forward executor, with the rounding of the Hopper kernel. Formats are told apart at run
// time, once a tile: beside the products that is nothing.
#pragma once

#include <cstring>

#include "fastattn/cpu/operands.hpp"
#include "fastattn/operand/low_bit.hpp"

namespace fastattn::cpu {

// How weights are rounded for the second product.
enum class WeightFormat : std::uint8_t { kFloat32, kUInt8, kFloat8 };

FASTATTN_HD WeightFormat weight_format_of(DType values) {
  return values == DType::kInt8     ? WeightFormat::kUInt8
         : values == DType::kFloat8 ? WeightFormat::kFloat8
                                    : WeightFormat::kFloat32;
}

// A row whose weights are rounded as they are made.
template <class Isa>
struct RoundedRow : Row<Isa> {
  WeightFormat format;

  template <class Function>
  float apply(Function function) const {
    switch (format) {
      case WeightFormat::kFloat32:
        return Row<Isa>::apply(function);
      case WeightFormat::kUInt8:
        return round_each(function, [](Vector<Isa> weight) {
          const Vector<Isa> shift(0x1p23f);  // floats of its size are the integers
          return min_of(Vector<Isa>(UInt8::kLargest), weight + shift - shift);
        });
      case WeightFormat::kFloat8:
        return round_each(function, [](Vector<Isa> weight) { return rounded_to_float8(weight); });
    }
    return 0.f;
  }

 private:
  // The sum is of the weights before they are rounded.
  template <class Function, class Round>
  float round_each(const Function& function, const Round& round) const {
    Vector<Isa> sum(0.f);
    for (int k = 0; k < this->count; k += Vector<Isa>::kWidth) {
      const Vector<Isa> weight = function(Vector<Isa>::load(this->scores + k));
      round(weight).store(this->scores + k);
      sum = sum + weight;
    }
    return sum_of(sum);
  }
};

// What QuantizedAttention describes.
struct QuantizedOperands {
  const QuantizedAttention& problem;
  const TensorView &q = problem.q, &k = problem.k, &out = problem.out;
  float scale_log2 = problem.scale * kLog2E;
  WeightFormat weights = weight_format_of(problem.v.dtype);

  template <class Isa, TileShape kTile, TileSchedule Schedule>
  class Head {
   public:
    Head(const QuantizedOperands& x, const Schedule& schedule, std::int64_t b, std::int64_t h)
        : x_(x), p_(x.problem), schedule_(schedule), b_(b), h_(h), kv_head_(h / (x.q.heads() / x.k.heads())) {}

    void load_queries(float* to, const TileTokens<kTile.q>& tokens) {
      with_format(p_.q.dtype,
                  [&]<class Format>() { load_rows<Isa>(to, rows_of<const Format>(p_.q, b_, h_, tokens), dim()); });
      const float* const scales = p_.q_scales + (b_ * p_.q.heads() + h_) * p_.q.seq();
      for (int row = 0; row < kTile.q; ++row) {
        row_scale_[row] = tokens[row] < 0 ? 0.f : scales[tokens[row]] * x_.scale_log2;
      }
    }

    void load_keys_and_values(int k_tile, Panels<Isa> k, Panels<Isa> v) {
      const TileTokens tokens = key_tokens<kTile>(schedule_, k_tile);
      with_format(p_.k.dtype,
                  [&]<class Format>() { pack_columns(k, rows_of<const Format>(p_.k, b_, kv_head_, tokens)); });
      switch (p_.v.dtype) {
        case DType::kInt8:
          pack_columns(v, channels_from<std::int8_t>(k_tile));
          break;
        case DType::kFloat8:
          pack_columns(v, channels_from<Float8E4M3>(k_tile));
          break;
        default:
          with_element(p_.v.dtype, [&]<class Element>() {
            pack_rows(v, rows_of<const Element>(p_.v, b_, kv_head_, tokens), dim());
          });
      }
      const std::int64_t groups = num_groups(p_.k.seq(), kKeyGroup);
      const float* const scales = p_.k_scales + (b_ * p_.k.heads() + kv_head_) * groups;
      const std::int64_t row = (b_ * p_.q.heads() + h_) * padded_tokens(p_.k.seq());
      const float* const terms = p_.key_term == nullptr ? nullptr : p_.key_term + row;
      for (int column = 0; column < kTile.k; ++column) {
        const int token = tokens[column];
        column_scale_[column] = token < 0 ? 0.f : scales[group_of(token, kKeyGroup)];
        column_term_[column] = token < 0 || terms == nullptr ? 0.f : terms[token] * kLog2E;
      }
    }

    // Whole slots of transposed values.
    static int columns(int count) { return ceil_div(count, kSlots) * kSlots; }
    static int depth(int count) { return columns(count); }

    void to_scores(int row, float* products, int columns) const {
      using V = Vector<Isa>;
      const V scale(row_scale_[row]);
      for (int column = 0; column < columns; column += V::kWidth) {
        const V scaled = V::load(products + column) * V::load(column_scale_ + column);
        fused_multiply_add(scaled, scale, V::load(column_term_ + column)).store(products + column);
      }
    }

    RoundedRow<Isa> row(float* scores, int columns) const { return {{scores, columns}, x_.weights}; }

    // In the order of the values' slots, and relative to the row's base.
    template <class State>
    void to_weights(const State& state, float* weights, int columns) const {
      if (x_.weights == WeightFormat::kFloat32) {
        return;
      }
      float factor = 1.f;
      if constexpr (requires { state.factor; }) {
        factor = state.factor;
      }
      for (int first = 0; first < columns; first += kSlots, weights += kSlots) {
        float tokens[kSlots];
        std::memcpy(tokens, weights, sizeof tokens);
        for (int slot = 0; slot < kSlots; ++slot) {
          weights[slot] = tokens[token_in_slot(slot)] * factor;
        }
      }
    }

    void store(int token, const float* sums, const RowResult& result) const {
      const int seq = static_cast<int>(p_.q.seq()), to = token_at(p_.order.row(b_, h_, seq), token, seq);
      if (to < 0) {
        return;
      }
      const auto of_channels = [&](const float* x) {
        return x == nullptr ? nullptr : x + (b_ * p_.k.heads() + kv_head_) * dim();
      };
      const float *const scales = of_channels(p_.v_scales), *const mean = of_channels(p_.v_mean);
      with_element(p_.out.dtype, [&]<class Element>() {
        Element* const row = p_.out.row<Element>(b_, to, h_);
        for (int d = 0; d < dim(); ++d) {
          const float scale = result.output_scale * (scales == nullptr ? 1.f : scales[d]);
          const float centre = mean == nullptr ? 0.f : mean[d];
          row[d] = from_float<Element>(result.output_scale == 0.f ? 0.f : sums[d] * scale + centre);
        }
      });
      if (p_.lse != nullptr) {
        p_.lse[(b_ * p_.q.heads() + h_) * seq + to] = result.lse;
      }
    }

   private:
    static constexpr int kSlots = 16;

    int dim() const { return static_cast<int>(p_.q.head_dim()); }

    template <class Function>
    static void with_format(DType dtype, Function&& function) {
      dtype == DType::kInt8 ? function.template operator()<std::int8_t>() : function.template operator()<Float8E4M3>();
    }

    // The rows of transposed values from the first token of a tile on, and zeros past the last channel.
    template <class Format>
    Rows<const Format, kMaxHeadDim> channels_from(int k_tile) const {
      const std::int64_t length = padded_tokens(p_.k.seq());
      const Format* const first = static_cast<const Format*>(p_.v.data) +
                                  (b_ * p_.k.heads() + kv_head_) * dim() * length + std::int64_t{k_tile} * kTile.k;
      Rows<const Format, kMaxHeadDim> rows;
      for (int d = 0; d < kMaxHeadDim; ++d) {
        rows.row[d] = d < dim() ? first + d * length : kZeroRow<Format>;
      }
      return rows;
    }

    const QuantizedOperands& x_;
    const QuantizedAttention& p_;
    const Schedule& schedule_;
    std::int64_t b_, h_, kv_head_;
    float row_scale_[kTile.q];
    float column_scale_[kTile.k], column_term_[kTile.k];
  };
};

}  // namespace fastattn::cpu

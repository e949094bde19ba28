// Operands say how tensors become the tiles of the forward executor, and its sums a tensor again. An Operands is of all
// heads; its Head<Isa, kTile, Schedule> is the view of one:
//
//   load_queries(to, tokens)               rows of a query tile
//   load_keys_and_values(k_tile, k, v)     as right-hand sides of the two products
//   columns(count), depth(count)           how many of a key tile's scores, and of its values, the products take
//   to_scores(row, products, columns)      what the first product left becomes scores
//   row(scores, columns)                   those as a score policy sees them
//   to_weights(state, weights, columns)    what the policy left becomes the left-hand side of the second product
//   store(token, sums, result)             a row of the output
#pragma once

#include "fastattn/cpu/tile.hpp"
#include "fastattn/fastattn.hpp"
#include "fastattn/score/score.hpp"

namespace fastattn::cpu {

// One row of a score tile as a score policy sees it; `count` is a multiple of the register's width.
template <class Isa>
struct Row {
  float* scores;
  int count;

  float max() const {
    Vector<Isa> largest(-kInfinity);
    for (int k = 0; k < count; k += Vector<Isa>::kWidth) {
      largest = max_of(Vector<Isa>::load(scores + k), largest);
    }
    return largest_of(largest);
  }

  template <class Function>
  float apply(Function function) const {
    Vector<Isa> sum(0.f);
    for (int k = 0; k < count; k += Vector<Isa>::kWidth) {
      const Vector<Isa> weight = function(Vector<Isa>::load(scores + k));
      weight.store(scores + k);
      sum = sum + weight;
    }
    return sum_of(sum);
  }
};

// Queries, keys and values of one type, as they are.
template <class Element>
struct PlainOperands {
  TensorView q, k, v, out;
  float* lse = nullptr;  // null for a score that has none

  template <class Isa, TileShape kTile, TileSchedule Schedule>
  class Head {
   public:
    Head(const PlainOperands& x, const Schedule& schedule, std::int64_t b, std::int64_t h)
        : x_(x), b_(b), h_(h), stream_{schedule, x.k, x.v, b, h / (x.q.heads() / x.k.heads())} {}

    void load_queries(float* to, const TileTokens<kTile.q>& tokens) const {
      load_rows<Isa>(to, rows_of<const Element>(x_.q, b_, h_, tokens), dim());
    }

    void load_keys_and_values(int k_tile, Panels<Isa> k, Panels<Isa> v) {
      stream_.move_to(k_tile);
      pack_columns(k, stream_.rows1);
      pack_rows(v, stream_.rows2, value_dim());
      stream_.move_to(k_tile + 1);  // runs ascend: most likely the next one
      prefetch<Isa>(stream_.rows1, dim());
      prefetch<Isa>(stream_.rows2, value_dim());
    }

    static int columns(int count) { return round_up<Isa>(count); }
    static int depth(int count) { return count; }

    static void to_scores(int, float*, int) {}
    static Row<Isa> row(float* scores, int columns) { return {scores, columns}; }
    template <class State>
    static void to_weights(const State&, float*, int) {}

    void store(int token, const float* sums, const RowResult& result) const {
      Element* const to = x_.out.row<Element>(b_, token, h_);
      for (int d = 0; d < value_dim(); ++d) {
        // 0 · NaN where the row keeps nothing and a value is NaN
        to[d] = from_float<Element>(result.output_scale == 0.f ? 0.f : sums[d] * result.output_scale);
      }
      if (x_.lse != nullptr) {
        x_.lse[(b_ * x_.q.heads() + h_) * x_.q.seq() + token] = result.lse;
      }
    }

   private:
    int dim() const { return static_cast<int>(x_.q.head_dim()); }
    int value_dim() const { return static_cast<int>(x_.out.head_dim()); }

    const PlainOperands& x_;
    std::int64_t b_, h_;
    KeyStream<Element, kTile, Schedule> stream_;
  };
};

// The same with scores that are modified: they reach the policy in units of log 2.
template <class Element>
struct ModifiedOperands : PlainOperands<Element> {
  ScoreModifier modifier;

  template <class Isa, TileShape kTile, TileSchedule Schedule>
  class Head : public PlainOperands<Element>::template Head<Isa, kTile, Schedule> {
    using Plain = typename PlainOperands<Element>::template Head<Isa, kTile, Schedule>;

   public:
    Head(const ModifiedOperands& x, const Schedule& schedule, std::int64_t b, std::int64_t h)
        : Plain(x, schedule, b, h), modifier_(x.modifier), num_k_(schedule.num_k) {
      if (const KeyBias& key_bias = modifier_.key_bias; key_bias.bias != nullptr) {
        bias_ = key_bias.bias + key_bias.index(b, h) * padded_tokens(x.k.seq());
      }
    }

    void load_keys_and_values(int k_tile, Panels<Isa> k, Panels<Isa> v) {
      Plain::load_keys_and_values(k_tile, k, v);
      for (int column = 0; bias_ != nullptr && column < kTile.k; ++column) {
        const int key = k_tile * kTile.k + column;
        bias_log2_[column] = key < num_k_ ? bias_[key] * kLog2E : 0.f;
      }
    }

    void to_scores(int, float* products, int columns) const {
      using V = Vector<Isa>;
      const V scale(modifier_.scale_log2());
      const Softcap cap = modifier_.cap();
      for (int column = 0; column < columns; column += V::kWidth) {
        V score = V::load(products + column);
        score = modifier_.softcap == 0.f ? score * scale : cap(score);
        if (bias_ != nullptr) {
          score = score + V::load(bias_log2_ + column);
        }
        score.store(products + column);
      }
    }

   private:
    const ScoreModifier& modifier_;
    int num_k_;
    const float* bias_ = nullptr;  // of this head's keys
    float bias_log2_[kTile.k];
  };
};

}  // namespace fastattn::cpu

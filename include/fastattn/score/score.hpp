// A score policy turns the scores of one query row into weights, tile by tile, and back into gradients.
//
// The kernel owns the loop and the storage: a row lives in the registers of four lanes on the GPU and in an array on
// the CPU. The policy sees it through three operations and is written once for both.
#pragma once

#include <concepts>
#include <type_traits>

#include "fastattn/portable.hpp"

namespace fastattn {

struct Identity {
  template <class T>
  FASTATTN_HD constexpr T operator()(T x) const {
    return x;
  }
};

// max() is the whole row's maximum. apply(f) replaces each score by f(score) and returns this lane's share of the new
// values' sum; the shares are added up once, by `finish`.
template <class R>
concept ScoreRow = requires(R row) {
  { row.max() } -> std::same_as<float>;
  { row.apply(Identity{}) } -> std::same_as<float>;
};

// A function of a score may have a shortcut, for processors that decide about many scores at once: the function is then
// general(argument(score)) as well, and, where a bit of the argument is what kShortcut says, the cheaper
// shortcut(argument(score)).
struct ArgumentBit {
  int index;
  bool value;
};
template <class F>
concept HasShortcut = requires(F function, float score, float argument) {
  { F::kShortcut } -> std::same_as<const ArgumentBit&>;
  { function.argument(score) } -> std::same_as<float>;
  { function.general(argument) } -> std::same_as<float>;
  { function.shortcut(argument) } -> std::same_as<float>;
};

// What multiplies the accumulated output at the end, and the row's log-sum-exp (natural logarithm).
struct RowResult {
  float output_scale, lse;
};

// Masked scores arrive as −∞ and must weigh exactly 0. `lse2` is the row's log-sum-exp in base 2, +∞ for a row that
// keeps nothing; `delta` is Σ(output · output gradient) − the gradient of the row's log-sum-exp.
template <class P, class Row>
concept ForwardPolicy = ScoreRow<Row> && requires(const P policy, typename P::State& state, Row row, int head) {
  { P::kRescales } -> std::convertible_to<bool>;                    // does absorbing a tile rescale the output so far?
  { P::kOptimistic } -> std::convertible_to<bool>;                  // is it an OptimisticPolicy?
  { P::kElementwise } -> std::convertible_to<bool>;                 // or an ElementwisePolicy?
  { policy.at(head) } -> std::same_as<P>;                           // the policy of one head
  { policy.absorb(state, row) } -> std::same_as<float>;             // scores become weights; returns that factor
  { policy.finish(state, Identity{}) } -> std::same_as<RowResult>;  // with the reduction of a sum over the row's lanes
};

// One that seldom needs a row's largest score. Where its state is near what the row holds, weigh() makes weights of
// scores as absorb() would, and returns this lane's share of their sum; add() absorbs that. Whether it was near, the
// sums of all lanes tell. If any is not, the weights are of no use, and absorb() has to be asked.
template <class P, class Row>
concept OptimisticPolicy = ForwardPolicy<P, Row> && requires(const P policy, typename P::State& state, Row row) {
  { policy.weigh(state, row) } -> std::same_as<float>;
  { policy.is_near(0.f) } -> std::same_as<bool>;
  policy.add(state, 0.f);
};

// One whose weights depend on nothing but their own scores: weigh() makes them of all rows that a processor holds, as
// absorb() would. The rows' apply(f) puts f.shortcut(f.exponential(score)) in the place of each score, and f(score)
// where that exponential is above f.kLargest, as it is for no score that f.is_small().
template <class P, class Rows>
concept ElementwisePolicy =
    std::is_empty_v<typename P::State> && requires(const P policy, Rows rows) { policy.weigh(rows); };

template <class P, class Row>
concept ScorePolicy = ForwardPolicy<P, Row> && requires(const P policy, float x) {
  { P::kRowStatistics } -> std::convertible_to<bool>;  // does the backward need lse2 and delta?
  { P::kBiasGradient } -> std::convertible_to<bool>;  // is there a bias for each head, with the sum of score gradients?
  { policy.weight(x)(x) } -> std::same_as<float>;     // backward: weight(lse2)(score)
  { policy.score_gradient(x, x, x) } -> std::same_as<float>;  // backward: (weight, weight gradient, delta)
};

}  // namespace fastattn

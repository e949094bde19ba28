// The laws of the softmax policy, on a row of plain floats.
#include "fastattn/score/softmax.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <random>
#include <vector>

#include "check.hpp"
#include "fastattn/score/modifier.hpp"
#include "plain_row.hpp"

using namespace fastattn;

namespace {

static_assert(ScorePolicy<Softmax, PlainRow> && OptimisticPolicy<Softmax, PlainRow>);

struct Result {
  std::vector<float> weights;
  float lse;
};

// The weights that the policy gives to `scores` when they come in tiles that end at `ends`.
template <class Weights = WideWeights>
Result softmax(const std::vector<float>& scores, const std::vector<int>& ends, float scale) {
  const SoftmaxBy<float, Weights> policy{scale * kLog2E};
  typename SoftmaxBy<float, Weights>::State state;
  std::vector<float> weights = scores;
  int begin = 0;
  for (const int end : ends) {
    const float decay = policy.absorb(state, PlainRow{weights.data() + begin, end - begin});
    for (int i = 0; i < begin; ++i) {
      weights[i] *= decay;
    }
    begin = end;
  }
  const RowResult result = policy.finish(state, Identity{});
  for (float& weight : weights) {
    weight *= result.output_scale;
  }
  return {weights, result.lse};
}

void check_near(const Result& a, const Result& b, float lse_shift, const char* what) {
  for (std::size_t i = 0; i < a.weights.size(); ++i) {
    check(std::abs(a.weights[i] - b.weights[i]) <= 2e-5f * b.weights[i], what);
  }
  check(std::abs(a.lse + lse_shift - b.lse) <= 2e-6f * (1.f + std::abs(b.lse) + std::abs(lse_shift)), what);
}

std::vector<float> random_scores(std::mt19937& random, int count) {
  std::normal_distribution<float> normal(0.f, 4.f);
  std::vector<float> scores(count);
  for (float& score : scores) {
    score = random() % 5 == 0 ? -kInfinity : normal(random);
  }
  scores[random() % count] = 0.f;  // at least one is kept
  return scores;
}

const Test definition("softmax: weights and log-sum-exp are those of the definition", [] {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const float scale = 0.125f * static_cast<float>(1 + round % 8);
    const std::vector<float> scores = random_scores(random, 1 + round % 40);
    double sum = 0.;
    for (const float score : scores) {
      sum += std::exp(double{score} * scale);
    }
    Result expected{{}, static_cast<float>(std::log(sum))};
    for (const float score : scores) {
      expected.weights.push_back(static_cast<float>(std::exp(double{score} * scale) / sum));
    }
    check_near(softmax(scores, {static_cast<int>(scores.size())}, scale), expected, 0.f, "definition");
  }
});

const Test splits("softmax: splitting a row in any way gives the same", [] {
  std::mt19937 random(2);
  for (int round = 0; round < 500; ++round) {
    const int count = 1 + static_cast<int>(random() % 50);
    const std::vector<float> scores = random_scores(random, count);
    std::vector<int> ends{count};
    for (int cut = static_cast<int>(random() % 6); cut > 0; --cut) {
      ends.push_back(static_cast<int>(random() % (count + 1)));  // empty tiles as well
    }
    std::sort(ends.begin(), ends.end());
    check_near(softmax(scores, ends, 0.5f), softmax(scores, {count}, 0.5f), 0.f, "split");
  }
});

const Test float8("softmax: weights for e4m3 fit it, and change nothing else", [] {
  std::mt19937 random(7);
  for (int round = 0; round < 500; ++round) {
    const std::vector<float> scores = random_scores(random, 2 + round % 40);
    const int count = static_cast<int>(scores.size()), middle = 1 + static_cast<int>(random() % (count - 1));
    check_near(softmax<Float8Weights>(scores, {middle, count}, 1.f), softmax(scores, {count}, 1.f), 0.f, "split");

    const SoftmaxBy<One, Float8Weights> policy;
    SoftmaxBy<One, Float8Weights>::State state;
    for (int begin = 0; begin < count; begin += middle) {
      std::vector<float> tile(scores.begin() + begin, scores.begin() + std::min(begin + middle, count));
      const float greatest = *std::ranges::max_element(tile);
      const bool rises = greatest > state.base_log2 + Float8Weights::kSlack;
      policy.absorb(state, PlainRow{tile.data(), static_cast<int>(tile.size())});
      const float weight = *std::ranges::max_element(tile);
      check(weight <= Float8E4M3::kLargest * 1.000001f, "no weight is above the largest");
      check(!rises || std::abs(weight - 112.f) < 1e-3f, "a base that follows weighs a quarter of it");
    }
  }
});

template <class Weights>
void check_optimism(float largest) {
  std::mt19937 random(8);
  const SoftmaxBy<float, Weights> policy{1.f};
  using State = typename SoftmaxBy<float, Weights>::State;
  int near = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<float> before = random_scores(random, 10), scores = random_scores(random, 1 + round % 64);
    const float rise = static_cast<float>(random() % 300);
    for (float& score : scores) {
      score += round % 2 == 0 ? rise : rise / 64.f;
    }
    State state;
    policy.absorb(state, PlainRow{before.data(), 10});
    State optimistic = state;

    std::vector<float> weights = scores;
    const float sum = policy.weigh(optimistic, PlainRow{weights.data(), static_cast<int>(weights.size())});
    const float decay = policy.absorb(state, PlainRow{scores.data(), static_cast<int>(scores.size())});
    if (policy.is_near(sum)) {
      ++near;
      policy.add(optimistic, sum);
      check(*std::ranges::max_element(weights) <= largest, "weights can be rounded");
      for (std::size_t i = 0; i < weights.size(); ++i) {
        check(std::abs(weights[i] * decay - scores[i]) <= 2e-5f * scores[i], "the same weights");
      }
      const float lse = policy.finish(state, Identity{}).lse;
      check(std::abs(policy.finish(optimistic, Identity{}).lse - lse) <= 2e-6f * (1.f + std::abs(lse)), "the same sum");
    } else {
      check(state.base_log2 > optimistic.base_log2 + Weights::kSlack, "otherwise the base follows");
    }
  }
  check(near > 500 && near < 1500, "both happen");
}

const Test optimism("softmax: weights without a look at the largest score are those with one, or the base follows", [] {
  check_optimism<WideWeights>(0x1p32f);
  check_optimism<Float16Weights>(65504.f);
});

const Test unseen("softmax: a row that was empty so far is near masked scores alone", [] {
  const Softmax policy{kLog2E};
  const auto is_near = [&](float score) {
    std::vector<float> scores{-kInfinity, score};
    const bool near = policy.is_near(policy.weigh({}, PlainRow{scores.data(), 2}));
    check(!near || (scores[0] == 0.f && scores[1] == 0.f), "masked scores weigh exactly 0");
    return near;
  };
  check(is_near(-kInfinity), "all masked");
  for (const float score : {0.f, -1e5f, 1e5f, -1e38f, 1e38f, kInfinity, std::nanf("")}) {
    check(!is_near(score), "not near " + std::to_string(score));
  }
});

const Test shift("softmax: a constant added to all scores adds to the log-sum-exp alone", [] {
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<float> scores = random_scores(random, 30);
    for (float& score : scores) {
      score = std::round(score * 16.f) / 16.f;  // so that the shift is exact
    }
    const float shift = static_cast<float>(static_cast<int>(random() % 256) - 128);
    std::vector<float> shifted = scores;
    for (float& score : shifted) {
      score += shift;
    }
    check_near(softmax(scores, {10, 30}, 0.5f), softmax(shifted, {10, 30}, 0.5f), 0.5f * shift, "shift");
  }
});

const Test empty("softmax: a row that keeps nothing gives scale 0 and log-sum-exp -inf", [] {
  const Softmax policy{kLog2E};
  Softmax::State state;
  check(policy.finish(state, Identity{}).output_scale == 0.f, "no tile");
  std::vector<float> scores(8, -kInfinity);
  policy.absorb(state, PlainRow{scores.data(), 4});
  policy.absorb(state, PlainRow{scores.data() + 4, 4});
  const RowResult result = policy.finish(state, Identity{});
  check(result.output_scale == 0.f && result.lse == -kInfinity, "all masked");
  check(std::all_of(scores.begin(), scores.end(), [](float w) { return w == 0.f; }), "weights are exactly 0");
  check(policy.weight(kInfinity)(3.f) == 0.f && policy.weight(kInfinity)(-kInfinity) == 0.f, "backward weight is 0");
});

const Test late("softmax: what comes after masked tiles counts in full", [] {
  const Softmax policy{kLog2E};
  Softmax::State state;
  std::vector<float> scores{-kInfinity, -kInfinity, 1.f, 2.f};
  policy.absorb(state, PlainRow{scores.data(), 2});
  policy.absorb(state, PlainRow{scores.data() + 2, 2});
  check(std::abs(policy.finish(state, Identity{}).lse - 2.3132617f) < 1e-6f, "lse of {1, 2}");
});

const Test sinks("softmax: a sink is a score whose weight is left out", [] {
  std::mt19937 random(3);
  const float of_heads[] = {-kInfinity, 0.3f, 60.f, -60.f};
  const WithSinks<Softmax> policies{{kLog2E}, of_heads};
  for (int head = 0; head < 4; ++head) {
    std::vector<float> scores = random_scores(random, 20), with_sink = scores;
    with_sink.push_back(of_heads[head]);
    const Result all = softmax(with_sink, {21}, 1.f);
    const auto policy = policies.at(head);
    WithSinks<Softmax>::State state;
    policy.absorb(state, PlainRow{scores.data(), 20});
    const RowResult result = policy.finish(state, Identity{});
    for (float& weight : scores) {
      weight *= result.output_scale;
    }
    check_near({scores, result.lse}, {{all.weights.begin(), all.weights.end() - 1}, all.lse}, 0.f, "sink");
    const RowResult empty = policy.finish({}, Identity{});
    check(empty.output_scale == 0.f, "a sink alone has no output");
    check(empty.lse == of_heads[head] || std::abs(empty.lse - of_heads[head]) < 1e-5f, "a sink alone");
  }
});

const Test caps("softmax: a softcap is the hyperbolic tangent, and increases", [] {
  const ScoreModifier modifier{0.25f, 30.f, {}};
  float last = -kInfinity;
  for (float score = -2000.f; score <= 2000.f; score += 0.37f) {
    const float expected = 30. * std::tanh(0.25 * score / 30.) * kLog2E, capped = modifier.cap()(score);
    check(std::abs(capped - expected) < 1e-5f * 30.f && capped >= last, "softcap of " + std::to_string(score));
    last = capped;
  }
  check(!ScoreModifier{1.f, 0.f, {}}.exists() && modifier.exists(), "a modifier that changes nothing is none");
});

// Does a softcap's shortcut hold?
bool is_small(float argument) {
  return (std::bit_cast<std::uint32_t>(argument) >> Softcap::kShortcut.index & 1) == Softcap::kShortcut.value;
}

const Test capped_shortcut("softmax: a softcap's shortcut is as good as the general way wherever it holds", [] {
  for (const float cap : {1e-3f, 0.7f, 50.f, 1e4f}) {
    const Softcap softcap = ScoreModifier{2.f, cap, {}}.cap();
    double shortcut = 0., general = 0.;
    for (double t = -60.; t < 60.; t += 1. / 1024.) {
      const float argument = softcap.argument(static_cast<float>(t) * cap / 4.f);
      const double exact = double{cap} * std::numbers::log2e * std::tanh(argument / 2.);
      check(is_small(argument) == (std::abs(argument) < 2.f), "where it holds");
      if (is_small(argument) && exact != 0.) {
        shortcut = std::max(shortcut, std::abs(softcap.shortcut(argument) / exact - 1.));
      }
      general = std::max(general, std::abs(softcap.general(argument) - exact) / cap);
    }
    check(shortcut < 9e-7, "the shortcut is " + std::to_string(shortcut * 1e6) + "e-6 off");
    check(general < 5e-7, "the general way is " + std::to_string(general * 1e6) + "e-6 off");
  }
});

const Test capped_limits("softmax: what a softcap makes of the largest, the smallest and what is not a number", [] {
  for (const float cap : {1e-45f, 1e-38f, 1e-20f, 1.f, 1e38f}) {
    const Softcap softcap = ScoreModifier{1.f, cap, {}}.cap();
    check(softcap(0.f) == 0.f && softcap.shortcut(softcap.argument(0.f)) == 0.f, "0 stays");
    check(softcap(kInfinity) == cap * kLog2E && softcap(-kInfinity) == -cap * kLog2E, "the cap is reached");
    for (const float nan : {std::nanf(""), -std::nanf("")}) {
      check(std::isnan(softcap(nan)), "NaN stays");
      check(!is_small(softcap.argument(nan)), "NaN is not small");
    }
  }
});

}  // namespace

// The laws of the softmax policy whose weights are relative to the maximum of their own tile, on a row of plain floats.
#include "fastattn/score/tile_softmax.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "fastattn/operand/low_bit.hpp"
#include "plain_row.hpp"

using namespace fastattn;

namespace {

static_assert(ForwardPolicy<TileSoftmax, PlainRow>);
static_assert(!ScorePolicy<TileSoftmax, PlainRow>, "it has no backward");

constexpr float kTops[] = {UInt8::kLargestLog2, Float8E4M3::kLargestLog2, 0.f};

struct Result {
  std::vector<double> weights;
  float lse;
};

// The weights that the policy gives to `scores`, in units of log 2, when they come in tiles that end at `ends`.
Result softmax(const std::vector<float>& scores, const std::vector<int>& ends, float top) {
  const TileSoftmax policy{top};
  TileSoftmax::State state;
  Result result{{scores.begin(), scores.end()}, 0.f};
  int begin = 0;
  for (const int end : ends) {
    std::vector<float> tile(scores.begin() + begin, scores.begin() + end);
    const float decay = policy.absorb(state, PlainRow{tile.data(), end - begin});
    for (int i = 0; i < begin; ++i) {
      result.weights[i] *= decay;
    }
    for (int i = begin; i < end; ++i) {
      result.weights[i] = tile[i - begin] * state.factor;
    }
    begin = end;
  }
  const RowResult row = policy.finish(state, Identity{});
  for (double& weight : result.weights) {
    weight *= row.output_scale;
  }
  result.lse = row.lse;
  return result;
}

Result defined(const std::vector<float>& scores) {
  double sum = 0.;
  for (const float score : scores) {
    sum += std::exp2(double{score});
  }
  Result result{{}, static_cast<float>(std::log(sum))};
  for (const float score : scores) {
    result.weights.push_back(std::exp2(double{score}) / sum);
  }
  return result;
}

void check_near(const Result& got, const Result& want, const std::string& what) {
  for (std::size_t i = 0; i < want.weights.size(); ++i) {
    check(std::abs(got.weights[i] - want.weights[i]) <= 2e-5 * want.weights[i] + 1e-30, what);
  }
  check(std::abs(got.lse - want.lse) <= 2e-6f * (1.f + std::abs(want.lse)), what + ": log-sum-exp");
}

std::vector<float> random_scores(std::mt19937& random, int count) {
  std::normal_distribution<float> normal(0.f, 6.f);
  std::vector<float> scores(count);
  for (float& score : scores) {
    score = random() % 5 == 0 ? -kInfinity : normal(random);
  }
  scores[random() % count] = 0.f;  // at least one is kept
  return scores;
}

std::vector<int> random_ends(std::mt19937& random, int count) {
  std::vector<int> ends{count};
  for (int cut = static_cast<int>(random() % 8); cut > 0; --cut) {
    ends.push_back(static_cast<int>(random() % (count + 1)));  // empty tiles as well
  }
  std::sort(ends.begin(), ends.end());
  return ends;
}

const Test splits("tile softmax: splitting a row in any way gives what the definition says", [] {
  std::mt19937 random(1);
  for (int round = 0; round < 1000; ++round) {
    const int count = 1 + static_cast<int>(random() % 60);
    const std::vector<float> scores = random_scores(random, count);
    check_near(softmax(scores, random_ends(random, count), kTops[round % 3]), defined(scores), "split");
  }
});

const Test slack("tile softmax: the base follows once a tile rises by more than the slack", [] {
  const TileSoftmax policy{UInt8::kLargestLog2};
  for (const float rise : {-300.f, -40.f, -1.f, 0.f, 1.f, 7.75f, 8.f, 8.25f, 40.f, 140.f}) {
    TileSoftmax::State state;
    std::vector<float> first{3.f}, second{3.f + rise};
    check(policy.absorb(state, PlainRow{first.data(), 1}) == 0.f, "nothing before the first tile");
    const float decay = policy.absorb(state, PlainRow{second.data(), 1});
    const bool follows = rise > TileSoftmax::kSlack;
    check(state.base_log2 == (follows ? 3.f + rise : 3.f), "base after a rise of " + std::to_string(rise));
    check(decay == (follows ? std::exp2(-rise) : 1.f), "decay after a rise of " + std::to_string(rise));
    check_near(softmax({3.f, 3.f + rise}, {1, 2}, UInt8::kLargestLog2), defined({3.f, 3.f + rise}), "weights");
  }
});

const Test steps("tile softmax: a row that rises below the slack with each tile loses nothing", [] {
  std::vector<float> scores;
  std::vector<int> ends;
  for (int i = 0; i < 200; ++i) {
    scores.push_back(0.7f * static_cast<float>(i));
    ends.push_back(i + 1);
  }
  check_near(softmax(scores, ends, Float8E4M3::kLargestLog2), defined(scores), "rising");
  std::ranges::reverse(scores);
  check_near(softmax(scores, ends, Float8E4M3::kLargestLog2), defined(scores), "falling");
});

const Test largest("tile softmax: the largest weight of each tile is 2^top, wherever its scores lie", [] {
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0.f, 6.f);
  for (const float top : kTops) {
    const TileSoftmax policy{top};
    TileSoftmax::State state;
    for (const float at : {0.f, 1000.f, -1000.f, 3.f, 0x1p-20f}) {
      std::vector<float> tile(16);
      std::ranges::generate(tile, [&] { return at + normal(random); });
      const auto greatest = std::ranges::max_element(tile) - tile.begin();
      policy.absorb(state, PlainRow{tile.data(), 16});
      // top and the maximum have 24 bits: what is left of their difference is off by half of its last one
      const float allowed = std::exp2(top) * (2e-7f * (std::abs(at) + 40.f) + 1e-6f);
      check(std::abs(tile[greatest] - std::exp2(top)) <= allowed, "the greatest score weighs 2^top");
      check(*std::ranges::max_element(tile) == tile[greatest], "and no other more");
    }
  }
  check(std::abs(std::exp2(UInt8::kLargestLog2) - UInt8::kLargest) < 1e-4f, "255");
  check(std::abs(std::exp2(Float8E4M3::kLargestLog2) - Float8E4M3::kLargest) < 1e-4f, "448");
});

const Test empty("tile softmax: a row that keeps nothing gives scale 0 and log-sum-exp -inf", [] {
  const TileSoftmax policy{UInt8::kLargestLog2};
  TileSoftmax::State state;
  check(policy.finish(state, Identity{}).output_scale == 0.f, "no tile");
  std::vector<float> scores(8, -kInfinity);
  for (int tile = 0; tile < 2; ++tile) {
    policy.absorb(state, PlainRow{scores.data() + 4 * tile, 4});
    check(state.factor == 0.f, "an empty tile counts for nothing");
  }
  const RowResult result = policy.finish(state, Identity{});
  check(result.output_scale == 0.f && result.lse == -kInfinity, "all masked");
  check(std::ranges::all_of(scores, [](float w) { return w == 0.f; }), "weights are exactly 0");
});

const Test masked("tile softmax: masked tiles before, between and after change nothing", [] {
  std::mt19937 random(3);
  const std::vector<float> scores = random_scores(random, 8), nothing(4, -kInfinity);
  std::vector<float> sparse = nothing;
  sparse.insert(sparse.end(), scores.begin(), scores.begin() + 4);
  sparse.insert(sparse.end(), nothing.begin(), nothing.end());
  sparse.insert(sparse.end(), scores.begin() + 4, scores.end());
  sparse.insert(sparse.end(), nothing.begin(), nothing.end());
  const Result with = softmax(sparse, {4, 8, 12, 16, 20}, UInt8::kLargestLog2);
  const Result without = softmax(scores, {4, 8}, UInt8::kLargestLog2);
  check(with.lse == without.lse, "the same log-sum-exp");
  for (int i = 0; i < 8; ++i) {
    check(with.weights[i + (i < 4 ? 4 : 8)] == without.weights[i], "the same weights");
  }
});

const Test lost("tile softmax: NaN in a row shows in its sum", [] {
  const TileSoftmax policy{UInt8::kLargestLog2};
  TileSoftmax::State state;
  std::vector<float> scores{1.f, std::nanf(""), 2.f}, rest{1.f};
  policy.absorb(state, PlainRow{scores.data(), 3});
  policy.absorb(state, PlainRow{rest.data(), 1});
  check(std::isnan(policy.finish(state, Identity{}).output_scale), "it stays");
});

}  // namespace

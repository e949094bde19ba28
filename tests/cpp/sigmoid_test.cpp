// The sigmoid policy: accurate where its weights live, exactly 0 where masked.
#include "fastattn/score/sigmoid.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "check.hpp"

using namespace fastattn;

namespace {

double relative_error(float weight, double x) {
  const double exact = 1. / (1. + std::exp(-x));
  return std::abs(weight - exact) / exact;
}

const Test accuracy("sigmoid: relative error of weights at bias -ln n", [] {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (const int n : {1, 64, 1024, 16384, 65536}) {
    double excess = -1.;
    for (int i = 0; i < 200000; ++i) {
      const double x = normal(random) - std::log(n), weight = 1. / (1. + std::exp(-x));
      const double allowed = std::min(3.6e-4, 0.0113 * weight) + 3e-6;  // and the rounding of x
      excess = std::max(excess, relative_error(logistic2(static_cast<float>(x) * kLog2E), x) - allowed);
    }
    check(excess <= 0., "n " + std::to_string(n) + ": " + std::to_string(excess) + " too much");
  }
});

const Test range("sigmoid: the whole range, and what is not a number", [] {
  for (double x = -80.; x <= 80.; x += 1. / 64.) {
    check(relative_error(logistic2(static_cast<float>(x) * kLog2E), x) < 5e-4, "x " + std::to_string(x));
  }
  check(logistic2(-kInfinity) == 0.f, "a masked score weighs exactly 0");
  check(logistic2(kInfinity) == 1.f && logistic2(0.f) > 0.4998f, "the upper half");
  check(std::isnan(logistic2(std::nanf(""))), "NaN stays");
});

const Test shortcut("sigmoid: the shortcut holds wherever the argument is negative", [] {
  const Logistic weight{0.5f, -3.f};  // x = score / 2 − 3 in units of log 2; the shortcut ends at score −2
  double excess = -1.;
  for (double score = -200.; score < -2.; score += 1. / 64.) {
    const float argument = weight.argument(static_cast<float>(score));
    check(argument < 0.f, "argument of score " + std::to_string(score));
    const double x = (0.5 * score - 3.) / kLog2E, exact = 1. / (1. + std::exp(-x));
    const double allowed = std::min(6.4e-4, 0.05 * exact) + 3e-6;  // and the rounding of x
    excess = std::max(excess, relative_error(weight.shortcut(argument), x) - allowed);
  }
  check(excess <= 0., std::to_string(excess) + " too much");
  check(!std::signbit(weight.argument(-2.f)), "x = -4 goes the general way");
  check(relative_error(weight.shortcut(0.f), -4. / kLog2E) < 7e-4, "but rounding x to it does no harm");
});

const Test forward(
    "sigmoid: the forward's weights are the same in another unit, and its shortcut is right for small ones", [] {
      const ForwardLogistic weight{0.5f, -3.f};
      double excess = -1.;
      for (double score = -200.; score < 20.; score += 1. / 64.) {
        const auto rounded = static_cast<float>(score);
        const double x = (0.5 * score - 3.) / kLog2E, exact = 1. / (1. + std::exp(-x));
        const double general = weight(rounded) / ForwardLogistic::kUnit;
        excess = std::max(excess, std::abs(general - exact) / exact - (std::min(3.6e-4, 0.0113 * exact) + 3e-6));
        check(weight.is_small(rounded) == (score < -2.), "x = -4 is where small ones end");
        const float e = weight.exponential(rounded);
        if (weight.is_small(rounded)) {
          check(e <= ForwardLogistic::kLargest, "its exponential");
          const double error = std::abs((e - double{e} * e) / ForwardLogistic::kUnit - exact) / exact;
          excess = std::max(excess, error - (std::min(6.4e-4, 0.05 * exact) + 3e-6));  // and the rounding of x
        } else {
          check(e >= ForwardLogistic::kLargest * (1.f - 1e-6f), "no other has one so small");
        }
      }
      check(excess <= 0., std::to_string(excess) + " too much");
      check(weight.exponential(-kInfinity) == 0.f && weight(-kInfinity) == 0.f, "a masked score weighs exactly 0");
      check(!weight.is_small(std::nanf("")) && std::isnan(weight(std::nanf(""))), "NaN stays");
      check(std::abs(ForwardLogistic::kUnit - std::exp2(double{ForwardLogistic::kUnitLog2})) < 1e-7,
            "the unit's logarithm");
    });

const Test general("sigmoid: the general form is the weight", [] {
  const Logistic weight{0.5f, -3.f};
  for (double score = -100.; score <= 100.; score += 1. / 16.) {
    const float result = weight.general(weight.argument(static_cast<float>(score)));
    check(relative_error(result, (0.5 * score - 3.) / kLog2E) < 4e-4, "score " + std::to_string(score));
  }
});

const Test not_finite("sigmoid: what is not finite, either way", [] {
  const Logistic weight{0.5f, -3.f};
  const float masked = weight.argument(-kInfinity), largest = weight.argument(kInfinity);
  check(std::signbit(masked) && !std::signbit(largest), "a masked score does not stand in the shortcut's way");
  check(weight.shortcut(masked) == 0.f && weight.general(masked) == 0.f, "a masked score weighs exactly 0");
  check(weight.general(largest) == 1.f, "the largest weight");
  for (const float nan : {std::nanf(""), -std::nanf("")}) {  // its sign may lead either way
    const float argument = weight.argument(nan);
    check(std::isnan(weight.shortcut(argument)) && std::isnan(weight.general(argument)), "NaN stays");
  }
});

const Test gradient("sigmoid: the gradient is the derivative", [] {
  const Sigmoid policy{kLog2E, -2.f * kLog2E};
  for (float score = -6.f; score < 6.f; score += 0.25f) {
    const float weight = policy.weight(0.f)(score);
    const double exact = 1. / (1. + std::exp(2. - score)), slope = exact * (1. - exact);
    check(std::abs(policy.score_gradient(weight, 3.f, 0.f) - 3. * slope) < 1e-3 * 3. * slope, "slope");
  }
});

const Test heads("sigmoid: each head has its own bias", [] {
  const float head_bias[] = {0.5f, -1.f};
  const Sigmoid policy{kLog2E, 0.25f * kLog2E, head_bias};
  check(std::abs(policy.at(0).bias_log2 - 0.75f * kLog2E) < 1e-6f, "head 0");
  check(std::abs(policy.at(1).bias_log2 + 0.75f * kLog2E) < 1e-6f, "head 1");
});

}  // namespace

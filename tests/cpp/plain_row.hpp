// A row of scores as a score policy sees it, in an array of floats.
#pragma once

#include <algorithm>

#include "fastattn/score/score.hpp"

struct PlainRow {
  float* scores;
  int count;

  float max() const { return count > 0 ? *std::max_element(scores, scores + count) : -fastattn::kInfinity; }
  template <class Function>
  float apply(Function function) const {
    float sum = 0.f;
    for (int i = 0; i < count; ++i) {
      sum += scores[i] = function(scores[i]);
    }
    return sum;
  }
};

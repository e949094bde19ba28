// One case's tensors, the op on them, and the error of what it wrote.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>

#include "case.hpp"
#include "device.hpp"
#include "tensor.hpp"

namespace bench {

// Relative error ‖x − reference‖ / ‖reference‖, gathered value by value.
class RelativeError {
 public:
  void add(double value, double reference) {
    difference_ += (value - reference) * (value - reference);
    norm_ += reference * reference;
  }
  double value() const;

 private:
  double difference_ = 0, norm_ = 0;
};

class Problem {
 public:
  Problem(const Device& device, const Case& shape, fastattn::DType dtype, bool with_backward, unsigned seed);

  void forward() const;
  void backward() const;

  // Errors of sampled rows against the plain formula in double, the worst of the tensors involved. A value that the op
  // left unwritten is an exception. The backward is judged as what it is, a function of the forward's results too.
  double forward_error();
  double backward_error();

 private:
  struct Gradients {
    Tensor dout, dq, dk, dv;
    std::shared_ptr<void> workspace;
  };
  struct Index {
    std::int64_t batch, row, head;
  };
  // Weight of a score, and the gradient of the scaled score.
  struct Weight {
    double value, gradient;
  };

  fastattn::Attention attention() const;
  fastattn::AttentionBackward attention_backward() const;
  Index sample(std::int64_t rows, std::int64_t heads, int i);
  double score(Index query, std::int64_t key) const;
  Weight weight(Index query, std::int64_t key) const;

  const Device& device_;
  Case case_;
  float scale_;
  std::mt19937 random_;
  Tensor q_, k_, v_, out_, lse_;  // lse is [batch, heads, seq_q, 1]
  std::optional<Gradients> gradients_;
};

}  // namespace bench

// One case's tensors, the op on them, and the error of what it wrote.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <vector>

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

// What a row's scores become: weights that sum to one, or each by itself, with a bias of −ln(seq_k).
enum class Score { kSoftmax, kSigmoid };

// An op derives from this and says how it is called.
class Problem {
 public:
  virtual ~Problem() = default;

  // Before the first backward(): makes what it reads and writes.
  void prepare_backward();

  void forward() const;
  void backward() const;

  // Errors of sampled rows against the plain formula in double, the worst of the tensors involved. A value that the op
  // left unwritten is an exception. The backward is judged as what it is, a function of the forward's results too.
  double forward_error();
  double backward_error();

 protected:
  Problem(const Device& device, const Case& shape, fastattn::DType dtype, Score score);

  virtual fastattn::Status run_forward() const = 0;
  virtual fastattn::Status run_backward() const = 0;
  virtual std::size_t workspace_bytes() const = 0;

  void* forward_workspace() const { return forward_workspace_.get(); }
  // Of a forward that wants more than kForwardWorkspace bytes.
  void set_forward_workspace(std::size_t bytes) { forward_workspace_ = device_.allocate(bytes); }
  float* lse() const { return static_cast<float*>(lse_->view().data); }

  struct Gradients {
    Tensor dout, dq, dk, dv;
    std::shared_ptr<void> workspace;
  };

  // An op's backward of `forward`, of gradients_; of the output alone, for q, k and v.
  template <class Backward>
  Backward backward_of(const decltype(Backward::forward)& forward) const {
    Backward problem{.forward = forward};
    problem.dout = gradients_->dout.view();
    problem.dq = gradients_->dq.view();
    problem.dk = gradients_->dk.view();
    problem.dv = gradients_->dv.view();
    problem.workspace = gradients_->workspace.get();
    return problem;
  }

  const Device& device_;
  const float scale_, bias_;
  Tensor q_, k_, v_, out_;
  std::optional<Gradients> gradients_;

 private:
  struct Index {
    std::int64_t batch, row, head;
  };
  // Weight of a score, and the gradient of the score.
  struct Weight {
    double value, gradient;
  };

  Index sample(std::int64_t rows, std::int64_t heads, int i);
  std::int64_t kv_head(Index query) const;
  double score(Index query, std::int64_t key) const;  // with scale and bias; −∞ where masked
  double weight(double score, double lse) const;
  Weight weight(Index query, std::int64_t key) const;

  const Case& case_;
  const fastattn::DType dtype_;
  std::mt19937 random_{1};
  std::shared_ptr<void> forward_workspace_;
  std::optional<Tensor> lse_;  // the softmax's, [batch, heads, seq_q, 1]
};

}  // namespace bench

// A small attention problem with its own storage, and its result by the formula, in double precision.
#pragma once

#include <cstdint>
#include <vector>

#include "fastattn/fastattn.hpp"

// A tensor in a larger buffer: rows are apart from each other, and everything between and behind them is NaN.
class Tensor {
 public:
  Tensor(std::int64_t batch, std::int64_t seq, std::int64_t heads, std::int64_t head_dim, fastattn::DType dtype);
  Tensor(const Tensor&) = delete;

  const fastattn::TensorView& view() const { return view_; }
  float get(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d) const;
  void set(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d, float x);
  void fill_normal(unsigned seed);
  std::vector<double> values() const;  // [batch, seq, heads, head_dim]

 private:
  std::vector<std::uint32_t> storage_;
  fastattn::TensorView view_;
};

struct Shape {
  std::int64_t batch, seq_q, seq_k, heads, kv_heads, head_dim;
};

// Inputs are unit normal. `lse`, `dlse` and the gradients have the layout of AttentionBackward.
struct AttentionProblem {
  Shape shape;
  Tensor q, k, v, out, dout, dq, dk, dv;
  std::vector<float> lse, dlse, workspace;
  fastattn::AttentionBackward description;

  AttentionProblem(const Shape& shape, fastattn::DType dtype, fastattn::Window window, float scale = 0.3f);
  AttentionProblem(const AttentionProblem&) = delete;
};

struct Expected {
  std::vector<double> out, lse, dq, dk, dv;
};

// From the problem's q, k, v, dout and dlse.
Expected expected_of(const AttentionProblem& problem);

// ‖got − want‖ / ‖want‖; infinite where only one of the two is finite.
double relative_error(const std::vector<double>& got, const std::vector<double>& want);

#include "problem.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace bench {
namespace {

constexpr int kSamples = 24;

void require(const fastattn::Status& status) {
  if (!status.ok()) {
    throw std::runtime_error(status.message);
  }
}

void fetch_written(Tensor& tensor, const char* name) {
  tensor.fetch();
  if (tensor.has_nan()) {
    throw std::runtime_error(std::string(name) + " holds NaN: the op left values unwritten, or computed them wrong");
  }
}

}  // namespace

double RelativeError::value() const { return norm_ > 0 ? std::sqrt(difference_ / norm_) : std::sqrt(difference_); }

Problem::Problem(const Device& device, const Case& shape, fastattn::DType dtype, bool with_backward, unsigned seed)
    : device_(device),
      case_(shape),
      scale_(1.f / std::sqrt(static_cast<float>(shape.head_dim))),
      random_(seed),
      q_(device, dtype, shape.batch, shape.seq_q, shape.heads, shape.head_dim),
      k_(device, dtype, shape.batch, shape.seq_k, shape.kv_heads, shape.head_dim),
      v_(device, dtype, shape.batch, shape.seq_k, shape.kv_heads, shape.head_dim),
      out_(device, dtype, shape.batch, shape.seq_q, shape.heads, shape.head_dim),
      lse_(device, fastattn::DType::kFloat32, shape.batch, shape.heads, shape.seq_q, 1) {
  for (Tensor* input : {&q_, &k_, &v_}) {
    input->fill_normal(random_);
  }
  if (with_backward) {
    gradients_.emplace(Gradients{
        .dout = {device, dtype, shape.batch, shape.seq_q, shape.heads, shape.head_dim},
        .dq = {device, dtype, shape.batch, shape.seq_q, shape.heads, shape.head_dim},
        .dk = {device, dtype, shape.batch, shape.seq_k, shape.kv_heads, shape.head_dim},
        .dv = {device, dtype, shape.batch, shape.seq_k, shape.kv_heads, shape.head_dim},
        .workspace = nullptr,
    });
    gradients_->dout.fill_normal(random_);
    if (const std::size_t bytes = device.workspace(attention_backward()); bytes > 0) {
      gradients_->workspace = device.allocate(bytes);
    }
    forward();
  }
}

void Problem::forward() const { require(device_.run(attention())); }

void Problem::backward() const { require(device_.run(attention_backward())); }

double Problem::forward_error() {
  out_.poison();
  lse_.poison();
  forward();
  fetch_written(out_, "out");
  fetch_written(lse_, "lse");
  RelativeError out_error, lse_error;
  for (int sampled = 0; sampled < kSamples; ++sampled) {
    const Index query = sample(case_.seq_q, case_.heads, sampled);
    const std::int64_t kv_head = query.head / (case_.heads / case_.kv_heads);
    std::vector<double> scores(static_cast<std::size_t>(case_.seq_k), -std::numeric_limits<double>::infinity());
    for (std::int64_t key = 0; key < case_.seq_k; ++key) {
      if (case_.keeps(query.row, key)) {
        scores[static_cast<std::size_t>(key)] = score(query, key);
      }
    }
    const double max = *std::ranges::max_element(scores);
    double sum = 0;
    std::vector<double> row(static_cast<std::size_t>(case_.head_dim), 0.);
    for (std::int64_t key = 0; key < case_.seq_k; ++key) {
      if (!case_.keeps(query.row, key)) {
        continue;
      }
      const double weight = std::exp(scores[static_cast<std::size_t>(key)] - max);
      sum += weight;
      for (std::int64_t d = 0; d < case_.head_dim; ++d) {
        row[static_cast<std::size_t>(d)] += weight * v_.at(query.batch, key, kv_head, d);
      }
    }
    for (std::int64_t d = 0; d < case_.head_dim; ++d) {
      const double reference = sum > 0 ? row[static_cast<std::size_t>(d)] / sum : 0.;
      out_error.add(out_.at(query.batch, query.row, query.head, d), reference);
    }
    const double lse = lse_.at(query.batch, query.head, query.row, 0);
    if (sum > 0 || std::isfinite(lse)) {  // an empty row's log-sum-exp is −∞
      lse_error.add(lse, max + std::log(sum));
    }
  }
  return std::max(out_error.value(), lse_error.value());
}

double Problem::backward_error() {
  auto& [dout, dq, dk, dv, workspace] = gradients_.value();
  for (Tensor* gradient : {&dq, &dk, &dv}) {
    gradient->poison();
  }
  backward();
  out_.fetch();
  lse_.fetch();
  fetch_written(dq, "dq");
  fetch_written(dk, "dk");
  fetch_written(dv, "dv");
  const std::int64_t group = case_.heads / case_.kv_heads;
  const auto width = static_cast<std::size_t>(case_.head_dim);
  RelativeError dq_error, dk_error, dv_error;
  for (int sampled = 0; sampled < kSamples; ++sampled) {
    const Index query = sample(case_.seq_q, case_.heads, sampled);
    std::vector<double> row(width, 0.);
    for (std::int64_t key = 0; key < case_.seq_k; ++key) {
      const Weight p = weight(query, key);
      for (std::int64_t d = 0; d < case_.head_dim; ++d) {
        row[static_cast<std::size_t>(d)] += scale_ * p.gradient * k_.at(query.batch, key, query.head / group, d);
      }
    }
    for (std::int64_t d = 0; d < case_.head_dim; ++d) {
      dq_error.add(dq.at(query.batch, query.row, query.head, d), row[static_cast<std::size_t>(d)]);
    }
  }
  for (int sampled = 0; sampled < kSamples; ++sampled) {
    const Index key = sample(case_.seq_k, case_.kv_heads, sampled);
    std::vector<double> k_row(width, 0.), v_row(width, 0.);
    for (std::int64_t head = key.head * group; head < (key.head + 1) * group; ++head) {
      for (std::int64_t i = 0; i < case_.seq_q; ++i) {
        const Weight p = weight({key.batch, i, head}, key.row);
        for (std::int64_t d = 0; d < case_.head_dim; ++d) {
          k_row[static_cast<std::size_t>(d)] += scale_ * p.gradient * q_.at(key.batch, i, head, d);
          v_row[static_cast<std::size_t>(d)] += p.value * dout.at(key.batch, i, head, d);
        }
      }
    }
    for (std::int64_t d = 0; d < case_.head_dim; ++d) {
      dk_error.add(dk.at(key.batch, key.row, key.head, d), k_row[static_cast<std::size_t>(d)]);
      dv_error.add(dv.at(key.batch, key.row, key.head, d), v_row[static_cast<std::size_t>(d)]);
    }
  }
  return std::max({dq_error.value(), dk_error.value(), dv_error.value()});
}

fastattn::Attention Problem::attention() const {
  return {.q = q_.view(),
          .k = k_.view(),
          .v = v_.view(),
          .out = out_.view(),
          .lse = static_cast<float*>(lse_.view().data),
          .scale = scale_,
          .window = case_.window};
}

fastattn::AttentionBackward Problem::attention_backward() const {
  return {.forward = attention(),
          .dout = gradients_->dout.view(),
          .dlse = nullptr,
          .dq = gradients_->dq.view(),
          .dk = gradients_->dk.view(),
          .dv = gradients_->dv.view(),
          .workspace = gradients_->workspace.get()};
}

// The first and the last row, then random ones.
Problem::Index Problem::sample(std::int64_t rows, std::int64_t heads, int i) {
  const auto any = [this](std::int64_t count) {
    return std::uniform_int_distribution<std::int64_t>(0, count - 1)(random_);
  };
  return {any(case_.batch), i == 0 ? 0 : (i == 1 ? rows - 1 : any(rows)), any(heads)};
}

double Problem::score(Index query, std::int64_t key) const {
  double sum = 0;
  for (std::int64_t d = 0; d < case_.head_dim; ++d) {
    sum += q_.at(query.batch, query.row, query.head, d) *
           k_.at(query.batch, key, query.head / (case_.heads / case_.kv_heads), d);
  }
  return scale_ * sum;
}

Problem::Weight Problem::weight(Index query, std::int64_t key) const {
  if (!case_.keeps(query.row, key)) {
    return {0., 0.};
  }
  const double value = std::exp(score(query, key) - lse_.at(query.batch, query.head, query.row, 0));
  double difference = 0;  // (gradient of the weight) − Σ (output · output gradient)
  for (std::int64_t d = 0; d < case_.head_dim; ++d) {
    const double v = v_.at(query.batch, key, query.head / (case_.heads / case_.kv_heads), d);
    difference += gradients_->dout.at(query.batch, query.row, query.head, d) *
                  (v - out_.at(query.batch, query.row, query.head, d));
  }
  return {value, value * difference};
}

}  // namespace bench

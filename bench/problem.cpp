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
constexpr double kMasked = -std::numeric_limits<double>::infinity();

void require(const fastattn::Status& status) {
  if (!status.ok()) {
    throw std::runtime_error(status.message);
  }
}

double log_sum_exp(const std::vector<double>& scores, double sink) {
  const double max = std::max(*std::ranges::max_element(scores), sink);
  if (max == kMasked) {
    return kMasked;
  }
  double sum = std::exp(sink - max);
  for (const double score : scores) {
    sum += std::exp(score - max);
  }
  return max + std::log(sum);
}

void fetch_written(Tensor& tensor, const char* name) {
  tensor.fetch();
  if (tensor.has_nan()) {
    throw std::runtime_error(std::string(name) + " holds NaN: the op left values unwritten, or computed them wrong");
  }
}

}  // namespace

double RelativeError::value() const { return norm_ > 0 ? std::sqrt(difference_ / norm_) : std::sqrt(difference_); }

Problem::Problem(const Device& device, const Case& shape, fastattn::DType dtype, Score score)
    : device_(device),
      scale_(1.f / std::sqrt(static_cast<float>(shape.head_dim))),
      bias_(score == Score::kSigmoid ? -std::log(static_cast<float>(shape.seq_k)) : 0.f),
      q_(device, dtype, shape.batch, shape.seq_q, shape.heads, shape.head_dim),
      k_(device, dtype, shape.batch, shape.seq_k, shape.kv_heads, shape.head_dim),
      v_(device, dtype, shape.batch, shape.seq_k, shape.kv_heads, shape.value_dim),
      out_(device, dtype, shape.batch, shape.seq_q, shape.heads, shape.value_dim),
      case_(shape),
      dtype_(dtype),
      forward_workspace_(device.allocate(fastattn::kForwardWorkspace)) {
  if (score == Score::kSoftmax) {
    lse_.emplace(device, fastattn::DType::kFloat32, shape.batch, shape.heads, shape.seq_q, 1);
  }
  for (Tensor* input : {&q_, &k_, &v_}) {
    input->fill_normal(random_);
  }
}

void Problem::prepare_backward() {
  const auto like_q = [this] { return Tensor(device_, dtype_, case_.batch, case_.seq_q, case_.heads, case_.head_dim); };
  const auto like_k = [this] {
    return Tensor(device_, dtype_, case_.batch, case_.seq_k, case_.kv_heads, case_.head_dim);
  };
  gradients_.emplace(Gradients{.dout = like_q(), .dq = like_q(), .dk = like_k(), .dv = like_k(), .workspace = nullptr});
  gradients_->dout.fill_normal(random_);
  if (const std::size_t bytes = workspace_bytes(); bytes > 0) {
    gradients_->workspace = device_.allocate(bytes);
  }
  forward();
}

void Problem::forward() const { require(run_forward()); }

void Problem::backward() const { require(run_backward()); }

double Problem::forward_error() {
  out_.poison();
  if (lse_) {
    lse_->poison();
  }
  forward();
  fetch_written(out_, "out");
  if (lse_) {
    fetch_written(*lse_, "lse");
  }
  RelativeError out_error, lse_error;
  for (int sampled = 0; sampled < kSamples; ++sampled) {
    const Index query = sample(case_.seq_q, case_.heads, sampled);
    std::vector<double> scores;
    for (std::int64_t key = 0; key < case_.seq_k; ++key) {
      scores.push_back(score(query, key));
    }
    const double lse = lse_ ? log_sum_exp(scores, case_.sink()) : 0.;
    std::vector<double> row(static_cast<std::size_t>(case_.value_dim), 0.);
    for (std::int64_t key = 0; key < case_.seq_k; ++key) {
      const double score = scores[static_cast<std::size_t>(key)];
      if (score == kMasked) {
        continue;
      }
      const double p = weight(score, lse);
      for (std::int64_t d = 0; d < case_.value_dim; ++d) {
        row[static_cast<std::size_t>(d)] += p * v_.at(query.batch, key, kv_head(query), d);
      }
    }
    for (std::int64_t d = 0; d < case_.value_dim; ++d) {
      out_error.add(out_.at(query.batch, query.row, query.head, d), row[static_cast<std::size_t>(d)]);
    }
    if (lse_) {
      const double written = lse_->at(query.batch, query.head, query.row, 0);
      if (std::isfinite(lse) || std::isfinite(written)) {  // an empty row's log-sum-exp is −∞
        lse_error.add(written, lse);
      }
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
  if (lse_) {
    lse_->fetch();
  }
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

// The first and the last row, then random ones.
Problem::Index Problem::sample(std::int64_t rows, std::int64_t heads, int i) {
  const auto any = [this](std::int64_t count) {
    return std::uniform_int_distribution<std::int64_t>(0, count - 1)(random_);
  };
  return {any(case_.batch), i == 0 ? 0 : (i == 1 ? rows - 1 : any(rows)), any(heads)};
}

std::int64_t Problem::kv_head(Index query) const { return query.head / (case_.heads / case_.kv_heads); }

double Problem::score(Index query, std::int64_t key) const {
  if (!case_.keeps(query.batch, query.head, query.row, key)) {
    return kMasked;
  }
  double sum = 0;
  for (std::int64_t d = 0; d < case_.head_dim; ++d) {
    sum += q_.at(query.batch, query.row, query.head, d) * k_.at(query.batch, key, kv_head(query), d);
  }
  return case_.modified(scale_ * sum + bias_, key);
}

double Problem::weight(double score, double lse) const {
  return lse_ ? std::exp(score - lse) : 1 / (1 + std::exp(-score));
}

Problem::Weight Problem::weight(Index query, std::int64_t key) const {
  const double score = this->score(query, key);
  if (score == kMasked) {
    return {0., 0.};
  }
  const double value = weight(score, lse_ ? lse_->at(query.batch, query.head, query.row, 0) : 0.);
  double dweight = 0, mean = 0;  // the weight's gradient, and the row's mean of these: Σ output · output gradient
  for (std::int64_t d = 0; d < case_.head_dim; ++d) {
    const double dout = gradients_->dout.at(query.batch, query.row, query.head, d);
    dweight += dout * v_.at(query.batch, key, kv_head(query), d);
    mean += dout * out_.at(query.batch, query.row, query.head, d);
  }
  return {value, lse_ ? value * (dweight - mean) : value * (1 - value) * dweight};
}

}  // namespace bench

#include "attention_problem.hpp"

#include <cmath>
#include <limits>
#include <random>

#include "fastattn/operand/element.hpp"

using namespace fastattn;

Tensor::Tensor(std::int64_t batch, std::int64_t seq, std::int64_t heads, std::int64_t head_dim, DType dtype) {
  constexpr std::int64_t kGap = 8;
  const std::int64_t head_stride = head_dim + kGap, seq_stride = heads * head_stride + kGap;
  const std::int64_t batch_stride = (seq + 1) * seq_stride;
  storage_.assign(batch * batch_stride + kGap, 0xffffffffu);  // NaN in each of the three types
  view_ = {storage_.data(), {batch, seq, heads, head_dim}, {batch_stride, seq_stride, head_stride, 1}, dtype};
}

float Tensor::get(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d) const {
  switch (view_.dtype) {
    case DType::kFloat16:
      return to_float(view_.row<Float16>(b, s, h)[d]);
    case DType::kBFloat16:
      return to_float(view_.row<BFloat16>(b, s, h)[d]);
    default:
      return view_.row<float>(b, s, h)[d];
  }
}

void Tensor::set(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d, float x) {
  switch (view_.dtype) {
    case DType::kFloat16:
      view_.row<Float16>(b, s, h)[d] = from_float<Float16>(x);
      return;
    case DType::kBFloat16:
      view_.row<BFloat16>(b, s, h)[d] = from_float<BFloat16>(x);
      return;
    default:
      view_.row<float>(b, s, h)[d] = x;
  }
}

void Tensor::fill_normal(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (std::int64_t b = 0; b < view_.batch(); ++b) {
    for (std::int64_t s = 0; s < view_.seq(); ++s) {
      for (std::int64_t h = 0; h < view_.heads(); ++h) {
        for (std::int64_t d = 0; d < view_.head_dim(); ++d) {
          set(b, s, h, d, normal(random));
        }
      }
    }
  }
}

std::vector<double> Tensor::values() const {
  std::vector<double> list;
  for (std::int64_t b = 0; b < view_.batch(); ++b) {
    for (std::int64_t s = 0; s < view_.seq(); ++s) {
      for (std::int64_t h = 0; h < view_.heads(); ++h) {
        for (std::int64_t d = 0; d < view_.head_dim(); ++d) {
          list.push_back(get(b, s, h, d));
        }
      }
    }
  }
  return list;
}

AttentionProblem::AttentionProblem(const Shape& s, DType dtype, Window window, float scale)
    : shape(s),
      q(s.batch, s.seq_q, s.heads, s.head_dim, dtype),
      k(s.batch, s.seq_k, s.kv_heads, s.head_dim, dtype),
      v(s.batch, s.seq_k, s.kv_heads, s.head_dim, dtype),
      out(s.batch, s.seq_q, s.heads, s.head_dim, dtype),
      dout(s.batch, s.seq_q, s.heads, s.head_dim, dtype),
      dq(s.batch, s.seq_q, s.heads, s.head_dim, dtype),
      dk(s.batch, s.seq_k, s.kv_heads, s.head_dim, dtype),
      dv(s.batch, s.seq_k, s.kv_heads, s.head_dim, dtype),
      lse(s.batch * s.heads * s.seq_q),
      dlse(lse.size()) {
  unsigned seed = 0;
  for (Tensor* tensor : {&q, &k, &v, &dout}) {
    tensor->fill_normal(++seed);
  }
  std::mt19937 random(++seed);
  std::normal_distribution<float> normal;
  for (float& x : dlse) {
    x = normal(random);
  }
  description = {.forward = {q.view(), k.view(), v.view(), out.view(), lse.data(), scale, window},
                 .dout = dout.view(),
                 .dlse = dlse.data(),
                 .dq = dq.view(),
                 .dk = dk.view(),
                 .dv = dv.view()};
  workspace.resize(attention_backward_workspace(description, StdThreads{}) / sizeof(float) + 1);
  description.workspace = workspace.data();
}

Expected expected_of(const AttentionProblem& p) {
  const auto [batch, seq_q, seq_k, heads, kv_heads, dim] = p.shape;
  const Window window = p.description.forward.window;
  const double scale = p.description.forward.scale;
  const std::vector<double> q = p.q.values(), k = p.k.values(), v = p.v.values(), dout = p.dout.values();
  Expected e{std::vector<double>(q.size()), std::vector<double>(p.lse.size()), std::vector<double>(q.size()),
             std::vector<double>(k.size()), std::vector<double>(k.size())};
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t group = heads / kv_heads;
      const auto q_at = [&](std::int64_t i) { return ((b * seq_q + i) * heads + h) * dim; };
      const auto k_at = [&](std::int64_t j) { return ((b * seq_k + j) * kv_heads + h / group) * dim; };
      const auto dot = [&](const std::vector<double>& x, std::int64_t i, const std::vector<double>& y, std::int64_t j) {
        double sum = 0.;
        for (std::int64_t d = 0; d < dim; ++d) {
          sum += x[i + d] * y[j + d];
        }
        return sum;
      };
      for (std::int64_t i = 0; i < seq_q; ++i) {
        const std::int64_t row = (b * heads + h) * seq_q + i;
        std::vector<std::int64_t> kept;
        std::vector<double> weights;
        double max = -HUGE_VAL, sum = 0., delta = 0.;
        for (std::int64_t j = 0; j < seq_k; ++j) {
          const std::int64_t offset = j - (i + seq_k - seq_q);
          if ((window.left == kUnbounded || offset >= -window.left) &&
              (window.right == kUnbounded || offset <= window.right)) {
            kept.push_back(j);
            weights.push_back(scale * dot(q, q_at(i), k, k_at(j)));
            max = std::max(max, weights.back());
          }
        }
        for (double& weight : weights) {
          weight = std::exp(weight - max);
          sum += weight;
        }
        e.lse[row] = kept.empty() ? -HUGE_VAL : max + std::log(sum);
        for (std::size_t n = 0; n < kept.size(); ++n) {
          weights[n] /= sum;
          for (std::int64_t d = 0; d < dim; ++d) {
            e.out[q_at(i) + d] += weights[n] * v[k_at(kept[n]) + d];
          }
        }
        delta = dot(e.out, q_at(i), dout, q_at(i)) - p.dlse[row];
        for (std::size_t n = 0; n < kept.size(); ++n) {
          const std::int64_t at = k_at(kept[n]);
          const double ds = scale * weights[n] * (dot(dout, q_at(i), v, at) - delta);
          for (std::int64_t d = 0; d < dim; ++d) {
            e.dq[q_at(i) + d] += ds * k[at + d];
            e.dk[at + d] += ds * q[q_at(i) + d];
            e.dv[at + d] += weights[n] * dout[q_at(i) + d];
          }
        }
      }
    }
  }
  return e;
}

double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0., norm = 0.;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (got[i] == want[i]) {
      norm += std::isfinite(want[i]) ? want[i] * want[i] : 0.;
      continue;
    }
    if (!std::isfinite(got[i]) || !std::isfinite(want[i])) {
      return HUGE_VAL;
    }
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return difference == 0. ? 0. : std::sqrt(difference / norm);
}

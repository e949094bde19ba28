#include <vector>

#include "fastattn/fastattn.hpp"
#include "fastattn/operand/element.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

template <class Body>
void parallel_for(const Threads& threads, std::int64_t count, const Body& body) {
  const auto task = [](void* context, std::int64_t i) { (*static_cast<const Body*>(context))(i); };
  threads.run(count, task, const_cast<Body*>(&body));
}

template <class Element>
float dot(const Element* a, const Element* b, std::int64_t n) {
  float sum = 0.f;
  for (std::int64_t i = 0; i < n; ++i) {
    sum += to_float(a[i]) * to_float(b[i]);
  }
  return sum;
}

template <class Element>
void forward(const Attention& p, const Threads& threads) {
  const Band band = band_of(p);
  const std::int64_t dim = p.q.head_dim(), group = p.q.heads() / p.k.heads();
  parallel_for(threads, num_rows(p), [&](std::int64_t row) {
    const std::int64_t i = row % p.q.seq(), h = row / p.q.seq() % p.q.heads(), b = row / p.q.seq() / p.q.heads();
    std::vector<float> out(dim);
    float max = -kInfinity, sum = 0.f;
    for (int pass = 0; pass < 2; ++pass) {
      for (int j = 0; j < band.num_k; ++j) {
        if (!band.keeps(static_cast<int>(i), j)) {
          continue;
        }
        const float score = p.scale * dot(p.q.row<Element>(b, i, h), p.k.row<Element>(b, j, h / group), dim);
        if (pass == 0) {
          max = max_of(max, score);
          continue;
        }
        const float weight = std::exp(score - max);
        sum += weight;
        const Element* v = p.v.row<Element>(b, j, h / group);
        for (int d = 0; d < dim; ++d) {
          out[d] += weight * to_float(v[d]);
        }
      }
    }
    for (int d = 0; d < dim; ++d) {
      p.out.row<Element>(b, i, h)[d] = from_float<Element>(sum == 0.f ? 0.f : out[d] / sum);
    }
    if (p.lse != nullptr) {
      p.lse[row] = max + std::log(sum);
    }
  });
}

template <class Element>
void backward(const AttentionBackward& problem, const Threads& threads) {
  const Attention& p = problem.forward;
  const Band band = band_of(p);
  const std::int64_t dim = p.q.head_dim(), group = p.q.heads() / p.k.heads();
  parallel_for(threads, p.k.batch() * p.k.heads(), [&](std::int64_t index) {
    const std::int64_t b = index / p.k.heads(), g = index % p.k.heads();
    std::vector<float> dk(band.num_k * dim), dv(band.num_k * dim), dq(dim);
    for (std::int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (int i = 0; i < band.num_q; ++i) {
        const std::int64_t row = (b * p.q.heads() + h) * band.num_q + i;
        const Element *q = p.q.row<Element>(b, i, h), *dout = problem.dout.row<Element>(b, i, h);
        const float delta =
            dot(dout, p.out.row<Element>(b, i, h), dim) - (problem.dlse != nullptr ? problem.dlse[row] : 0.f);
        dq.assign(dim, 0.f);
        for (int j = 0; j < band.num_k; ++j) {
          if (!band.keeps(i, j)) {
            continue;
          }
          const Element *k = p.k.row<Element>(b, j, g), *v = p.v.row<Element>(b, j, g);
          const float weight = std::exp(p.scale * dot(q, k, dim) - p.lse[row]);
          const float ds = p.scale * weight * (dot(dout, v, dim) - delta);
          for (int d = 0; d < dim; ++d) {
            dq[d] += ds * to_float(k[d]);
            dk[j * dim + d] += ds * to_float(q[d]);
            dv[j * dim + d] += weight * to_float(dout[d]);
          }
        }
        for (int d = 0; d < dim; ++d) {
          problem.dq.row<Element>(b, i, h)[d] = from_float<Element>(dq[d]);
        }
      }
    }
    for (int j = 0; j < band.num_k; ++j) {
      for (int d = 0; d < dim; ++d) {
        problem.dk.row<Element>(b, j, g)[d] = from_float<Element>(dk[j * dim + d]);
        problem.dv.row<Element>(b, j, g)[d] = from_float<Element>(dv[j * dim + d]);
      }
    }
  });
}

template <class Run>
void with_element(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(Float16{});
    case DType::kBFloat16:
      return run(BFloat16{});
  }
}

}  // namespace

const char* cpu_instruction_set() { return "avx2"; }

Status attention(const Attention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  with_element(problem.q.dtype, [&](auto element) { forward<decltype(element)>(problem, threads); });
  return {};
}

std::size_t attention_backward_workspace(const AttentionBackward&, const Threads&) { return 0; }

Status attention_backward(const AttentionBackward& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok()) {
    return status;
  }
  with_element(problem.forward.q.dtype, [&](auto element) { backward<decltype(element)>(problem, threads); });
  return {};
}

#if !FASTATTN_WITH_CUDA

bool built_with_cuda() { return false; }

Status attention(const Attention&, Stream) {
  return failure("attention: this fastattn is built without CUDA; pass CPU tensors");
}

std::size_t attention_backward_workspace(const AttentionBackward&, Stream) { return 0; }

Status attention_backward(const AttentionBackward&, Stream) {
  return failure("attention_backward: this fastattn is built without CUDA; pass CPU tensors");
}

#else

bool built_with_cuda() { return true; }

#endif

}  // namespace fastattn

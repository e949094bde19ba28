// The threads of quantize_tokens' GPU kernels, one after the other on a CPU: given the mean, every bit is that of the
// CPU's own kernels.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "sm90/quantize_tokens.hpp"

using namespace fastattn;
using namespace fastattn::sm90;

namespace {

constexpr std::int64_t kBatch = 2, kHeads = 3;
constexpr int kGuard = 64;  // bytes past the results that must stay as they are

// body(part) for each block of a launch.
template <class Kernel, class Body>
void for_blocks(const QuantizeTokens& p, const Body& body) {
  const std::int64_t blocks = p.x.batch() * p.x.heads() * Kernel::parts(p);
  for (std::int64_t block = 0; block < blocks; ++block) {
    body(token_part(p, Kernel::parts(p), static_cast<std::uint32_t>(block)));
  }
}

template <class Element, class Format, int kHeadDim>
void run_rows(const QuantizeTokens& p) {
  using Rows = TokenRows<Element, Format, kHeadDim>;
  for_blocks<Rows>(p, [&](const TokenPart& part) {
    std::vector<Rows> threads;
    for (int thread = 0; thread < kTokenThreads; ++thread) {
      threads.emplace_back(p, part, thread);
    }
    std::uint32_t largest[Rows::kTokens] = {};
    float inverse[Rows::kTokens];
    for (const Rows& rows : threads) {
      for (int pass = 0; pass < Rows::kPasses; ++pass) {
        std::uint32_t& of_group = largest[rows.group(pass)];
        of_group = std::max(of_group, rows.largest(pass));
      }
    }
    for (int group = 0; group < Rows::kTokens; ++group) {
      inverse[group] = threads[static_cast<std::size_t>(group)].write_scale(group, largest[group]);
    }
    for (const Rows& rows : threads) {
      for (int pass = 0; pass < Rows::kPasses; ++pass) {
        rows.write_values(pass, inverse[rows.group(pass)]);
      }
    }
  });
}

template <class Element, class Format, int kHeadDim>
void run_columns(const QuantizeTokens& p) {
  using Columns = TokenColumns<Element, Format, kHeadDim>;
  const auto shared = std::make_unique<typename Columns::Shared>();
  for_blocks<Columns>(p, [&](const TokenPart& part) {
    for (int thread = 0; thread < kTokenThreads; ++thread) {
      Columns::write_words(p, part, thread, *shared);
    }
    for (int thread = 0; thread < kTokenThreads; ++thread) {
      Columns::write_rows(p, part, thread, *shared);
    }
  });
}

template <class Element, class Format, int kHeadDim>
void run_survey(const QuantizeTokens& p) {
  using Survey = TokenSurvey<Element, kHeadDim>;
  const auto shared = std::make_unique<typename Survey::Shared>();
  for_blocks<Survey>(p, [&](const TokenPart& part) {
    for (int thread = 0; thread < kTokenThreads; ++thread) {
      Survey::survey_rows(p, part, thread, *shared);
    }
    for (int thread = 0; thread < kTokenThreads; ++thread) {
      Survey::survey_chunk(p, part, thread, *shared);
    }
  });
  for (std::int64_t channel = 0; channel < num_channels(p); ++channel) {
    ChannelSurvey lanes[32];
    for (int lane = 0; lane < 32; ++lane) {
      lanes[lane] = survey_chunks(p, channel, lane);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) {
        lanes[lane].add(lanes[lane + distance]);
      }
    }
    write_channel<Format>(p, channel, lanes[0]);
  }
}

template <class Element, class Format, int kHeadDim>
void run_width(const QuantizeTokens& p) {
  if (p.mean != nullptr || p.transpose) {
    run_survey<Element, Format, kHeadDim>(p);
  }
  p.transpose ? run_columns<Element, Format, kHeadDim>(p) : run_rows<Element, Format, kHeadDim>(p);
}

template <class Element, class Format>
void run_format(const QuantizeTokens& p) {
  constexpr auto& kWidths = kTokenWidths;
  p.x.head_dim() <= kWidths[0].head_dim   ? run_width<Element, Format, kWidths[0].head_dim>(p)
  : p.x.head_dim() <= kWidths[1].head_dim ? run_width<Element, Format, kWidths[1].head_dim>(p)
                                          : run_width<Element, Format, kWidths[2].head_dim>(p);
}

template <class Element>
void run(const QuantizeTokens& p) {
  p.format == TokenFormat::kInt8         ? run_format<Element, Int8>(p)
  : p.format == TokenFormat::kInt4       ? run_format<Element, Int4>(p)
  : p.format == TokenFormat::kInt4InByte ? run_format<Element, Int4InByte>(p)
                                         : run_format<Element, Float8E4M3>(p);
}

// Aligned as memory of a GPU is.
template <class T>
struct Memory {
  explicit Memory(std::int64_t size) : chunks(static_cast<std::size_t>(size) * sizeof(T) / sizeof(Chunk) + 8) {
    std::fill_n(reinterpret_cast<std::uint8_t*>(chunks.data()), chunks.size() * sizeof(Chunk), 0xff);
  }
  T* data() { return reinterpret_cast<T*>(chunks.data()); }

  struct alignas(64) Chunk {
    std::uint8_t bytes[64];
  };
  std::vector<Chunk> chunks;
};

struct Options {
  TokenFormat format;
  std::int64_t group;  // kAllTokens: transposed
  std::int64_t tokens, dim;
  bool smooth, permuted;

  std::string name() const {
    return "format " + std::to_string(static_cast<int>(format)) + ", group " + std::to_string(group) + ", tokens " +
           std::to_string(tokens) + ", head_dim " + std::to_string(dim) + (smooth ? ", smooth" : "") +
           (permuted ? ", permuted" : "");
  }
};

struct Results {
  Results(const Options& o, std::int64_t bytes, std::int64_t groups)
      : bytes(bytes), groups(groups), values(bytes + kGuard), scales(groups + kGuard), mean(kBatch * kHeads * o.dim) {}

  std::int64_t bytes, groups;
  Memory<std::uint8_t> values;
  Memory<std::uint32_t> scales, mean;
};

// Normal tokens, some of them large, with offsets; and, in a head each, what is not finite and what is denormal.
template <class Element>
float token_value(std::mt19937& random, std::int64_t token, std::int64_t head, std::int64_t d) {
  std::normal_distribution<float> normal;
  const float x = (normal(random) + (d % 5 == 1 ? 4.f : 0.f)) * (token % 17 == 5 ? 8.f : 1.f);
  if (head == 1 && token % 70 == 30 && d == 3) {
    return token % 140 == 30 ? kInfinity : std::numeric_limits<float>::quiet_NaN();
  }
  if (head == 2) {
    return token < 40 ? (d % 2 == 0 ? 0.f : -0.f) : x * 1e-39f;
  }
  return d == 6 ? 0.1f : x;
}

template <class Element>
void compare(const Options& o) {
  std::mt19937 random(static_cast<unsigned>(o.tokens * 1000 + o.dim));
  const std::int64_t row = kHeads * o.dim + 8, of_batch = (o.tokens + 1) * row;
  Memory<Element> x(kBatch * of_batch);
  Memory<float> exact(kBatch * o.tokens * kHeads * o.dim);
  const TensorView view{.data = x.data(),
                        .shape = {kBatch, o.tokens, kHeads, o.dim},
                        .stride = {of_batch, row, o.dim, 1},
                        .dtype = Element::kDType};
  const TensorView exact_view{.data = exact.data(),
                              .shape = {kBatch, o.tokens, kHeads, o.dim},
                              .stride = {o.tokens * kHeads * o.dim, kHeads * o.dim, o.dim, 1},
                              .dtype = DType::kFloat32};
  const auto for_elements = [&](const auto& body) {
    for (std::int64_t i = 0; i < kBatch * o.tokens * kHeads * o.dim; ++i) {
      const std::int64_t d = i % o.dim, h = i / o.dim % kHeads, token = i / o.dim / kHeads % o.tokens;
      const std::int64_t b = i / o.dim / kHeads / o.tokens;
      body(view.row<Element>(b, token, h)[d], exact_view.row<float>(b, token, h)[d], b, token, h, d);
    }
  };
  for_elements([&](Element& element, float&, auto, auto token, auto h, auto d) {
    element = from_float<Element>(token_value<Element>(random, token, h, d));
  });

  std::vector<std::int32_t> order(static_cast<std::size_t>(kHeads * o.tokens));
  for (std::size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<std::int32_t>((i * 7 + 3) % static_cast<std::size_t>(o.tokens + 2)) - 1;  // −1 … tokens
  }
  const bool transpose = o.group == kAllTokens;
  const int bits = bits_of(o.format);
  const std::int64_t bytes = kBatch * kHeads * (transpose ? padded_tokens(o.tokens) : o.tokens) * o.dim * bits / 8;
  const std::int64_t groups = kBatch * kHeads * (transpose ? o.dim : num_groups(o.tokens, o.group));
  Results got(o, bytes, groups), expected(o, bytes, groups);
  std::vector<ChannelSurvey> workspace(
      static_cast<std::size_t>(kBatch * kHeads * o.dim * num_chunks(static_cast<int>(o.tokens))));
  const auto problem = [&](const TensorView& x, Results& results) {
    QuantizeTokens p;
    p.x = x;
    p.format = o.format;
    p.group = o.group;
    p.transpose = transpose;
    p.values = results.values.data();
    p.scales = reinterpret_cast<float*>(results.scales.data());
    p.permutation = {o.permuted ? order.data() : nullptr, 1, kHeads};
    p.workspace = workspace.data();
    return p;
  };
  QuantizeTokens p = problem(view, got);
  p.mean = o.smooth ? reinterpret_cast<float*>(got.mean.data()) : nullptr;
  run<Element>(p);

  for_elements([&](Element element, float& x, auto b, auto, auto h, auto d) {
    x = to_float(element) - (o.smooth ? p.mean[(b * kHeads + h) * o.dim + d] : 0.f);
  });
  check(quantize_tokens(problem(exact_view, expected), StdThreads(1)).ok(), o.name());
  check(std::equal(got.values.data(), got.values.data() + bytes + kGuard, expected.values.data()),
        "values of " + o.name());
  check(std::equal(got.scales.data(), got.scales.data() + groups + kGuard, expected.scales.data()),
        "scales of " + o.name());
  if (o.smooth) {
    Results own(o, bytes, groups);
    QuantizeTokens of_cpu = problem(view, own);
    of_cpu.mean = reinterpret_cast<float*>(own.mean.data());
    check(quantize_tokens(of_cpu, StdThreads(1)).ok(), o.name());
    double worst = 0;
    for (std::int64_t i = 0; i < kBatch * kHeads * o.dim; ++i) {
      const bool same = std::isfinite(p.mean[i]) == std::isfinite(of_cpu.mean[i]);
      worst =
          std::max(worst, same ? (std::isfinite(p.mean[i]) ? std::abs(p.mean[i] - of_cpu.mean[i]) : 0.) : kInfinity);
      if (i % o.dim == 6 && i / o.dim % kHeads != 2) {
        check(p.mean[i] == to_float(from_float<Element>(0.1f)), "the mean of a constant channel, " + o.name());
      }
    }
    check(worst < 1e-5, "mean of " + o.name());
  }
}

const Test bits("quantize_tokens on a GPU: every bit is that of a CPU", [] {
  int turn = 0;
  for (const TokenFormat format :
       {TokenFormat::kInt8, TokenFormat::kInt4, TokenFormat::kInt4InByte, TokenFormat::kFloat8}) {
    for (const std::int64_t group :
         {std::int64_t{1}, std::int64_t{8}, std::int64_t{16}, std::int64_t{32}, kAllTokens}) {
      for (const std::int64_t tokens : {1, 31, 33, 128, 129, 257, 300}) {
        for (const std::int64_t dim : {8, 64, 72, 136}) {
          const Options options{format, group, tokens, dim, turn % 2 == 1, turn / 2 % 2 == 1};
          turn / 4 % 2 == 0 ? compare<BFloat16>(options) : compare<Float16>(options);
          turn += 3;  // prime to the eight kinds
        }
      }
    }
  }
});

const Test chunks("quantize_tokens on a GPU: many chunks", [] {
  compare<BFloat16>({TokenFormat::kInt8, 32, 16385, 8, true, false});
  compare<Float16>({TokenFormat::kFloat8, kAllTokens, 20000, 8, true, true});
});

const Test banks("quantize_tokens on a GPU: a warp's words lie in 32 banks", [] {
  using Columns = TokenColumns<BFloat16, Int8, 128>;
  constexpr std::int64_t kTokens = 128, kDim = 128;
  std::vector<std::uint16_t> x(kTokens * kDim, 0x3f80);
  std::vector<float> scales(kDim, 1.f / 127);
  QuantizeTokens p;
  p.x = {.data = x.data(),
         .shape = {1, kTokens, 1, kDim},
         .stride = {kTokens * kDim, kDim, kDim, 1},
         .dtype = DType::kBFloat16};
  p.scales = scales.data();
  p.transpose = true;
  for (int warp = 0; warp < kTokenThreads / 32; ++warp) {
    std::set<std::size_t> of_store[kDim / 64 * kUnit];  // the banks of what the lanes write at once
    for (int lane = 0; lane < 32; ++lane) {
      Columns::Shared shared{};
      Columns::write_words(p, {0, 0, 0}, warp * 32 + lane, shared);
      for (std::size_t channel = 0; channel < kDim; ++channel) {
        for (std::size_t word = 0; word < 32; ++word) {
          if (shared.unit[channel][word / 4].word[word % 4] != 0) {
            of_store[channel / 64 * kUnit + channel % kUnit].insert(word);
          }
        }
      }
    }
    for (const auto& of : of_store) {
      check(of.size() == 32, "warp " + std::to_string(warp) + " writes to " + std::to_string(of.size()) + " banks");
    }
  }
});

}  // namespace

// The executor of quantize_tokens: float tiles of tokens in scratch memory, then rows of few bits.
#pragma once

#include <cstring>

#include "fastattn/cpu/tile.hpp"
#include "fastattn/operand/low_bit.hpp"

namespace fastattn::cpu {

// The tokens of a task: whole runs of groups of every size. Also what is added up before it meets a longer sum.
inline constexpr int kTokenTile = 128;

// The largest magnitude of x[0, width); NaN if not all are finite.
template <class Isa>
float magnitude(const float* x, int width) {
  using V = Vector<Isa>;
  V least(0.f), poison(0.f);
  for (int i = 0; i < width; i += V::kWidth) {
    const V some = V::load(x + i);
    least = min_of(least, minus_magnitude(some));
    poison = fused_multiply_add(some, V(0.f), poison);
  }
  return largest_of(V(0.f) - least) + sum_of(poison);
}

// The values of x[0, count), which share a scale.
template <class Isa, class Format>
void encode(const float* x, int count, float inverse, std::uint8_t* to) {
  if (inverse == 0.f) {
    std::memset(to, 0, static_cast<std::size_t>(count * Format::kBits / 8));
  } else if constexpr (std::is_same_v<Format, Float8E4M3>) {
    for (int i = 0; i < count; ++i) {
      to[i] = from_float<Float8E4M3>(x[i] * inverse).bits;
    }
  } else if constexpr (Format::kBits == 8) {
    for (int i = 0; i < count; ++i) {
      to[i] = static_cast<std::uint8_t>(round_product(x[i], inverse));
    }
  } else {
    for (int i = 0; i < count / 2; ++i) {
      const int low = round_product(x[2 * i], inverse), high = round_product(x[2 * i + 1], inverse);
      to[i] = static_cast<std::uint8_t>((low & 15) | (high << 4));
    }
  }
}

// What is known of each channel of a head: `width` floats each, zero past head_dim.
struct Channels {
  float *mean, *least, *most;
};

// A mean lies between the least and the most, whatever the rounding: a channel of one value is centred to zeros, and no
// sum overflows. It is not finite if a token is not.
template <class Isa, class Element>
void survey(const TensorView& x, std::int64_t b, std::int64_t h, const Channels& channels) {
  using V = Vector<Isa>;
  const int dim = static_cast<int>(x.head_dim());
  if (x.seq() == 0) {
    for (int d = 0; d < round_up<Isa>(dim); ++d) {
      channels.mean[d] = channels.least[d] = channels.most[d] = 0.f;
    }
    return;
  }
  const V share(1.f / static_cast<float>(x.seq()));
  for (std::int64_t first = 0; first < x.seq(); first += kTokenTile) {
    const std::int64_t end = min_of(first + kTokenTile, x.seq());
    for (int d = 0; d < dim; d += V::kWidth) {
      V mean(0.f), least(kInfinity), most(-kInfinity);
      for (std::int64_t token = first; token < end; ++token) {
        const V some = load_some<Isa>(x.row<const Element>(b, token, h) + d, dim - d);
        mean = fused_multiply_add(some, share, mean);
        least = min_of(least, some);
        most = max_of(most, some);
      }
      if (first > 0) {
        mean = mean + V::load(channels.mean + d);
        least = min_of(least, V::load(channels.least + d));
        most = max_of(most, V::load(channels.most + d));
      }
      mean.store(channels.mean + d);
      least.store(channels.least + d);
      most.store(channels.most + d);
    }
  }
  for (int d = 0; d < dim; d += V::kWidth) {
    const V mean = V::load(channels.mean + d), least = V::load(channels.least + d), most = V::load(channels.most + d);
    max_of(least, min_of(most, mean)).store(channels.mean + d);
  }
}

// A tile of tokens less their mean, in the order of their slots if they are to be transposed; zeros where there is no
// token.
template <class Isa, class Element>
void load_tokens(float* tile, const QuantizeTokens& p, std::int64_t b, std::int64_t h, std::int64_t first, int count,
                 const float* mean) {
  using V = Vector<Isa>;
  const int dim = static_cast<int>(p.x.head_dim()), width = round_up<Isa>(dim);
  const int tokens = static_cast<int>(p.x.seq());
  const std::int32_t* const order = p.permutation.row(b, h, tokens);
  for (int i = 0; i < count; ++i, tile += width) {
    const int place = static_cast<int>(first) + (p.transpose ? token_in_slot(i) : i);
    const int token = token_at(order, place, tokens);
    for (int d = 0; d < width; d += V::kWidth) {
      const V some =
          token >= 0 ? load_some<Isa>(p.x.row<const Element>(b, token, h) + d, dim - d) - V::load(mean + d) : V(0.f);
      some.store(tile + d);
    }
  }
}

// The mean of a head's tokens, and their scales where each is of a channel.
template <class Isa, class Element, class Format>
void quantize_channels(const QuantizeTokens& p, std::int64_t b, std::int64_t h) {
  const int dim = static_cast<int>(p.x.head_dim());
  const std::int64_t offset = (b * p.x.heads() + h) * dim;
  Scratch scratch;
  const Channels channels{scratch.take(kMaxHeadDim), scratch.take(kMaxHeadDim), scratch.take(kMaxHeadDim)};
  survey<Isa, Element>(p.x, b, h, channels);
  for (int d = 0; d < dim; ++d) {
    const float mean = channels.mean[d], centre = p.mean == nullptr ? 0.f : mean;
    if (p.mean != nullptr) {
      p.mean[offset + d] = mean;
    }
    if (p.transpose) {
      p.scales[offset + d] = scale_of<Format>(largest_between(channels.least[d], channels.most[d], mean, centre));
    }
  }
}

// A tile of tokens in rows of channels; a scale for each group of tokens.
template <class Isa, class Format>
void quantize_rows(const QuantizeTokens& p, const float* tile, std::int64_t b, std::int64_t h, std::int64_t first,
                   int count) {
  const int dim = static_cast<int>(p.x.head_dim()), width = round_up<Isa>(dim);
  const std::int64_t heads = p.x.heads(), tokens = p.x.seq(), groups = num_groups(tokens, p.group);
  const std::int64_t first_group = group_of(first, p.group);
  float largest[kTokenTile] = {};
  for (int i = 0; i < count; ++i) {
    const float of_token = magnitude<Isa>(tile + i * width, width);
    float& of_group = largest[group_of(i, p.group)];
    of_group = of_token <= of_group ? of_group : of_token + (of_group - of_group);  // NaN of either stays
  }
  float inverse[kTokenTile];
  float* const scales = p.scales + (b * heads + h) * groups + first_group;
  for (int g = 0; g < min_of(kTokenTile / p.group, groups - first_group); ++g) {
    scales[g] = scale_of<Format>(largest[g]);
    inverse[g] = inverse_of(scales[g]);
  }
  const int row = dim * Format::kBits / 8;
  for (int i = 0; i < count; ++i) {
    encode<Isa, Format>(tile + i * width, dim, inverse[group_of(i, p.group)],
                        static_cast<std::uint8_t*>(p.values) + ((b * tokens + first + i) * heads + h) * row);
  }
}

// A tile of tokens in rows of tokens, which have their channels' scales. `rows` is scratch for them.
template <class Isa, class Format>
void quantize_columns(const QuantizeTokens& p, const float* tile, float* rows, std::int64_t b, std::int64_t h,
                      std::int64_t first, int count) {
  constexpr int kWidth = Vector<Isa>::kWidth;
  const int dim = static_cast<int>(p.x.head_dim()), width = round_up<Isa>(dim);
  for (int d = 0; d < width; d += kWidth) {
    for (int token = 0; token < count; token += kWidth) {
      Vector<Isa> block[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        block[i] = Vector<Isa>::load(tile + (token + i) * width + d);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        block[i].store(rows + (d + i) * kTokenTile + token);
      }
    }
  }
  const std::int64_t length = padded_tokens(p.x.seq()), first_row = (b * p.x.heads() + h) * dim;
  for (int d = 0; d < dim; ++d) {
    encode<Isa, Format>(rows + d * kTokenTile, count, inverse_of(p.scales[first_row + d]),
                        static_cast<std::uint8_t*>(p.values) + ((first_row + d) * length + first) * Format::kBits / 8);
  }
}

template <class Isa, class Element, class Format>
void quantize_tokens(const QuantizeTokens& p, const Threads& threads) {
  static_assert((2 * kTokenTile + 1) * kMaxHeadDim <= kScratchFloats);
  const std::int64_t heads = p.x.heads(), of_heads = p.x.batch() * heads;
  if (p.mean != nullptr || p.transpose) {
    parallel_for(threads, of_heads,
                 [&](std::int64_t task) { quantize_channels<Isa, Element, Format>(p, task / heads, task % heads); });
  }
  const std::int64_t length = p.transpose ? padded_tokens(p.x.seq()) : p.x.seq();
  const std::int64_t tiles = ceil_div<std::int64_t>(length, kTokenTile);
  parallel_for(threads, of_heads * tiles, [&](std::int64_t task) {
    const std::int64_t b = task / tiles / heads, h = task / tiles % heads, first = task % tiles * kTokenTile;
    const int count = static_cast<int>(min_of<std::int64_t>(kTokenTile, length - first));
    Scratch scratch;
    float* const mean = scratch.take(kMaxHeadDim);
    float* const tile = scratch.take(kTokenTile * kMaxHeadDim);
    const int dim = static_cast<int>(p.x.head_dim());
    for (int d = 0; d < round_up<Isa>(dim); ++d) {
      mean[d] = p.mean != nullptr && d < dim ? p.mean[(b * heads + h) * dim + d] : 0.f;
    }
    load_tokens<Isa, Element>(tile, p, b, h, first, count, mean);
    if (p.transpose) {
      quantize_columns<Isa, Format>(p, tile, scratch.take(kTokenTile * kMaxHeadDim), b, h, first, count);
    } else {
      quantize_rows<Isa, Format>(p, tile, b, h, first, count);
    }
  });
}

}  // namespace fastattn::cpu

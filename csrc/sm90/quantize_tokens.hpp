// What a thread of quantize_tokens' kernels does between two barriers. Plain C++: a test lets the threads of a block
// take turns on a CPU, and compares every bit.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "fastattn/fastattn.hpp"

namespace fastattn::sm90 {

// Widths that the kernels are compiled for; a head_dim takes the first that it fits in.
struct TokenWidth {
  int head_dim;
};
inline constexpr TokenWidth kTokenWidths[] = {{64}, {128}, {256}};

inline constexpr int kTokenThreads = 256;  // of a block
inline constexpr int kUnit = 8;            // channels that a thread reads at once

// What memory is read and written in.
struct [[gnu::may_alias]] alignas(16) Unit {
  std::uint32_t pair[kUnit / 2];  // of 16-bit elements
};
struct [[gnu::may_alias]] alignas(16) UnitFloats {
  float x[kUnit];
};
template <int kWords>
struct [[gnu::may_alias]] alignas(4 * kWords) Words {
  std::uint32_t word[kWords];
};

template <class Element>
FASTATTN_HD float channel_of(const Unit& unit, int i) {
  return to_float(Element{static_cast<std::uint16_t>(unit.pair[i / 2] >> (i % 2 * 16))});
}

FASTATTN_HD int num_tokens(const QuantizeTokens& p) { return static_cast<int>(p.x.seq()); }
FASTATTN_HD std::int64_t num_channels(const QuantizeTokens& p) { return p.x.batch() * p.x.heads() * p.x.head_dim(); }

// Where a block works: tile or chunk `index` of the tokens of a head.
struct TokenPart {
  std::int64_t b, h;
  int index;

  FASTATTN_HD std::int64_t head(const QuantizeTokens& p) const { return b * p.x.heads() + h; }
};

// Of blocks that run together most have the same tokens of neighbouring heads, which are neighbours in memory.
FASTATTN_HD TokenPart token_part(const QuantizeTokens& p, int parts, std::uint32_t block) {
  const auto heads = static_cast<std::uint32_t>(p.x.heads()), of_head = static_cast<std::uint32_t>(parts);
  return {block / heads / of_head, block % heads, static_cast<int>(block / heads % of_head)};
}

// The means of a unit's channels, `first` being the first one's place among those of all heads; zeros if there are
// none.
FASTATTN_HD UnitFloats load_floats(const float* from, std::int64_t first) {
  return from == nullptr ? UnitFloats{} : *reinterpret_cast<const UnitFloats*>(from + first);
}

// A unit of tokens of a head, from `channel` on: how to read it.
template <class Element>
class UnitColumn {
 public:
  FASTATTN_HD UnitColumn(const QuantizeTokens& p, const TokenPart& part, int channel)
      : first_(p.x.row<const Element>(part.b, 0, part.h) + channel), stride_(p.x.stride[1]) {}

  FASTATTN_HD Unit at(int token) const { return *reinterpret_cast<const Unit*>(first_ + token * stride_); }

 private:
  const Element* first_;
  std::int64_t stride_;
};

// 32 bits of values that have one scale, the first value lowest; zeros for the inverse 0.
template <class Format>
FASTATTN_HD std::uint32_t encode(const float (&y)[32 / Format::kBits], float inverse) {
  std::uint32_t values = 0;
  if constexpr (std::is_same_v<Format, Float8E4M3>) {
#if defined(__CUDA_ARCH__)
    // What from_float<Float8E4M3> computes, two at a time; only NaNs, which never come here, lose their sign.
    std::uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(y[1] * inverse), "f"(y[0] * inverse));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(y[3] * inverse), "f"(y[2] * inverse));
    values = low | std::uint32_t{high} << 16;
#else
    for (int i = 0; i < 4; ++i) {
      values |= std::uint32_t{from_float<Float8E4M3>(y[i] * inverse).bits} << (8 * i);
    }
#endif
  } else {
    constexpr int kBits = Format::kBits;
    for (int i = 0; i < 32 / kBits; ++i) {
      values |= (static_cast<std::uint32_t>(round_product(y[i], inverse)) & ((1u << kBits) - 1)) << (kBits * i);
    }
  }
  return inverse == 0.f ? 0 : values;
}

// group_of and num_groups with shifts in the place of divisions.
struct TokenGroups {
  int shift;  // of the length of a run of tokens that has four groups; 0: each token by itself

  FASTATTN_HD explicit TokenGroups(std::int64_t group) : shift(group == 1 ? 0 : group == 8 ? 5 : group == 16 ? 6 : 7) {}
  FASTATTN_HD int of(int token) const { return shift == 0 ? token : (token >> shift) * 4 + (token & 7) / 2; }
  FASTATTN_HD int number(int tokens) const { return shift == 0 ? tokens : ((tokens + (1 << shift) - 1) >> shift) * 4; }
};

// One thread's part of 128 tokens of a head, in registers from the one read to the one write. It has eight channels of
// a token in each pass; `kHeadDim / 8` neighbours have the others.
template <class Element, class Format, int kHeadDim>
class TokenRows {
 public:
  static constexpr int kTokens = 128;  // whole runs of groups of every size
  static constexpr int kLanes = kHeadDim / kUnit;
  static constexpr int kPasses = kTokens * kLanes / kTokenThreads;

  FASTATTN_HD static int parts(const QuantizeTokens& p) { return ceil_div(num_tokens(p), kTokens); }

  FASTATTN_HD TokenRows(const QuantizeTokens& p, const TokenPart& part, int thread)
      : p_(p), part_(part), groups_(p.group), row_(thread / kLanes), channel_(thread % kLanes * kUnit) {
    const std::int32_t* const order = p.permutation.row(part.b, part.h, p.x.seq());
    for (int pass = 0; pass < kPasses; ++pass) {
      token_[pass] = has_channels() ? token_at(order, first() + place(pass), num_tokens(p)) : -1;
    }
    // Where there is nothing to read something else is read, and not used: no load waits for a branch.
    const int channel = has_channels() ? channel_ : 0;
    const UnitColumn<Element> x(p, part, channel);
    for (int pass = 0; pass < kPasses; ++pass) {
      x_[pass] = x.at(max_of(token_[pass], 0));
    }
    mean_ = load_floats(p.mean, part.head(p) * p.x.head_dim() + channel);
    const std::int64_t of_token = p.x.heads() * p.x.head_dim() * Format::kBits / 8;
    values_ = static_cast<std::uint8_t*>(p.values) + (part.b * p.x.seq() + first() + row_) * of_token +
              (part.h * p.x.head_dim() + channel_) * Format::kBits / 8;
    stride_ = of_token * (kTokens / kPasses);
  }

  // The group in the tile of a pass's token.
  FASTATTN_HD int group(int pass) const { return groups_.of(place(pass)); }

  // The largest magnitude of a pass's channels, as bits: those of NaN are above those of infinity.
  FASTATTN_HD std::uint32_t largest(int pass) const {
    std::uint32_t largest = 0;
    for (int i = 0; i < kUnit; ++i) {
      largest = max_of(largest, std::bit_cast<std::uint32_t>(y(pass, i)) & 0x7fffffffu);
    }
    return token_[pass] >= 0 ? largest : 0;
  }

  // Writes the scale of a group in the tile, if there is one, and returns its inverse.
  FASTATTN_HD float write_scale(int group, std::uint32_t largest) const {
    const int number = groups_.number(num_tokens(p_)), index = part_.index * groups_.number(kTokens) + group;
    const float scale = scale_of<Format>(std::bit_cast<float>(largest));
    if (group < groups_.number(kTokens) && index < number) {
      p_.scales[part_.head(p_) * number + index] = scale;
    }
    return inverse_of(scale);
  }

  FASTATTN_HD void write_values(int pass, float inverse) const {
    constexpr int kWords = kUnit * Format::kBits / 32, kPerWord = 32 / Format::kBits;
    if (first() + place(pass) >= num_tokens(p_) || !has_channels()) {
      return;
    }
    Words<kWords> values;
    for (int w = 0; w < kWords; ++w) {
      float some[kPerWord];
      for (int i = 0; i < kPerWord; ++i) {
        some[i] = y(pass, w * kPerWord + i);
      }
      values.word[w] = encode<Format>(some, token_[pass] >= 0 ? inverse : 0.f);
    }
    *reinterpret_cast<Words<kWords>*>(values_ + pass * stride_) = values;
  }

 private:
  FASTATTN_HD bool has_channels() const { return channel_ < p_.x.head_dim(); }
  FASTATTN_HD int first() const { return part_.index * kTokens; }
  FASTATTN_HD int place(int pass) const { return pass * (kTokens / kPasses) + row_; }
  FASTATTN_HD float y(int pass, int i) const { return channel_of<Element>(x_[pass], i) - mean_.x[i]; }

  const QuantizeTokens& p_;
  const TokenPart part_;
  const TokenGroups groups_;
  const int row_, channel_;
  int token_[kPasses];  // −1: none
  Unit x_[kPasses];
  UnitFloats mean_;
  std::uint8_t* values_;  // of the first pass; of the next a stride further
  std::int64_t stride_;
};

// Tokens of a head that become 128 bytes of each channel's row. A warp reads units of 64 channels of some tokens and
// writes, to shared memory, a word of tokens of each channel; a barrier later eight threads take a row from there.
template <class Element, class Format, int kHeadDim>
struct TokenColumns {
  static constexpr int kPerWord = 32 / Format::kBits;
  static constexpr int kUnits = 8, kUnitWords = 4;  // of 16 bytes in a row, of words in a unit
  static constexpr int kTokens = kUnits * kUnitWords * kPerWord;

  struct Shared {
    Words<kUnitWords> unit[kHeadDim][kUnits];

    // Units lie in an order for which neither the words that a warp writes at once nor the units that eight threads
    // read meet in a bank.
    FASTATTN_HD Words<kUnitWords>& at(int channel, int index) {
      return unit[channel][index ^ channel / kUnit % kUnits];
    }
  };

  FASTATTN_HD static int parts(const QuantizeTokens& p) { return ceil_div(num_tokens(p), kTokens); }

  FASTATTN_HD static void write_words(const QuantizeTokens& p, const TokenPart& part, int thread, Shared& shared) {
    const int unit = thread / 32, word = thread % 32 / kUnits;
    const int first = part.index * kTokens + (unit * kUnitWords + word) * kPerWord;
    const std::int32_t* const order = p.permutation.row(part.b, part.h, p.x.seq());
    for (int channel = thread % kUnits * kUnit; channel < kHeadDim; channel += kUnits * kUnit) {
      if (channel >= p.x.head_dim()) {
        return;
      }
      int token[kPerWord];
      std::uint32_t exists = 0;  // all bits of the values of tokens that there are
      for (int i = 0; i < kPerWord; ++i) {
        token[i] = token_at(order, token_in_slot(first + i), num_tokens(p));
        exists |= (token[i] >= 0 ? (1u << Format::kBits) - 1 : 0) << (Format::kBits * i);
      }
      const UnitColumn<Element> column(p, part, channel);
      Unit x[kPerWord];
      for (int i = 0; i < kPerWord; ++i) {
        x[i] = column.at(max_of(token[i], 0));
      }
      const std::int64_t at = part.head(p) * p.x.head_dim() + channel;
      const UnitFloats mean = load_floats(p.mean, at), scale = load_floats(p.scales, at);
      for (int c = 0; c < kUnit; ++c) {
        float y[kPerWord];
        for (int i = 0; i < kPerWord; ++i) {
          y[i] = channel_of<Element>(x[i], c) - mean.x[c];
        }
        shared.at(channel + c, unit).word[word] = encode<Format>(y, inverse_of(scale.x[c])) & exists;
      }
    }
  }

  FASTATTN_HD static void write_rows(const QuantizeTokens& p, const TokenPart& part, int thread, Shared& shared) {
    const std::int64_t length = padded_tokens(p.x.seq()) * Format::kBits / 8;
    const std::int64_t first = std::int64_t{part.index} * (kUnits * sizeof(Unit)) + thread % kUnits * sizeof(Unit);
    if (first >= length) {
      return;
    }
    const std::int64_t dim = p.x.head_dim(), first_row = part.head(p) * dim;
    for (int channel = thread / kUnits; channel < dim; channel += kTokenThreads / kUnits) {
      std::uint8_t* const row = static_cast<std::uint8_t*>(p.values) + (first_row + channel) * length;
      *reinterpret_cast<Words<kUnitWords>*>(row + first) = shared.at(channel, thread % kUnits);
    }
  }
};

// What is known of a channel of some tokens.
struct ChannelSurvey {
  float mean;  // their share of that of all
  float least, most;

  FASTATTN_HD static ChannelSurvey of_none() { return {0.f, kInfinity, -kInfinity}; }
  FASTATTN_HD void add(const ChannelSurvey& other) {
    mean += other.mean;
    least = ::fminf(least, other.least);
    most = ::fmaxf(most, other.most);
  }
};

// The survey of a head is of chunks of its tokens, then of chunks. How long a chunk is depends on nothing but the
// number of tokens: the same bits on every machine.
inline constexpr int kMostChunks = 128, kChunkStep = 128;
FASTATTN_HD constexpr int chunk_length(int tokens) {
  return max_of(ceil_div(tokens, kMostChunks * kChunkStep), 1) * kChunkStep;
}
FASTATTN_HD constexpr int num_chunks(int tokens) { return ceil_div(tokens, chunk_length(tokens)); }

template <class Element, int kHeadDim>
struct TokenSurvey {
  static constexpr int kLanes = kHeadDim / kUnit, kRows = kTokenThreads / kLanes;
  static constexpr int kAhead = 8;  // tokens that are read before the first of them counts

  struct Shared {
    ChannelSurvey of[kRows][kHeadDim];  // channel c at place(c): what neighbours write at once lies side by side
  };
  FASTATTN_HD static constexpr int channel_at(int place) { return place % kLanes * kUnit + place / kLanes; }

  FASTATTN_HD static int parts(const QuantizeTokens& p) { return num_chunks(num_tokens(p)); }

  FASTATTN_HD static void survey_rows(const QuantizeTokens& p, const TokenPart& part, int thread, Shared& shared) {
    const int lane = thread % kLanes, row = thread / kLanes, length = chunk_length(num_tokens(p));
    const int first = part.index * length, end = min_of(first + length, num_tokens(p));
    const float share = 1.f / static_cast<float>(num_tokens(p));
    const UnitColumn<Element> column(p, part, lane * kUnit);
    ChannelSurvey of[kUnit];
    for (int i = 0; i < kUnit; ++i) {
      of[i] = ChannelSurvey::of_none();
    }
    if (lane * kUnit < p.x.head_dim()) {
      for (int token = first + row; token < end; token += kAhead * kRows) {
        Unit x[kAhead];
        for (int ahead = 0; ahead < kAhead; ++ahead) {
          x[ahead] = column.at(min_of(token + ahead * kRows, end - 1));
        }
        for (int ahead = 0; ahead < kAhead && token + ahead * kRows < end; ++ahead) {
          for (int i = 0; i < kUnit; ++i) {
            const float some = channel_of<Element>(x[ahead], i);
            of[i].mean = fused_multiply_add(some, share, of[i].mean);
            of[i].least = ::fminf(of[i].least, some);
            of[i].most = ::fmaxf(of[i].most, some);
          }
        }
      }
    }
    for (int i = 0; i < kUnit; ++i) {
      shared.of[row][i * kLanes + lane] = of[i];
    }
  }

  // The workspace holds the surveys of a channel's chunks side by side.
  FASTATTN_HD static void survey_chunk(const QuantizeTokens& p, const TokenPart& part, int thread,
                                       const Shared& shared) {
    if (thread >= kHeadDim || channel_at(thread) >= p.x.head_dim()) {
      return;
    }
    ChannelSurvey all = ChannelSurvey::of_none();
    for (int row = 0; row < kRows; ++row) {
      all.add(shared.of[row][thread]);
    }
    const std::int64_t channel = part.head(p) * p.x.head_dim() + channel_at(thread);
    static_cast<ChannelSurvey*>(p.workspace)[channel * parts(p) + part.index] = all;
  }
};

// One of 32 threads' share of a channel's chunks.
FASTATTN_HD ChannelSurvey survey_chunks(const QuantizeTokens& p, std::int64_t channel, int lane) {
  const int chunks = num_chunks(num_tokens(p));
  ChannelSurvey some = ChannelSurvey::of_none();
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    some.add(static_cast<const ChannelSurvey*>(p.workspace)[channel * chunks + chunk]);
  }
  return some;
}

// Writes what the survey is for. The mean lies between the least and the most, whatever the rounding; NaN stays.
template <class Format>
FASTATTN_HD void write_channel(const QuantizeTokens& p, std::int64_t channel, const ChannelSurvey& of) {
  const bool any = p.x.seq() > 0;
  const float least = any ? of.least : 0.f, most = any ? of.most : 0.f;
  const float mean = max_of(min_of(of.mean, most), least);
  if (p.mean != nullptr) {
    p.mean[channel] = mean;
  }
  if (p.transpose) {
    p.scales[channel] = scale_of<Format>(largest_between(least, most, mean, p.mean == nullptr ? 0.f : mean));
  }
}

}  // namespace fastattn::sm90

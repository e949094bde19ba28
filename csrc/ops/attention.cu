// `attention` on Hopper: softmax over a band, in bf16 and fp16. See attention.md.
#include <cstddef>
#include <cstdint>

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/band.hpp"
#include "fastattn/schedule/regions.hpp"
#include "ops/softmax.cuh"
#include "ops/validate.hpp"
#include "sm90/config.hpp"
#include "sm90/split.cuh"
#include "sm90/survey.hpp"

namespace fastattn {
namespace {

constexpr const char* kOp = "attention";

template <class Element, class Schedule>
struct Forward : SoftmaxOver<Element, Schedule> {
  using Score = WithSinks<SoftmaxBy<float, WeightsOf<Element>>>;
  // By head_dim, ascending, and of one head_dim values of few channels first; the reasons are in attention.md.
  static constexpr sm90::Config kForward[] = {
      {.head_dim = 32, .tile = {256, 64}, .stages = 2, .warpgroups = 4},
      {.head_dim = 64, .value_dim = 32, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 64, .tile = {192, 128}, .stages = 2, .warpgroups = 3},
      {.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},  // for short sequences
      {.head_dim = 64, .tile = {128, 112}, .stages = 2, .warpgroups = 2},  // where less than half of the last is used
      {.head_dim = 96, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 128, .value_dim = 32, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 192, .value_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2, .query_stages = 1},
      {.head_dim = 192, .tile = {128, 64}, .stages = 2, .warpgroups = 2},
      {.head_dim = 256, .tile = {128, 64}, .stages = 2, .warpgroups = 2, .query_stages = 1}};
};

// Of scores with a softcap, or with a term for each key.
template <class Element, bool kCapped>
struct ModifiedForward : Forward<Element, Bands> {
  using Score = WithSinks<SoftmaxBy<One, WeightsOf<Element>>>;
  using Operands = sm90::ModifiedOperands<Element, kCapped>;
  // With a softcap three warpgroups have too few registers.
  static constexpr sm90::Config kForward[] = {
      {.head_dim = 64, .tile = {kCapped ? 128 : 192, 128}, .stages = 2, .warpgroups = kCapped ? 2 : 3},
      {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 256, .tile = {128, 64}, .stages = 2, .warpgroups = 2, .query_stages = 1}};
};

// Of rectangles and segments: few tiles, for what a mask costs depends on what is in it.
template <class Element>
struct RegionForward : SoftmaxOver<Element, Regions> {
  using Score = WithSinks<SoftmaxBy<float, WeightsOf<Element>>>;
  static constexpr sm90::Config kForward[] = {
      {.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 256, .tile = {128, 64}, .stages = 2, .warpgroups = 2, .query_stages = 1}};
};

// Of few queries, in parts of the keys.
template <class Element>
struct SplitForward : SoftmaxOver<Element, SplitBands> {
  using Epilogue = sm90::PartialOutput;
  // Tiles of 64 slots live off the bytes that are under way, those of 128 are for the cases between.
  static constexpr sm90::Config kForward[] = {
      {.head_dim = 64, .tile = {sm90::kSplitRows, 128}, .stages = 6, .warpgroups = 1},
      {.head_dim = 64, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 128, .tile = {sm90::kSplitRows, 128}, .stages = 3, .warpgroups = 1},
      {.head_dim = 128, .tile = {128, 128}, .stages = 2, .warpgroups = 2},
      {.head_dim = 256, .tile = {sm90::kSplitRows, 64}, .stages = 3, .warpgroups = 1, .query_stages = 1},
      {.head_dim = 256, .tile = {128, 64}, .stages = 2, .warpgroups = 2, .query_stages = 1}};
};

template <class Variant>
Status run(const Attention& p, const typename Variant::Schedule& schedule, const typename Variant::Score& score,
           const typename Variant::Operands::Scales& scales, Stream stream) {
  return sm90::run_forward<Variant>(kOp, {p.q, p.k, p.v, schedule, score, {p.out, p.lse}, p.workspace, scales}, stream);
}

template <class Element, bool kCapped>
Status run_modified(const Attention& p, Stream stream) {
  if (reinterpret_cast<std::uintptr_t>(p.key_bias.bias) % 16 != 0) {
    return failure("%s: key_bias must be 16-byte aligned on the GPU, got address %p", kOp,
                   static_cast<const void*>(p.key_bias.bias));
  }
  const ScoreModifier modifier = p.modifier();
  typename ModifiedForward<Element, kCapped>::Operands::Scales scales{{p.key_bias, static_cast<int>(p.k.seq())}, {}};
  if constexpr (kCapped) {
    scales.to_log2 = modifier.cap();
  } else {
    scales.to_log2 = modifier.scale_log2();
  }
  return run<ModifiedForward<Element, kCapped>>(p, bands_of(p), {{}, p.sinks}, scales, stream);
}

// In the workspace, after what the forward counts in.
constexpr std::size_t kRest = 256;
static_assert(kRest >= kForwardWorkspace);

template <class Element>
Status run_in_regions(const Attention& p, Stream stream) {
  const Regions regions = regions_of(p, static_cast<std::byte*>(p.workspace) + kRest);
  if (regions.segments.exist()) {
    if (p.workspace == nullptr) {
      return failure("%s: workspace has no data", kOp);
    }
    if (const Status status = sm90::survey_segments(regions, stream); !status.ok()) {
      return status;
    }
  }
  return run<RegionForward<Element>>(p, regions, {{p.scale * kLog2E}, p.sinks}, {}, stream);
}

template <class Element>
Status run_split(const Attention& p, const SplitBands& parts, Stream stream) {
  if (p.workspace == nullptr) {
    return failure("%s: workspace has no data", kOp);
  }
  const auto partial = sm90::PartialOutput::in(static_cast<std::byte*>(p.workspace) + kRest, p, parts);
  const Status status = sm90::run_forward<SplitForward<Element>>(
      kOp, {p.q, p.k, p.v, parts, {p.scale * kLog2E}, partial, p.workspace}, stream);
  const int row_warps = sm90::CombineParams::warps_for(parts.count);
  return status.ok() ? sm90::combine<Element>({parts, partial, p.out, p.lse, p.sinks, row_warps}, stream) : status;
}

// Calls run(schedule): windows of each head's own cost partial tiles instructions.
template <class Run>
Status with_schedule(const Attention& p, Run&& run) {
  return p.head_left == nullptr && p.head_right == nullptr ? run(band_of(p)) : run(bands_of(p));
}

}  // namespace

Status attention(const Attention& p, Stream stream) {
  return sm90::run_if_valid(kOp, p, p.q.dtype, [&]<class Element>() {
    if (p.modifier().exists()) {
      return p.softcap != 0.f ? run_modified<Element, true>(p, stream) : run_modified<Element, false>(p, stream);
    }
    if (p.has_regions()) {
      return run_in_regions<Element>(p, stream);
    }
    if (const auto parts = sm90::split_bands(p, sm90::num_multiprocessors())) {
      return run_split<Element>(p, *parts, stream);
    }
    return with_schedule(p, [&]<class Schedule>(const Schedule& schedule) {
      return run<Forward<Element, Schedule>>(p, schedule, {{p.scale * kLog2E}, p.sinks}, {}, stream);
    });
  });
}

std::size_t attention_workspace(const Attention& p, Stream) {
  if (p.segments.exist()) {
    return kRest + survey_bytes(p);
  }
  const auto parts = validate(p).ok() ? sm90::split_bands(p, sm90::num_multiprocessors()) : std::nullopt;
  return parts ? kRest + sm90::PartialOutput::bytes(p, *parts) : kForwardWorkspace;
}

}  // namespace fastattn

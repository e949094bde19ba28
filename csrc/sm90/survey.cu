// The survey of segments that a schedule of regions reads: a warp for each group of tokens.
#include <cstdint>

#include "fastattn/schedule/regions.hpp"
#include "sm90/launch.cuh"
#include "sm90/survey.hpp"

namespace fastattn::sm90 {
namespace {

constexpr int kSurveyThreads = 256, kSurveyWarps = kSurveyThreads / 32;

// Which of all warps this is.
__device__ std::int64_t survey_warp() { return std::int64_t{blockIdx.x} * kSurveyWarps + threadIdx.x / 32; }

__device__ IdRange range_of_group(const std::int32_t* ids, std::int64_t group, std::int64_t tokens) {
  static_assert(kSurveyedTokens == 64);
  const std::int64_t first = group * kSurveyedTokens + threadIdx.x % 32, last = tokens - 1;
  const std::int32_t id = ids[min_of(first, last)], other = ids[min_of(first + 32, last)];
  return {__reduce_min_sync(0xffffffffu, min_of(id, other)), __reduce_max_sync(0xffffffffu, max_of(id, other))};
}

__global__ void __launch_bounds__(kSurveyThreads) range_kernel(const __grid_constant__ Regions regions) {
  const Region slots = regions.slots();
  const std::int64_t of_queries = regions.segments.q.batch * num_surveyed(slots.num_q);
  const std::int64_t of_keys = regions.segments.k.batch * num_surveyed(slots.num_k);
  const auto survey = [](const SegmentIds& of_all, IdRange* ranges, std::int64_t index, int tokens) {
    const int groups = num_surveyed(tokens);
    const IdRange range = range_of_group(of_all.ids + index / groups * tokens, index % groups, tokens);
    if (threadIdx.x % 32 == 0) {
      ranges[index] = range;
    }
  };
  const std::int64_t index = survey_warp();
  if (index < of_queries) {
    survey(regions.segments.q, regions.survey.q, index, slots.num_q);
  } else if (index < of_queries + of_keys) {
    survey(regions.segments.k, regions.survey.k, index - of_queries, slots.num_k);
  }
}

__global__ void __launch_bounds__(kSurveyThreads) reach_kernel(const __grid_constant__ Regions regions) {
  const Region slots = regions.slots();
  const int q_groups = num_surveyed(slots.num_q), k_groups = num_surveyed(slots.num_k);
  const std::int64_t index = survey_warp();
  if (index >= regions.survey.reach_batch * q_groups) {
    return;
  }
  const int batch = static_cast<int>(index / q_groups);
  const IdRange queries =
      regions.survey.q[Regions::entry(regions.segments.q.batch, batch, q_groups) + index % q_groups];
  const IdRange* const keys = regions.survey.k + Regions::entry(regions.segments.k.batch, batch, k_groups);
  Interval reach = kNoReach;
  for (int group = threadIdx.x % 32; group < k_groups; group += 32) {
    if (keys[group].meets(queries)) {
      reach = {min_of(reach.begin, group), group + 1};
    }
  }
  reach = {__reduce_min_sync(0xffffffffu, reach.begin), __reduce_max_sync(0xffffffffu, reach.end)};
  if (threadIdx.x % 32 == 0) {
    regions.survey.reach[index] = reach;
  }
}

}  // namespace

Status survey_segments(const Regions& regions, Stream stream) {
  const Region slots = regions.slots();
  const std::int64_t reaches = regions.survey.reach_batch * num_surveyed(slots.num_q);
  const std::int64_t ranges =
      regions.segments.q.batch * num_surveyed(slots.num_q) + regions.segments.k.batch * num_surveyed(slots.num_k);
  const auto blocks = [](std::int64_t warps) { return ceil_div<std::int64_t>(warps, kSurveyWarps); };
  const Status status = launch(range_kernel, blocks(ranges), kSurveyThreads, 0, stream, regions);
  return status.ok() ? launch(reach_kernel, blocks(reaches), kSurveyThreads, 0, stream, regions) : status;
}

}  // namespace fastattn::sm90

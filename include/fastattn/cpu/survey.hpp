// The survey of segments that a schedule of regions reads.
#pragma once

#include <algorithm>

#include "fastattn/cpu/parallel.hpp"
#include "fastattn/schedule/regions.hpp"

namespace fastattn::cpu {

inline void survey_segments(const Regions& regions, const Threads& threads) {
  const Segments& segments = regions.segments;
  const SegmentSurvey& survey = regions.survey;
  const int num_q = regions.slots().num_q, num_k = regions.slots().num_k;
  const std::int64_t q_groups = num_surveyed(num_q), k_groups = num_surveyed(num_k);

  const auto find_ranges = [&threads](const SegmentIds& of_all, IdRange* ranges, std::int64_t groups, int tokens) {
    parallel_for(threads, of_all.batch * groups, [&](std::int64_t i) {
      const std::int32_t* const ids = of_all.ids + i / groups * tokens;
      const int begin = static_cast<int>(i % groups) * kSurveyedTokens, end = min_of(begin + kSurveyedTokens, tokens);
      const auto [least, greatest] = std::minmax_element(ids + begin, ids + end);
      ranges[i] = {*least, *greatest};
    });
  };
  find_ranges(segments.q, survey.q, q_groups, num_q);
  find_ranges(segments.k, survey.k, k_groups, num_k);

  parallel_for(threads, survey.reach_batch * q_groups, [&](std::int64_t i) {
    const int batch = static_cast<int>(i / q_groups);
    const IdRange queries = survey.q[Regions::entry(segments.q.batch, batch, q_groups) + i % q_groups];
    const IdRange* const keys = survey.k + Regions::entry(segments.k.batch, batch, k_groups);
    Interval reach = kNoReach;
    for (int group = 0; group < k_groups; ++group) {
      if (keys[group].meets(queries)) {
        reach = {min_of(reach.begin, group), group + 1};
      }
    }
    survey.reach[i] = reach;
  });
}

}  // namespace fastattn::cpu

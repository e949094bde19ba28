// The survey of segments that a schedule of regions reads, by two small kernels before the attention.
#pragma once

#include "fastattn/fastattn.hpp"
#include "fastattn/schedule/regions.hpp"

namespace fastattn::sm90 {

Status survey_segments(const Regions& regions, Stream stream);

}  // namespace fastattn::sm90

// The tiles that the kernels of neighborhood attention are compiled for: the one list, which kernels and planner read.
#pragma once

#include "fastattn/schedule/neighborhood.hpp"

namespace fastattn {

struct NeighborhoodTiles {
  PerAxis<int> q, k;
};

// Of problems with one, two and three axes.
inline constexpr NeighborhoodTiles kGpuNeighborhoodTiles[kAxes] = {
    {{1, 1, 128}, {1, 1, 128}}, {{1, 8, 16}, {1, 8, 16}}, {{2, 8, 8}, {2, 8, 8}}};
// The query tiles of the backward at head_dim 128, whose registers have room for 64.
inline constexpr PerAxis<int> kGpuNeighborhoodNarrowQueries[kAxes] = {{1, 1, 64}, {1, 8, 8}, {1, 8, 8}};
inline constexpr NeighborhoodTiles kCpuNeighborhoodTiles[kAxes] = {
    {{1, 1, 64}, {1, 1, 64}}, {{1, 8, 8}, {1, 8, 8}}, {{2, 4, 8}, {2, 4, 8}}};

// Of a problem: at least one, and those of length 1 that lead do not count.
constexpr int num_axes(const PerAxis<NeighborhoodAxis>& axes) {
  return axes[0].length != 1 ? 3 : (axes[1].length != 1 ? 2 : 1);
}

}  // namespace fastattn

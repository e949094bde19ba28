// What Python asks of neighborhood attention's schedule, through ctypes. python/fastattn/_schedule.py mirrors the
// structs and passes valid problems only.
#include <cstdint>

#include "fastattn/plan/census.hpp"
#include "fastattn/plan/neighborhood_tiles.hpp"

using namespace fastattn;

using Axes = PerAxis<NeighborhoodAxis>;
using Box = PerAxis<int>;

// The tiles of the kernels that are compiled for a problem of `num_axes`.
extern "C" [[gnu::visibility("default")]] void fastattn_neighborhood_tiles(int num_axes, bool on_gpu,
                                                                           NeighborhoodTiles* tiles) {
  *tiles = (on_gpu ? kGpuNeighborhoodTiles : kCpuNeighborhoodTiles)[num_axes - 1];
}

extern "C" [[gnu::visibility("default")]] void fastattn_neighborhood_census(const Axes* axes,
                                                                            const NeighborhoodTiles* tiles,
                                                                            Census* census) {
  const Neighborhood schedule = make_neighborhood(*axes, tiles->q, tiles->k);
  *census = census_of(schedule, schedule.tile_shape());
}

// What the query at `query` keeps, as positions of its dilation group, and what its tile visits: `visits`, zero before,
// has an entry for each key tile of the group; 1: partial, 2: full.
extern "C" [[gnu::visibility("default")]] void fastattn_neighborhood_view(const Axes* axes,
                                                                          const NeighborhoodTiles* tiles,
                                                                          const Box* query, PerAxis<Interval>* kept,
                                                                          std::uint8_t* visits) {
  const Neighborhood schedule = make_neighborhood(*axes, tiles->q, tiles->k);
  SlotPlace place;
  int group = 0, tile = 0;
  for (int a = 0; a < kAxes; ++a) {
    const int dilation = schedule.axes[a].dilation;
    place.group[a] = (*query)[a] % dilation;
    place.position[a] = (*query)[a] / dilation;
    group = group * dilation + place.group[a];
    tile = tile * schedule.q_tiling.tiles[a] + place.position[a] / tiles->q[a];
  }
  *kept = schedule.kept_keys(place);
  const int q_tile = group * product(schedule.q_tiling.tiles) + tile;
  const int first_k_tile = group * product(schedule.k_tiling.tiles);
  for_each_tile(schedule, q_tile, schedule.tile_shape(), [&](int k_tile, auto coverage, auto) {
    visits[k_tile - first_k_tile] = coverage() == Coverage::kFull ? 2 : 1;
  });
}

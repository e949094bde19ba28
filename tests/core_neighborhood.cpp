// Neighborhood schedules and their census for the Python tests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>
#include <vector>

#include "fastattn/plan/census.hpp"
#include "fastattn/schedule/neighborhood.hpp"

namespace nb = nanobind;
using namespace fastattn;

namespace {

using Axis = std::tuple<int, int, int, int, bool>;  // length, window, stride, dilation, causal
using Box = std::array<int, kAxes>;

NeighborhoodAxis axis_of(const Axis& axis) {
  const auto& [length, window, stride, dilation, causal] = axis;
  return {length, window, stride, dilation, causal};
}

template <bool kTransposed>
nb::class_<NeighborhoodSchedule<kTransposed>> bind_schedule(nb::module_& m, const char* name) {
  using Schedule = NeighborhoodSchedule<kTransposed>;
  return nb::class_<Schedule>(m, name)
      .def_ro("num_q", &Schedule::num_q)
      .def_ro("num_k", &Schedule::num_k)
      .def("tile_shape", [](const Schedule& s) { return std::tuple{s.tile_shape().q, s.tile_shape().k}; })
      .def("keeps", &Schedule::keeps)
      .def("query_token", nb::overload_cast<int>(&Schedule::query_token, nb::const_))
      .def("key_token", &Schedule::key_token)
      .def("query_origin",
           [](const Schedule& s, int tile) { return std::to_array(s.query_origin(tile, s.tile_shape()).at); })
      .def("key_origin",
           [](const Schedule& s, int tile) { return std::to_array(s.key_origin(tile, s.tile_shape()).at); })
      .def("transposed", &Schedule::transposed)
      .def("is_exact", [](const Schedule& s) { return is_exact(s, s.tile_shape()); })
      .def("census", [](const Schedule& s) { return census_of(s, s.tile_shape()); })
      // (first tile, number of tiles, is it full) of each run of a query tile.
      .def("runs",
           [](const Schedule& s, int q_tile) {
             std::vector<std::tuple<int, int, bool>> runs;
             auto cursor = s.runs(q_tile, s.tile_shape());
             for (TileRun run{}; cursor.next(run);) {
               runs.emplace_back(run.first, run.count, run.coverage == Coverage::kFull);
             }
             return runs;
           })
      // The slots that keep one another, as pairs of tokens: (−1, …) where padding does.
      .def("kept_tokens", [](const Schedule& s) {
        std::vector<std::tuple<int, int>> kept;
        for (int q = 0; q < s.num_q; ++q) {
          for (int k = 0; k < s.num_k; ++k) {
            if (s.keeps(q, k)) {
              kept.emplace_back(s.query_token(q), s.key_token(k));
            }
          }
        }
        return kept;
      });
}

}  // namespace

void bind_neighborhood(nb::module_& m) {
  nb::class_<Census>(m, "Census")
      .def_ro("query_tiles", &Census::query_tiles)
      .def_ro("key_tiles", &Census::key_tiles)
      .def_ro("visited", &Census::visited)
      .def_ro("full", &Census::full)
      .def_ro("most_visited", &Census::most_visited)
      .def_ro("kept", &Census::kept)
      .def("partial", &Census::partial)
      .def("mean_visited", &Census::mean_visited)
      .def("full_share", &Census::full_share)
      .def("useful_share", &Census::useful_share)
      .def("speedup_by_mean", &Census::speedup_by_mean)
      .def("speedup_by_max", &Census::speedup_by_max);
  bind_schedule<true>(m, "TransposedNeighborhood");
  bind_schedule<false>(m, "Neighborhood")
      .def("__init__", [](Neighborhood* schedule, const std::array<Axis, kAxes>& axes, const Box& q_box,
                          const Box& k_box) {
        new (schedule) Neighborhood{make_neighborhood({axis_of(axes[0]), axis_of(axes[1]), axis_of(axes[2])},
                                                      {q_box[0], q_box[1], q_box[2]}, {k_box[0], k_box[1], k_box[2]})};
      });
}

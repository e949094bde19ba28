// Block lists for the Python tests, over int32 arrays of numpy.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "fastattn/schedule/block_list.hpp"

namespace nb = nanobind;
using namespace fastattn;

namespace {

using Integers = nb::ndarray<const std::int32_t, nb::c_contig, nb::device::cpu>;
using Flags = nb::ndarray<const bool, nb::c_contig, nb::device::cpu>;
using Rows = std::tuple<Integers, Integers, std::optional<Flags>>;  // counts, indices, full

BlockRows view(const Rows& rows) {
  const auto& [counts, indices, full] = rows;
  return {counts.data(), indices.data(), full ? full->data() : nullptr};
}

// The lists of all heads, with the arrays that they point into.
struct Lists {
  Rows rows, columns;
  BlockLists lists;
};

}  // namespace

void bind_block_list(nb::module_& m) {
  nb::class_<BlockList>(m, "BlockList")
      .def_ro("num_q", &BlockList::num_q)
      .def_ro("num_k", &BlockList::num_k)
      .def("keeps", &BlockList::keeps)
      .def("supports", [](const BlockList& list, int q, int k) { return list.supports({q, k}); })
      .def("is_exact", [](const BlockList& list, int q, int k) { return is_exact(list, {q, k}); })
      .def("transposed", &BlockList::transposed, nb::keep_alive<0, 1>())
      // (first tile, number of tiles, is it full) of each run of a query tile.
      .def("runs", [](const BlockList& list, int q_tile, int q, int k) {
        std::vector<std::tuple<int, int, bool>> runs;
        auto cursor = list.runs(q_tile, {q, k});
        for (TileRun run{}; cursor.next(run);) {
          runs.emplace_back(run.first, run.count, run.coverage == Coverage::kFull);
        }
        return runs;
      });
  nb::class_<Lists>(m, "BlockLists")
      .def("__init__",
           [](Lists* self, int num_q, int num_k, int left, int right, int block_q, int block_k, Rows rows,
              Rows columns) {
             const auto& counts = std::get<0>(rows);
             const BlockList first{num_q, num_k, left, right, {block_q, block_k}, view(rows), view(columns)};
             const BlockLists lists{first, static_cast<int>(counts.shape(0)), static_cast<int>(counts.shape(1))};
             new (self) Lists{std::move(rows), std::move(columns), lists};
           })
      .def("at", [](const Lists& self, int b, int h) { return self.lists.at(b, h); }, nb::keep_alive<0, 1>());
}

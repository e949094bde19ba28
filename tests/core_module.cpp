// The C++ core as a Python module, for tests that attack it directly. Never part of the wheel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <bit>
#include <cstdint>
#include <tuple>
#include <vector>

#include "fastattn/operand/low_bit.hpp"
#include "fastattn/schedule/band.hpp"

namespace nb = nanobind;
using namespace fastattn;

namespace {

// (first tile, number of tiles, is it full) of each run of a query tile.
template <TileSchedule Schedule>
std::vector<std::tuple<int, int, bool>> runs_of(const Schedule& schedule, int q_tile, int q, int k) {
  std::vector<std::tuple<int, int, bool>> runs;
  auto cursor = schedule.runs(q_tile, {q, k});
  for (TileRun run{}; cursor.next(run);) {
    runs.emplace_back(run.first, run.count, run.coverage == Coverage::kFull);
  }
  return runs;
}

template <class Element>
void bind_element(nb::module_& m, const char* to_bits, const char* to_value) {
  m.def(to_bits, [](float x) { return from_float<Element>(x).bits; });
  m.def(to_value, [](decltype(Element::bits) bits) { return to_float(Element{bits}); });
}

}  // namespace

void bind_block_list(nb::module_& m);    // tests/core_block_list.cpp
void bind_neighborhood(nb::module_& m);  // tests/core_neighborhood.cpp

NB_MODULE(fastattn_core, m) {
  nb::class_<Band>(m, "Band")
      .def("__init__",
           [](Band* band, int num_q, int num_k, int left, int right) { new (band) Band{num_q, num_k, left, right}; })
      .def_ro("num_q", &Band::num_q)
      .def_ro("num_k", &Band::num_k)
      .def("keeps", &Band::keeps)
      .def("runs", &runs_of<Band>)
      .def("transposed", &Band::transposed)
      .def("is_exact", [](const Band& band, int q, int k) { return is_exact(band, {q, k}); });
  bind_block_list(m);
  bind_neighborhood(m);
  bind_element<BFloat16>(m, "bfloat16_bits", "bfloat16_value");
  bind_element<Float16>(m, "float16_bits", "float16_value");
  bind_element<Float8E4M3>(m, "float8_bits", "float8_value");
}

// fastgen._cpu.philox_uint32: draws for arrays of counters.
#include <pybind11/pybind11.h>

#include "common/philox.h"

namespace fastgen {
namespace {

void philox_uint32(uint64_t seed, uintptr_t block, uintptr_t position, uintptr_t sample, int64_t count, uintptr_t out,
                   int threads) {
    const auto* blocks = reinterpret_cast<const int64_t*>(block);
    const auto* positions = reinterpret_cast<const int64_t*>(position);
    const auto* samples = reinterpret_cast<const int64_t*>(sample);
    auto* draws = reinterpret_cast<int64_t*>(out);
#pragma omp parallel for num_threads(threads) if (count > 10000)
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits[4];
        philox_draw(seed, uint32_t(blocks[i]), uint32_t(positions[i]), uint64_t(samples[i]), bits);
        for (int lane = 0; lane < 4; ++lane) draws[4 * i + lane] = bits[lane];
    }
}

}  // namespace

void bind_philox(pybind11::module_& module) {
    namespace py = pybind11;
    module.def("philox_uint32", philox_uint32, py::arg("seed"), py::arg("block"), py::arg("position"),
               py::arg("sample"), py::arg("count"), py::arg("out"), py::arg("threads"),
               py::call_guard<py::gil_scoped_release>(),
               "Philox4x32-10 of int64 [count] counters into int64 [count, 4].");
    module.def("philox_uniform", philox_uniform, py::arg("bits"), "The uniform that 32 random bits stand for.");
}

}  // namespace fastgen

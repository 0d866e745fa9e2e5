// fastgen._cpu.normal, and for tests normal_radius and cos_sin.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "cpu/normal.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_NORMAL)

namespace fastgen {
namespace {

struct Kernels {
    void (*normal)(uint64_t, uint32_t, int64_t, int64_t, int64_t, float*, int64_t);
    void (*radius)(const int32_t*, float*, int64_t);
    void (*cos_sin)(const int32_t*, float*, float*, int64_t);
};

const Kernels& kernels() {
    static constexpr Kernels table[] = {
#define FASTGEN_KERNELS(ISA) {ISA::normal, ISA::array_normal_radius, ISA::array_cos_sin},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

void normal(uint64_t seed, uint32_t draw, int64_t start, int64_t rows, int64_t columns, uintptr_t to, int64_t threads) {
    kernels().normal(seed, draw, start, rows, columns, reinterpret_cast<float*>(to), threads);
}

void normal_radius(uintptr_t k, uintptr_t radius, int64_t count) {
    kernels().radius(reinterpret_cast<const int32_t*>(k), reinterpret_cast<float*>(radius), count);
}

void cos_sin(uintptr_t k, uintptr_t cosine, uintptr_t sine, int64_t count) {
    kernels().cos_sin(reinterpret_cast<const int32_t*>(k), reinterpret_cast<float*>(cosine),
                      reinterpret_cast<float*>(sine), count);
}

}  // namespace

void bind_normal(pybind11::module_& module) {
    namespace py = pybind11;
    module.def("normal", normal, py::arg("seed"), py::arg("draw"), py::arg("start"), py::arg("rows"),
               py::arg("columns"), py::arg("to"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
               "Standard normal numbers into dense float32 [rows, columns].");
    module.def("normal_radius", normal_radius, py::arg("k"), py::arg("radius"), py::arg("count"));
    module.def("normal_cos_sin", cos_sin, py::arg("k"), py::arg("cosine"), py::arg("sine"), py::arg("count"));
}

}  // namespace fastgen

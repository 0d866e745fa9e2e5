// fastgen._cpu.tap_gemm_float32, tap_gemm_bfloat16, tap_gemm_int8, tap_gemm_float64: the bare matrix product, for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tap_gemm.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_TAP_GEMM)

namespace fastgen {
namespace {

template <class T, class W>
struct Kernels {
    static constexpr void (*at[])(const TapGemm<T, W>&) = {
#define FASTGEN_TAP_GEMM(ISA) ISA::tap_gemm,
        FASTGEN_FOR_EACH_ISA(FASTGEN_TAP_GEMM)
#undef FASTGEN_TAP_GEMM
    };
};

using PyTap = std::tuple<uintptr_t, int64_t, int64_t, int64_t, uintptr_t>;

template <class T, class W>
void run(const std::vector<PyTap>& py_taps, int64_t b_panel_stride, int64_t b_k_stride, uintptr_t init,
         int64_t init_row_stride, uintptr_t c, int64_t c_row_stride, int64_t rows, int64_t cols) {
    std::vector<Tap<T, W>> taps;
    for (const auto& [a, row_stride, k_stride, k, b] : py_taps) {
        taps.push_back({reinterpret_cast<const T*>(a), row_stride, k_stride, k, reinterpret_cast<const W*>(b)});
    }
    Kernels<T, W>::at[active_isa()]({taps.data(), int64_t(taps.size()), b_panel_stride, b_k_stride,
                                     reinterpret_cast<const T*>(init), init_row_stride, reinterpret_cast<T*>(c),
                                     c_row_stride, rows, cols});
}

template <class T, class W>
void define(pybind11::module_& module, const char* name) {
    namespace py = pybind11;
    module.def(name, run<T, W>, py::arg("taps"), py::arg("b_panel_stride"), py::arg("b_k_stride"), py::arg("init"),
               py::arg("init_row_stride"), py::arg("c"), py::arg("c_row_stride"), py::arg("rows"), py::arg("cols"),
               py::call_guard<py::gil_scoped_release>(),
               "The product of csrc/cpu/tap_gemm.h; a tap is (a, row_stride, k_stride, k, b).");
}

}  // namespace

void bind_tap_gemm(pybind11::module_& module) {
    define<float, float>(module, "tap_gemm_float32");
    define<float, BFloat16Pair>(module, "tap_gemm_bfloat16");
    define<float, ScaledInt8>(module, "tap_gemm_int8");
    define<double, double>(module, "tap_gemm_float64");
}

}  // namespace fastgen

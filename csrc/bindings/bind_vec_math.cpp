// fastgen._cpu.exp_float32, ...: the vectorised functions over arrays, for tests.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/vec_math_arrays.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_VEC_MATH)

namespace fastgen {
namespace {

template <class T>
struct Functions {
    using Function = void (*)(const T*, T*, int64_t);
    Function exp, log, sigmoid, tanh;
};

template <class T>
constexpr Functions<T> kFunctions[] = {
#define FASTGEN_FUNCTIONS(ISA) {ISA::array_exp, ISA::array_log, ISA::array_sigmoid, ISA::array_tanh},
    FASTGEN_FOR_EACH_ISA(FASTGEN_FUNCTIONS)
#undef FASTGEN_FUNCTIONS
};

template <class T, typename Functions<T>::Function Functions<T>::* function>
void run(uintptr_t x, uintptr_t y, int64_t count) {
    (kFunctions<T>[active_isa()].*function)(reinterpret_cast<const T*>(x), reinterpret_cast<T*>(y), count);
}

template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    namespace py = pybind11;
    module.def(("exp_" + dtype).c_str(), run<T, &Functions<T>::exp>, py::arg("x"), py::arg("y"), py::arg("count"));
    module.def(("log_" + dtype).c_str(), run<T, &Functions<T>::log>, py::arg("x"), py::arg("y"), py::arg("count"));
    module.def(("sigmoid_" + dtype).c_str(), run<T, &Functions<T>::sigmoid>, py::arg("x"), py::arg("y"),
               py::arg("count"));
    module.def(("tanh_" + dtype).c_str(), run<T, &Functions<T>::tanh>, py::arg("x"), py::arg("y"), py::arg("count"));
}

}  // namespace

void bind_vec_math(pybind11::module_& module) {
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

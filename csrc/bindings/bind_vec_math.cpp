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
    Function exp, exp_flushed, lack, log, sigmoid, tanh, erf;
};

template <class T>
constexpr Functions<T> kFunctions[] = {
#define FASTGEN_FUNCTIONS(ISA)                                                    \
    {ISA::array_exp,     ISA::array_exp_flushed, ISA::array_lack, ISA::array_log, \
     ISA::array_sigmoid, ISA::array_tanh,        ISA::array_erf},
    FASTGEN_FOR_EACH_ISA(FASTGEN_FUNCTIONS)
#undef FASTGEN_FUNCTIONS
};

template <class T, typename Functions<T>::Function Functions<T>::* function>
void run(uintptr_t x, uintptr_t y, int64_t count) {
    (kFunctions<T>[active_isa()].*function)(reinterpret_cast<const T*>(x), reinterpret_cast<T*>(y), count);
}

template <class T, typename Functions<T>::Function Functions<T>::* function>
void define(pybind11::module_& module, const std::string& name) {
    namespace py = pybind11;
    module.def(name.c_str(), run<T, function>, py::arg("x"), py::arg("y"), py::arg("count"));
}

template <class T>
void define_all(pybind11::module_& module, const std::string& dtype) {
    define<T, &Functions<T>::exp>(module, "exp_" + dtype);
    define<T, &Functions<T>::exp_flushed>(module, "exp_flushed_" + dtype);
    define<T, &Functions<T>::lack>(module, "lack_" + dtype);
    define<T, &Functions<T>::log>(module, "log_" + dtype);
    define<T, &Functions<T>::sigmoid>(module, "sigmoid_" + dtype);
    define<T, &Functions<T>::tanh>(module, "tanh_" + dtype);
    define<T, &Functions<T>::erf>(module, "erf_" + dtype);
}

}  // namespace

void bind_vec_math(pybind11::module_& module) {
    define_all<float>(module, "float32");
    define_all<double>(module, "float64");
}

}  // namespace fastgen

// fastgen._cpu.scaled_act_*: scale, noise, bias and activation in one pass.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "cpu/isa.h"
#include "cpu/scaled_act.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_SCALED_ACT)

namespace fastgen {
namespace {

template <class T>
void run(const std::array<int64_t, 3>& sizes, const std::array<bool, 3>& flags, int64_t threads, uintptr_t data,
         uintptr_t scale, uintptr_t noise, uintptr_t bias, Activation activation, double parameter, double gain,
         double limit) {
    static constexpr void (*table[])(const ScaledAct<T>&) = {
#define FASTGEN_KERNEL(ISA) ISA::scaled_act,
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNEL)
#undef FASTGEN_KERNEL
    };
    const ScaledAct<T> job{sizes[0],
                           sizes[1],
                           sizes[2],
                           flags[0],
                           flags[1],
                           flags[2],
                           threads,
                           pointer<T>(data),
                           pointer<const T>(scale),
                           pointer<const T>(noise),
                           pointer<const T>(bias),
                           activation,
                           static_cast<T>(parameter),
                           static_cast<T>(gain),
                           static_cast<T>(limit)};
    table[active_isa()](job);
}

template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def(("scaled_act_" + dtype).c_str(), run<T>, release(),
               "((images, channels, positions), (channels_last, one_scale, one_noise), threads, data, scale, noise, "
               "bias, activation, parameter, gain, limit); scale, noise and bias may be 0");
}

}  // namespace

void bind_scaled_act(pybind11::module_& module) {
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

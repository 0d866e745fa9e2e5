// fastgen._cpu.gated_unit_*: the gated activation unit.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/gated_unit.h"
#include "cpu/isa.h"
#include "large_pages.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_GATED_UNIT)

namespace fastgen {
namespace {

template <class T>
struct Kernels {
    void (*forward)(const GatedUnit<T>&, const T*, T*);
    void (*gradient)(const GatedUnit<T>&, const T*, T*);
};

template <class T>
const Kernels<T>& kernels() {
    static constexpr Kernels<T> table[] = {
#define FASTGEN_KERNELS(ISA) {ISA::gated_unit, ISA::gated_unit_gradient},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

template <class T>
void forward(int64_t pixels, int64_t channels, bool tanh, int64_t threads, uintptr_t input, uintptr_t residual,
             uintptr_t output) {
    advise_large_pages(output, pixels * channels * sizeof(T));
    const GatedUnit<T> job{pixels, channels, tanh, pointer<const T>(input), threads};
    kernels<T>().forward(job, pointer<const T>(residual), pointer<T>(output));
}

template <class T>
void gradient(int64_t pixels, int64_t channels, bool tanh, int64_t threads, uintptr_t input, uintptr_t grad,
              uintptr_t grad_input) {
    advise_large_pages(grad_input, 2 * pixels * channels * sizeof(T));
    const GatedUnit<T> job{pixels, channels, tanh, pointer<const T>(input), threads};
    kernels<T>().gradient(job, pointer<const T>(grad), pointer<T>(grad_input));
}

template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def(("gated_unit_" + dtype).c_str(), forward<T>, release(),
               "(pixels, channels, tanh, threads, input, residual or 0, output)");
    module.def(("gated_unit_gradient_" + dtype).c_str(), gradient<T>, release(),
               "(pixels, channels, tanh, threads, input, grad, grad_input)");
}

}  // namespace

void bind_gated_unit(pybind11::module_& module) {
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

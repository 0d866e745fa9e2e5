// fastgen._cpu.nearest_code_*: vector quantisation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "cpu/isa.h"
#include "cpu/nearest_code.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_NEAREST_CODE)

namespace fastgen {
namespace {

template <class T>
struct Kernels {
    int64_t (*scratch)(const NearestCode<T>&);
    void (*run)(const NearestCode<T>&, int64_t*, T*);
};

template <class T>
const Kernels<T>& kernels() {
    static constexpr Kernels<T> table[] = {
#define FASTGEN_KERNELS(ISA) {ISA::nearest_code_scratch, ISA::nearest_code},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

using Three = std::array<int64_t, 3>;

template <class T>
int64_t scratch(const Three& sizes, int64_t count, int64_t threads) {
    return kernels<T>().scratch({nullptr, sizes[0], sizes[1], sizes[2], 0, 0, 0, nullptr, count, threads});
}

template <class T>
void run(const Three& sizes, int64_t count, int64_t threads, uintptr_t input, const Three& strides, uintptr_t codes,
         uintptr_t indices, uintptr_t scratch) {
    const NearestCode<T> job{pointer<const T>(input), sizes[0], sizes[1], sizes[2], strides[0], strides[1], strides[2],
                             pointer<const T>(codes), count,    threads};
    kernels<T>().run(job, pointer<int64_t>(indices), pointer<T>(scratch));
}

template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def(("nearest_code_scratch_" + dtype).c_str(), scratch<T>,
               "((images, area, depth), codes, threads) -> elements of scratch");
    module.def(("nearest_code_" + dtype).c_str(), run<T>, release(),
               "((images, area, depth), codes, threads, input, strides, codebook, indices, scratch)");
}

}  // namespace

void bind_nearest_code(pybind11::module_& module) {
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

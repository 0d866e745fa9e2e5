// fastgen._cpu.upfirdn2d_*: up- and downsampling with a filter for all channels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "cpu/isa.h"
#include "cpu/upfirdn2d.h"
#include "large_pages.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_UPFIRDN2D)

namespace fastgen {
namespace {

using Axis = std::array<int64_t, 6>;

FilterAxis axis_of(const Axis& axis) { return {axis[0], axis[1], axis[2], axis[3], axis[4], axis[5]}; }

template <class T>
void run(int64_t images, int64_t channels_in_run, const Axis& y, const Axis& x, int64_t threads, uintptr_t input,
         uintptr_t filter, uintptr_t output) {
    static constexpr void (*table[])(const UpFirDn2d<T>&) = {
#define FASTGEN_KERNEL(ISA) ISA::upfirdn2d,
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNEL)
#undef FASTGEN_KERNEL
    };
    const UpFirDn2d<T> job{images,
                           channels_in_run,
                           axis_of(y),
                           axis_of(x),
                           threads,
                           pointer<const T>(input),
                           pointer<const T>(filter),
                           pointer<T>(output)};
    advise_large_pages(output, images * job.y.out_size * job.x.out_size * channels_in_run * sizeof(T));
    table[active_isa()](job);
}

template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def(("upfirdn2d_" + dtype).c_str(), run<T>, release(),
               "(images, run, y, x, threads, input, filter, output), where y and x are (in_size, out_size, kernel, "
               "before, up, down)");
}

}  // namespace

void bind_upfirdn2d(pybind11::module_& module) {
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

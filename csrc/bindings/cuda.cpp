// The module fastgen._cuda. It links the CUDA runtime statically and finds the driver at run time: it imports anywhere.
#include <pybind11/pybind11.h>

#include "cuda/device.h"
#include "cuda/philox.h"
#include "fastgen_module.h"

namespace py = pybind11;

namespace fastgen::cuda {
void bind_pixel_stage(py::module_& module);  // cuda_pixel_stage.cpp
}

namespace {

void philox_uint32(uint64_t seed, uintptr_t block, uintptr_t position, uintptr_t sample, int64_t count, uintptr_t out,
                   uintptr_t stream) {
    fastgen::cuda::philox_uint32(seed, reinterpret_cast<const int64_t*>(block),
                                 reinterpret_cast<const int64_t*>(position), reinterpret_cast<const int64_t*>(sample),
                                 count, reinterpret_cast<int64_t*>(out), reinterpret_cast<CUstream_st*>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() =
        "fastgen's CUDA kernels. Pointers are integers, strides count elements; the stream handle comes last.";
    module.attr("version") = FASTGEN_VERSION;
    module.attr("archs") = FASTGEN_CUDA_ARCHS;
    module.def("device_count", fastgen::cuda::device_count, "Number of usable GPUs; 0 without a driver.");
    module.def("runtime_version", fastgen::cuda::runtime_version, "CUDA runtime linked in: 1000 * major + 10 * minor.");
    module.def("philox_uint32", philox_uint32, py::arg("seed"), py::arg("block"), py::arg("position"),
               py::arg("sample"), py::arg("count"), py::arg("out"), py::arg("stream"),
               "Philox4x32-10 of int64 [count] counters into int64 [count, 4], on the GPU.");
    fastgen::cuda::bind_pixel_stage(module);
}

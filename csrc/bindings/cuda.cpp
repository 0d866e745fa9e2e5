// The module fastgen._cuda. It links the CUDA runtime statically and finds the driver at run time, so that it imports anywhere.
#include <pybind11/pybind11.h>

#include "../cuda/device.h"
#include "fastgen_module.h"

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "fastgen's CUDA kernels. Pointers are integers, strides count elements; the stream handle comes last.";
    module.attr("version") = FASTGEN_VERSION;
    module.attr("archs") = FASTGEN_CUDA_ARCHS;
    module.def("device_count", &fastgen::cuda::device_count, "Number of usable GPUs; 0 without a driver.");
    module.def("runtime_version", &fastgen::cuda::runtime_version, "CUDA runtime linked in: 1000 * major + 10 * minor.");
}

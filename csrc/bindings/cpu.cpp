// The module fastgen._cpu. To add an operation, write csrc/bindings/bind_X.cpp with
//     namespace fastgen { void bind_X(pybind11::module_& module) { module.def(...); } }
// setup.py lists the functions of all such files in the generated header, so this file needs no change.
#include <pybind11/pybind11.h>

#include "fastgen_module.h"

namespace fastgen {
#define FASTGEN_DECLARE(function) void function(pybind11::module_&);
FASTGEN_FOR_EACH_BINDING(FASTGEN_DECLARE)
#undef FASTGEN_DECLARE
}  // namespace fastgen

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "fastgen's C++ kernels. Pointers are integers, strides count elements.";
    module.attr("version") = FASTGEN_VERSION;
    module.attr("compiler") = FASTGEN_COMPILER;
    module.attr("sanitize") = FASTGEN_SANITIZE;
    module.attr("cuda_build") = FASTGEN_CUDA_BUILD;
#define FASTGEN_BIND(function) fastgen::function(module);
    FASTGEN_FOR_EACH_BINDING(FASTGEN_BIND)
#undef FASTGEN_BIND
}

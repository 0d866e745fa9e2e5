// fastgen._cpu.isa, isas, set_isa: the choice of the instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

namespace fastgen {

void bind_isa(pybind11::module_& module) {
    module.def("isa", isa_name, "The instruction set that the kernels run with.");
    module.def("isas", isa_names, "Instruction sets compiled in that this processor has, slowest first.");
    module.def("set_isa", set_isa, pybind11::arg("name"),
               "Forces one of isas() in the whole process, for tests; '' returns to the choice at start.");
}

}  // namespace fastgen

// Which of the compiled instruction sets runs: the best one that the processor has, or the one named by FASTGEN_ISA.
//
// An operation declares a table of its kernels in every instruction set's namespace and indexes the tables with
// active_isa():
//
//     #define FASTGEN_KERNELS(ISA) &ISA::x_kernels,
//     const XKernels* const kTables[] = {FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)};
//     kTables[active_isa()]->forward(...);
#pragma once

#include <string>
#include <vector>

#include "fastgen_build.h"

namespace fastgen {

// Index into FASTGEN_FOR_EACH_ISA. Throws std::runtime_error where FASTGEN_ISA names a set that this processor or
// build lacks.
int active_isa();

std::string isa_name();                 // of active_isa()
std::vector<std::string> isa_names();   // compiled in and supported here, slowest first
void set_isa(const std::string& name);  // for tests; "" returns to the choice at start; throws std::invalid_argument

}  // namespace fastgen

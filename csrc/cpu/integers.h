// Arithmetic of sizes.
#pragma once

#include <cstdint>

#include "vec.h"

namespace fastgen::FASTGEN_ISA {

FASTGEN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTGEN_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
FASTGEN_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGEN_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fastgen::FASTGEN_ISA

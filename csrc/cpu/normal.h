// Standard normal numbers as a function of (seed, draw, sample, element), and the parts that they are made of.
#pragma once

#include <cstdint>

// normal: samples start .. start + rows - 1 into the dense [rows, columns]. The others are for tests: arrays of numbers
// k, odd and below 2^24, that stand for the uniforms k / 2^24.
#define FASTGEN_DECLARE_NORMAL(ISA)                                                                    \
    namespace fastgen::ISA {                                                                           \
    void normal(uint64_t seed, uint32_t draw, int64_t start, int64_t rows, int64_t columns, float* to, \
                int64_t threads);                                                                      \
    void array_normal_radius(const int32_t* k, float* radius, int64_t count);                          \
    void array_cos_sin(const int32_t* k, float* cosine, float* sine, int64_t count);                   \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_NORMAL(FASTGEN_ISA)
#endif

// The loops that measure what this processor can do; compiled once per instruction set.
#pragma once
#include <cstdint>

// Declares the loops of one instruction set, in namespace fastgen::ISA.
#define FASTGEN_DECLARE_CEILINGS(ISA)                                      \
    namespace fastgen::ISA {                                               \
    double fma_float32(int64_t iterations);                                \
    double fma_float64(int64_t iterations);                                \
    double dot_bfloat16(int64_t iterations);                               \
    uint64_t read_bytes(const void* data, int64_t bytes, int64_t repeats); \
    extern const int64_t flops_float32, flops_float64, flops_bfloat16;     \
    }

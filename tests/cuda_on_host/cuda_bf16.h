#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat162 {
    uint16_t x, y;
};

// Rounds to nearest, to even where there are two; NaN is none of what the kernels round.
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
    const auto rounded = [](float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    };
    return {rounded(a), rounded(b)};
}

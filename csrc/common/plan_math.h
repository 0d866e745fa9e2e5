// The functions of cpu/vec_math.h for one float, on the host and on a GPU: the same operations in the same order, so the
// same bits, wherever a * b + c is not contracted (setup.py sees to that). How they work and how far off they are is
// said there.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"  // FASTGEN_HOST_DEVICE

namespace fastgen::scalar {

FASTGEN_HOST_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

FASTGEN_HOST_DEVICE float as_float(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

FASTGEN_HOST_DEVICE int32_t as_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof(x));
    return bits;
}

// 2^(exponent - 127)
FASTGEN_HOST_DEVICE float power(int32_t exponent) { return as_float(int32_t(uint32_t(exponent) << 23)); }

FASTGEN_HOST_DEVICE float exp_parts(float x, int32_t* shifted) {
    const float rounded = fma(x, 1.44269504f, 12582912.0f);
    *shifted = as_bits(rounded);
    const float n = rounded - 12582912.0f;
    float r = fma(n, -0.693145752f, x);
    r = fma(n, -1.42860677e-6f, r);
    float p = 0.00138145406f;
    p = fma(p, r, 0.00836874545f);
    p = fma(p, r, 0.0416683890f);
    p = fma(p, r, 0.166665211f);
    p = fma(p, r, 0.49999994f);
    return fma(p * r, r, r);
}

FASTGEN_HOST_DEVICE float exp(float x) {
    x = -105.0f > x ? -105.0f : x;  // a NaN stays
    x = 89.0f < x ? 89.0f : x;
    int32_t shifted;
    const float p = exp_parts(x, &shifted);
    const int32_t exponent = shifted - 0x4b400000, half = exponent >> 1;
    const float scale = power(half + 127);
    return fma(p, scale, scale) * power(exponent - half + 127);
}

FASTGEN_HOST_DEVICE float abs(float x) { return as_float(as_bits(x) & 0x7fffffff); }

FASTGEN_HOST_DEVICE float expm1_of_minus_abs(float x) {
    x = -abs(x);
    int32_t shifted;
    const float p = exp_parts(-88.0f > x ? -88.0f : x, &shifted);
    const float scale = power(shifted - (0x4b400000 - 127));
    return -fma(-p, scale, 1.0f - scale);
}

FASTGEN_HOST_DEVICE float positive_or(float x, float other) { return x > 0.0f ? x : other; }

FASTGEN_HOST_DEVICE float expm1(float x) {
    const float below = expm1_of_minus_abs(x);
    return x > 0.0f ? exp(x) * -below : below;
}

FASTGEN_HOST_DEVICE float sigmoid(float x) {
    const float e = exp(-abs(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

FASTGEN_HOST_DEVICE float tanh(float x) {
    const float a = abs(x), z = x * x;
    float p = -0.00570422690f;
    p = fma(p, z, 0.0206384342f);
    p = fma(p, z, -0.0537395254f);
    p = fma(p, z, 0.133314401f);
    p = fma(p, z, -0.333332807f);
    const float near = fma(p * z, a, a);
    const float far = 1.0f - 2.0f / (exp(a + a) + 1.0f);
    return as_float((as_bits(a < 0.625f ? near : far) & 0x7fffffff) | (as_bits(x) & ~0x7fffffff));
}

}  // namespace fastgen::scalar

// Vectorised exp, log, sigmoid, tanh and erf.
//
// Every lane is computed alike, so the bits of a result do not depend on its position, and are the same on AVX2,
// AVX-512 and ARM. NaN gives NaN; infinities and large arguments give the limits. Largest errors over all floats in
// units in the last place: exp 1.1, 1 - exp 1.5, log 0.9, sigmoid 2.4, tanh 1.4, erf 1.4, denormal results included.
// Doubles go through the C library, lane by lane.
#pragma once

#include "vec.h"

namespace fastgen::FASTGEN_ISA {

// e^x = 2^n (1 + p): x = n ln 2 + r, |r| <= ln(2) / 2, with ln 2 in two parts (Cody and Waite 1980); 1 + p = 1 + r +
// r^2 q(r) with q minimax in the relative error of the sum. n is in the low bits of `shifted`.
FASTGEN_INLINE Vec<float> exp_parts(Vec<float> x, Vec<int32_t>& shifted) {
    const Vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec<float> rounded = fma(x, broadcast(1.44269504f), magic);
    shifted = (Vec<int32_t>)rounded;
    const Vec<float> n = rounded - magic;
    Vec<float> r = fma(n, broadcast(-0.693145752f), x);  // 17 bits: exact for every n that occurs
    r = fma(n, broadcast(-1.42860677e-6f), r);

    Vec<float> p = broadcast(0.00138145406f);
    p = fma(p, r, broadcast(0.00836874545f));
    p = fma(p, r, broadcast(0.0416683890f));
    p = fma(p, r, broadcast(0.166665211f));
    p = fma(p, r, broadcast(0.49999994f));
    return fma(p * r, r, r);
}

// 2^n in two factors, so that a denormal result is rounded once.
FASTGEN_INLINE Vec<float> exp(Vec<float> x) {
    x = min(broadcast(89.0f), max(broadcast(-105.0f), x));  // beyond: inf and 0; a NaN in the second argument stays
    Vec<int32_t> shifted;
    const Vec<float> p = exp_parts(x, shifted);
    const Vec<int32_t> exponent = shifted - 0x4b400000;
    const Vec<int32_t> half = exponent >> 1;
    const Vec<float> scale = (Vec<float>)((half + 127) << 23);
    const Vec<float> rest = (Vec<float>)((exponent - half + 127) << 23);
    return fma(p, scale, scale) * rest;
}

// exp for x <= 88, cheaper: results below 2^-126 may be 0. `lack` is 1 - e^x without cancellation.
FASTGEN_INLINE Vec<float> exp_flushed(Vec<float> x, Vec<float>& lack) {
    Vec<int32_t> shifted;
    const Vec<float> p = exp_parts(max(broadcast(-88.0f), x), shifted);  // -88: n = -127, and so scale = 0
    const Vec<float> scale = (Vec<float>)((shifted - (0x4b400000 - 127)) << 23);
    lack = fma(-p, scale, broadcast(1.0f) - scale);
    return fma(p, scale, scale);
}

FASTGEN_INLINE Vec<float> exp_flushed(Vec<float> x) {
    Vec<float> unused;
    return exp_flushed(x, unused);
}

FASTGEN_INLINE Vec<float> abs(Vec<float> x) { return (Vec<float>)((Vec<int32_t>)x & 0x7fffffff); }

FASTGEN_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
    return (Vec<float>)(((Vec<int32_t>)magnitude & 0x7fffffff) | ((Vec<int32_t>)sign & ~0x7fffffff));
}

// 1 / (1 + e^-x) for x >= 0 and e^x / (1 + e^x) below: neither cancels nor overflows.
FASTGEN_INLINE Vec<float> sigmoid(Vec<float> x) {
    const Vec<float> one = broadcast(1.0f);
    const Vec<float> e = exp(-abs(x));
    return where(x < Vec<float>{}, e, one) / (one + e);
}

// With the sign of x: |x| + |x|^3 p(x^2), p minimax, up to |x| = 0.625; 1 - 2 / (e^2|x| + 1) above.
FASTGEN_INLINE Vec<float> tanh(Vec<float> x) {
    const Vec<float> a = abs(x);
    const Vec<float> z = x * x;
    Vec<float> p = broadcast(-0.00570422690f);
    p = fma(p, z, broadcast(0.0206384342f));
    p = fma(p, z, broadcast(-0.0537395254f));
    p = fma(p, z, broadcast(0.133314401f));
    p = fma(p, z, broadcast(-0.333332807f));
    const Vec<float> near = fma(p * z, a, a);
    const Vec<float> one = broadcast(1.0f);
    const Vec<float> far = one - broadcast(2.0f) / (exp(a + a) + one);
    return copysign(where(a < broadcast(0.625f), near, far), x);
}

// With the sign of x: |x| + |x| p(x^2) up to |x| = 1, 1 - e^-g(|x|) above, p and g minimax; 1 where g was not fitted.
FASTGEN_INLINE Vec<float> erf(Vec<float> x) {
    const Vec<float> a = abs(x);
    const Vec<float> z = x * x;
    Vec<float> p = broadcast(7.85386146e-5f);
    p = fma(p, z, broadcast(-0.000801019371f));
    p = fma(p, z, broadcast(0.00518832775f));
    p = fma(p, z, broadcast(-0.0268538129f));
    p = fma(p, z, broadcast(0.112835854f));
    p = fma(p, z, broadcast(-0.376126260f));
    p = fma(p, z, broadcast(0.128379166f));
    const Vec<float> near = fma(p, a, a);
    const Vec<float> b = min(broadcast(4.0f), a);  // a NaN in the second argument stays
    Vec<float> g = broadcast(-0.000186379199f);
    g = fma(g, b, broadcast(0.00294765830f));
    g = fma(g, b, broadcast(-0.0218380634f));
    g = fma(g, b, broadcast(0.103106752f));
    g = fma(g, b, broadcast(0.638144851f));
    g = fma(g, b, broadcast(1.12708914f));
    g = fma(g, b, broadcast(0.000341523023f));
    Vec<float> far;
    exp_flushed(-g, far);
    return copysign(where(a < broadcast(1.0f), near, far), x);
}

// x = 2^n (1 + f), -0.3 < f < 0.42; with s = f / (2 + f), log(1 + f) = f - f^2/2 + s (f^2/2 + s^2 p(s^2)), p near
// 2/3 + 2/5 s^2 + 2/7 s^4 + ... and minimax; ln 2 in two parts. Denormal arguments are first scaled by 2^23.
FASTGEN_INLINE Vec<float> log(Vec<float> x) {
    const Vec<int32_t> denormal = x < broadcast(1.17549435e-38f);
    const Vec<int32_t> bits = (Vec<int32_t>)abs(where(denormal, x * broadcast(8388608.0f), x));
    const Vec<int32_t> exponent = (bits - 0x3f3504f3) >> 23;  // bits of sqrt(1/2)
    const Vec<float> f = (Vec<float>)(bits - (exponent << 23)) - broadcast(1.0f);
    const Vec<float> n = __builtin_convertvector(exponent - (denormal & 23), Vec<float>);

    const Vec<float> s = f / (f + broadcast(2.0f));
    const Vec<float> z = s * s;
    Vec<float> p = broadcast(0.298717022f);
    p = fma(p, z, broadcast(0.399775416f));
    p = fma(p, z, broadcast(0.666667759f));
    const Vec<float> half_square = broadcast(0.5f) * f * f;
    const Vec<float> low = fma(s, fma(p, z, half_square), n * broadcast(1.42860677e-6f));
    const Vec<float> y = fma(n, broadcast(0.693145752f), f - (half_square - low));

    const Vec<float> infinity = broadcast(__builtin_inff());
    const Vec<float> finite = where(x < infinity, y, x);  // also NaN
    return where(x > Vec<float>{}, finite, where(x == Vec<float>{}, -infinity, broadcast(__builtin_nanf(""))));
}

FASTGEN_INLINE Vec<double> exp(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
}

FASTGEN_INLINE Vec<double> exp_flushed(Vec<double> x) { return exp(x); }

FASTGEN_INLINE Vec<double> exp_flushed(Vec<double> x, Vec<double>& lack) {
    for (int i = 0; i < kLanes<double>; ++i) lack[i] = -__builtin_expm1(x[i]);
    return exp(x);
}

FASTGEN_INLINE Vec<double> log(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
    return x;
}

FASTGEN_INLINE Vec<double> sigmoid(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) {
        const double e = __builtin_exp(-__builtin_fabs(x[i]));
        x[i] = (x[i] < 0 ? e : 1.0) / (1.0 + e);
    }
    return x;
}

FASTGEN_INLINE Vec<double> erf(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
    return x;
}

FASTGEN_INLINE Vec<double> tanh(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
}

}  // namespace fastgen::FASTGEN_ISA

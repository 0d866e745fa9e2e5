// bfloat16 in memory, float in registers.
#pragma once

#include <cstdint>

#include "dot_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {

typedef uint16_t HalfVec __attribute__((vector_size(kVecBytes / 2)));

FASTGEN_INLINE float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

FASTGEN_INLINE double to_double(double x) { return x; }
FASTGEN_INLINE double to_double(BFloat16 x) { return to_float(x); }

FASTGEN_INLINE Vec<float> load(const BFloat16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC 12 widens the halves of the vector apart
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
#endif
    HalfVec halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(halves, Vec<int32_t>) << 16);
}

FASTGEN_INLINE Vec<float> load_n(const BFloat16* p, int n) {
#if defined(__AVX512F__)
    const __m256i words = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
#endif
    BFloat16 copy[kLanes<float>] = {};
    for (int i = 0; i < n; ++i) copy[i] = p[i];
    return load(copy);
}

// To the nearest, ties to even; a NaN stays one. The processor's instruction takes denormal numbers for zero.
FASTGEN_INLINE HalfVec round_halves(Vec<float> x) {
#if defined(__AVX512BF16__)
    return (HalfVec)_mm512_cvtneps_pbh(x);
#else
    const Vec<int32_t> bits = reinterpret_cast<Vec<int32_t>>(x);
    const Vec<int32_t> rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector(where(x == x, rounded, bits | 0x400000) >> 16, HalfVec);
#endif
}

FASTGEN_INLINE void store(BFloat16* p, Vec<float> x) {
    const HalfVec halves = round_halves(x);
    __builtin_memcpy(p, &halves, sizeof halves);
}

FASTGEN_INLINE void store_n(BFloat16* p, Vec<float> x, int n) {
    const HalfVec halves = round_halves(x);
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m256i>(halves));
#else
    for (int i = 0; i < n; ++i) p[i].bits = halves[i];
#endif
}

FASTGEN_INLINE Vec<float> load_some(const BFloat16* p, int64_t n) {
    return n == kLanes<float> ? load(p) : load_n(p, static_cast<int>(n));
}

FASTGEN_INLINE void store_some(BFloat16* p, Vec<float> x, int64_t n) {
    if (n == kLanes<float>)
        store(p, x);
    else
        store_n(p, x, static_cast<int>(n));
}

FASTGEN_INLINE BFloat16 round_to_bfloat16(double x) {
    const float value = static_cast<float>(x);
    BFloat16 halves[kLanes<float>];
    store(halves, broadcast(value));
    return halves[0];
}

}  // namespace fastgen::FASTGEN_ISA

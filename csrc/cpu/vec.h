// The vector type of one instruction set, and the few operations kernels are written in.
//
// Included by sources that are compiled once per instruction set with FASTGEN_ISA set to its name; everything here
// lives in namespace fastgen::FASTGEN_ISA. Widths: AVX-512 64 bytes, AVX2 32 bytes, else 16 bytes:
// NEON on ARM, and what every x86-64 has.
//
//   Vec<T>                       T is float, double or int32_t; + - * / < are the compiler's vector extensions
//   Bits<T>                      the same of integers of the size of T: what comparisons give
//   kLanes<T>                    elements in a vector
//   load, store                  unaligned
//   load_n, store_n              the first n elements (0 <= n <= kLanes); the others read as zero and stay untouched
//   load_bytes                   signed bytes as floats
//   load_some, store_some        the same, faster where n is most often kLanes
//   lanes_below<T>(n)            n within 0 and kLanes
//   fma(a, b, c)                 a*b + c, rounded once where the processor has the instruction
//   max, min                     of a and b; b when either is NaN, so max(zero, x) keeps a NaN in x
//   where(mask, a, b)            mask is the result of a comparison
//   shuffle<i, ...>(a, b)        elements i, ... of a and b, those of b counted on
//
// These sources are compiled without contraction, so a product is fused into a sum exactly where fma is written: the
// same operations, and so the same bits, on AVX2, AVX-512 and ARM.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own _mm512_undefined_ps()
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FASTGEN_ISA
#error "vec.h is for sources compiled per instruction set: FASTGEN_ISA must name it"
#endif

#define FASTGEN_INLINE inline __attribute__((always_inline))

namespace fastgen::FASTGEN_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif

// Of the processors that have the instructions, the least that one core has for itself. Nothing that scratch memory or bits
// depend on may depend on it: callers keep sizes of scratch memory, whichever instructions are used.
#if defined(__AVX512F__)
inline constexpr int kL2Bytes = 1 << 20;
#else
inline constexpr int kL2Bytes = 512 << 10;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVecRegisters = 32;
#else
inline constexpr int kVecRegisters = 16;
#endif

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecOf<int32_t> {
    typedef int32_t type __attribute__((vector_size(kVecBytes)));
};

template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
using Bits = decltype(Vec<T>{} < Vec<T>{});

template <class T>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

template <class T>
FASTGEN_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
FASTGEN_INLINE void store(T* p, Vec<T> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// x - zero keeps the sign of a negative zero, which zero + x would lose.
template <class T>
FASTGEN_INLINE Vec<T> broadcast(T x) {
    return x - Vec<T>{};
}

// Stops the compiler from folding one load into each of its uses: a second load costs more than a register.
template <class V>
FASTGEN_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

// Stops the compiler from keeping what it has loaded from p, for want of registers.
template <class T>
FASTGEN_INLINE void load_again(const T*& p) {
    asm("" : "+r"(p));
}

template <class M, class V>
FASTGEN_INLINE V where(M mask, V a, V b) {
    return mask ? a : b;
}

#if defined(__AVX512F__)

FASTGEN_INLINE Vec<float> load_n(const float* p, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
FASTGEN_INLINE Vec<double> load_n(const double* p, int n) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
FASTGEN_INLINE void store_n(float* p, Vec<float> v, int n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
FASTGEN_INLINE void store_n(double* p, Vec<double> v, int n) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
}
FASTGEN_INLINE Vec<float> load_bytes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FASTGEN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
FASTGEN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
FASTGEN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
FASTGEN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a, b); }
FASTGEN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a, b); }
FASTGEN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return _mm512_min_pd(a, b); }

#elif defined(__AVX2__)

FASTGEN_INLINE __m256i first_lanes_ps(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTGEN_INLINE __m256i first_lanes_pd(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTGEN_INLINE Vec<float> load_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes_ps(n)); }
FASTGEN_INLINE Vec<double> load_n(const double* p, int n) { return _mm256_maskload_pd(p, first_lanes_pd(n)); }
// By halves rather than by _mm256_maskstore: a layer of three output channels takes 6-8 % less on Zen 3.
FASTGEN_INLINE void store_n(float* p, Vec<float> v, int n) {
    if (n == kLanes<float>) return store(p, v);
    __m128 rest = _mm256_castps256_ps128(v);
    if (n & 4) {
        _mm_storeu_ps(p, rest);
        p += 4;
        rest = _mm256_extractf128_ps(v, 1);
    }
    if (n & 2) {
        _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
        p += 2;
        rest = _mm_movehl_ps(rest, rest);
    }
    if (n & 1) _mm_store_ss(p, rest);
}
FASTGEN_INLINE void store_n(double* p, Vec<double> v, int n) {
    if (n == kLanes<double>) return store(p, v);
    __m128d rest = _mm256_castpd256_pd128(v);
    if (n & 2) {
        _mm_storeu_pd(p, rest);
        p += 2;
        rest = _mm256_extractf128_pd(v, 1);
    }
    if (n & 1) _mm_store_sd(p, rest);
}
FASTGEN_INLINE Vec<float> load_bytes(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FASTGEN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
FASTGEN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
FASTGEN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
FASTGEN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
FASTGEN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
FASTGEN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a, b); }

#else

template <class T>
FASTGEN_INLINE Vec<T> load_n(const T* p, int n) {
    Vec<T> v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
}
template <class T>
FASTGEN_INLINE void store_n(T* p, Vec<T> v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
}
#if defined(__aarch64__)
FASTGEN_INLINE Vec<float> load_bytes(const int8_t* p) {
    int32_t bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    const int16x4_t shorts = vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes))));
    return (Vec<float>)vcvtq_f32_s32(vmovl_s16(shorts));
}
FASTGEN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FASTGEN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
FASTGEN_INLINE Vec<float> load_bytes(const int8_t* p) {
    Vec<float> v{};
    for (int i = 0; i < kLanes<float>; ++i) v[i] = p[i];
    return v;
}
#if defined(__FP_FAST_FMAF) && defined(__FP_FAST_FMA)
FASTGEN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    for (int i = 0; i < kLanes<float>; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
FASTGEN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    for (int i = 0; i < kLanes<double>; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
}
#else
FASTGEN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
FASTGEN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
#endif
#endif
FASTGEN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
FASTGEN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
FASTGEN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
FASTGEN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return a < b ? a : b; }

#endif

template <class T>
FASTGEN_INLINE int lanes_below(int64_t n) {
    return n <= 0 ? 0 : n >= kLanes<T> ? kLanes<T> : static_cast<int>(n);
}

template <class T>
FASTGEN_INLINE Vec<T> load_some(const T* from, int64_t count) {
    return count == kLanes<T> ? load(from) : load_n(from, static_cast<int>(count));
}

template <class T>
FASTGEN_INLINE void store_some(T* to, Vec<T> v, int64_t count) {
    if (count == kLanes<T>)
        store(to, v);
    else
        store_n(to, v, static_cast<int>(count));
}

template <int... index, class V>
FASTGEN_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, index...);
#else
    using Index = decltype(a < b);
    return __builtin_shuffle(a, b, Index{index...});
#endif
}

// The elements of the lower, or the upper, halves of a and b in turn; i is every lane.
template <class T, int... i>
FASTGEN_INLINE Vec<T> lower_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, i...>) {
    return shuffle<(i / 2 + i % 2 * kLanes<T>)...>(a, b);
}
template <class T, int... i>
FASTGEN_INLINE Vec<T> upper_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, i...>) {
    return shuffle<(i / 2 + i % 2 * kLanes<T> + kLanes<T> / 2)...>(a, b);
}
// And back: every second element of a and b, from the first or the second on.
template <class T, int odd, int... i>
FASTGEN_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b, std::integer_sequence<int, i...>) {
    return shuffle<(2 * i + odd)...>(a, b);
}

}  // namespace fastgen::FASTGEN_ISA

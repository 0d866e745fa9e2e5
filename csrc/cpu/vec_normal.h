// Vectorised standard normal numbers: Philox4x32-10 and the Box-Muller transform.
//
// Elements 4p .. 4p + 3 of a sample come from the four numbers of the counter (draw, p, sample); the table is in
// fastgen/ops/philox.py, the definition in plain PyTorch in fastgen/ops/normal.py. It is a sequence of float32
// operations that are rounded once each, so every instruction set gives the same bits. With k = bits >> 8 | 1 an odd
// number below 2^24, a pair (u, v) = (k_u, k_v) / 2^24 gives sqrt(-2 log u) times cos(2 pi v) and sin(2 pi v); each factor
// is within 1 unit in the last place of its exact value, over all k.
//
//   PhiloxKeys    the round keys of a seed
//   NormalGrid    rows of samples, each of the same number of blocks; what all streams through them share
//   NormalStream  the counters of the next kLanes<float> blocks
//   normals       the next vectors of blocks of a stream: 4 * kLanes<float> numbers each, in order
#pragma once

#include <utility>

#include "vec.h"

namespace fastgen::FASTGEN_ISA {

template <>
struct VecOf<uint64_t> {
    typedef uint64_t type __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecOf<uint32_t> {
    typedef uint32_t type __attribute__((vector_size(kVecBytes)));
};

// Products of the lower words.
FASTGEN_INLINE Vec<uint64_t> multiply_words(Vec<uint64_t> a, Vec<uint64_t> b) {
#if defined(__AVX512F__)
    return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    return (Vec<uint64_t>)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// a*b + c rounded once, on every instruction set.
FASTGEN_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX2__) || defined(__FP_FAST_FMAF)
    return fma(a, b, c);
#else
    for (int i = 0; i < kLanes<float>; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
FASTGEN_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, float c) { return fused(a, b, broadcast(c)); }

FASTGEN_INLINE Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#elif defined(__aarch64__)
    return (Vec<float>)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

struct PhiloxKeys {
    uint64_t words[10][2];

    explicit PhiloxKeys(uint64_t seed) {
        uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
        for (auto& round : words) {
            round[0] = low;
            round[1] = high;
            low += 0x9E3779B9u;
            high += 0xBB67AE85u;
        }
    }
};

// The ten rounds on counters in the lower words of 64-bit lanes; the upper words of the results hold anything. A
// product's upper word moves down by one shift, its lower word is where it is needed.
FASTGEN_INLINE void philox(const PhiloxKeys& keys, Vec<uint64_t> draw, Vec<uint64_t> position, Vec<uint64_t> sample,
                           Vec<uint64_t>* out) {
    const Vec<uint64_t> m0 = 0xD2511F53 + Vec<uint64_t>{}, m1 = 0xCD9E8D57 + Vec<uint64_t>{};
    Vec<uint64_t> c0 = draw, c1 = position, c2 = sample, c3 = sample >> 32;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Vec<uint64_t> p0 = multiply_words(c0, m0), p1 = multiply_words(c2, m1);
        c0 = (p1 >> 32) ^ c1 ^ keys.words[round][0];
        c1 = p1;
        c2 = (p0 >> 32) ^ c3 ^ keys.words[round][1];
        c3 = p0;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

FASTGEN_INLINE Vec<int32_t> odd_24_bits(Vec<uint32_t> bits) { return (Vec<int32_t>)(bits >> 8 | 1); }

// sqrt(-2 log(k / 2^24)): k = 2^n (1 + f), -0.3 < f < 0.42; -2 log(1 + f) = -2 f + f^2 + f^3 p(f), p minimax.
FASTGEN_INLINE Vec<float> normal_radius(Vec<int32_t> k) {
    const Vec<int32_t> bits = (Vec<int32_t>)__builtin_convertvector(k, Vec<float>);
    const Vec<int32_t> exponent = (bits - 0x3f3504f3) >> 23;  // bits of sqrt(1/2)
    const Vec<float> f = (Vec<float>)(bits - (exponent << 23)) - broadcast(1.0f);
    const Vec<float> n = __builtin_convertvector(exponent - 24, Vec<float>);

    Vec<float> p = broadcast(0.152648946f);
    p = fused(p, f, -0.255169651f);
    p = fused(p, f, 0.263189494f);
    p = fused(p, f, -0.284042400f);
    p = fused(p, f, 0.332469231f);
    p = fused(p, f, -0.400024308f);
    p = fused(p, f, 0.500016361f);
    p = fused(p, f, -0.666666636f);
    const Vec<float> square = f * f;
    const Vec<float> log_mantissa = fused(broadcast(-2.0f), f, fused(square * f, p, square));
    const Vec<float> low = fused(n, broadcast(3.80930865e-9f), log_mantissa);  // -2 log 2 in two parts
    return sqrt(fused(n, broadcast(-1.38629436f), low));
}

// Cosine and sine of 2 pi k / 2^24: the angle is q / 4 + t turns, |t| <= 1/8, without rounding.
FASTGEN_INLINE void cos_sin(Vec<int32_t> k, Vec<float>& cosine, Vec<float>& sine) {
    const Vec<int32_t> q = (k + (1 << 21)) >> 22;
    const Vec<float> t = __builtin_convertvector(k - (q << 22), Vec<float>) * broadcast(0x1p-24f);
    const Vec<float> square = t * t;

    Vec<float> s = broadcast(-75.4019940f);
    s = fused(s, square, 81.5931843f);
    s = fused(s, square, -41.3416725f);
    s = fused(s, square, -1.74845553e-7f);  // 2 pi in two parts
    s = fused(t, broadcast(6.28318548f), t * s);
    Vec<float> c = broadcast(59.2204006f);
    c = fused(c, square, -85.4432493f);
    c = fused(c, square, 64.9393255f);
    c = fused(c, square, -19.7392087f);
    c = fused(c, square, 1.0f);

    const Vec<int32_t> swap = (q & 1) != 0;
    const Vec<int32_t> negative_cosine = (q + 1) << 30 & static_cast<int32_t>(0x80000000);
    const Vec<int32_t> negative_sine = q << 30 & static_cast<int32_t>(0x80000000);
    cosine = (Vec<float>)((Vec<int32_t>)where(swap, s, c) ^ negative_cosine);
    sine = (Vec<float>)((Vec<int32_t>)where(swap, c, s) ^ negative_sine);
}

struct NormalGrid {
    int64_t blocks;                                    // of a row
    Vec<uint64_t> first_position[2], first_sample[2];  // of the even and the odd ones of kLanes<float> blocks
    Vec<uint64_t> position_step, sample_step;          // from one vector of blocks to the next

    explicit NormalGrid(int64_t blocks) : blocks(blocks) {
        uint64_t position = 0, sample = 0;
        for (int lane = 0; lane < kLanes<float>; ++lane) {
            first_position[lane % 2][lane / 2] = position;
            first_sample[lane % 2][lane / 2] = sample;
            if (++position == static_cast<uint64_t>(blocks)) {
                position = 0;
                ++sample;
            }
        }
        position_step = position + Vec<uint64_t>{};
        sample_step = sample + Vec<uint64_t>{};
    }
};

struct NormalStream {
    Vec<uint64_t> position[2], sample[2];

    // A position other than 0 is for rows of at least kLanes<float> blocks; the stream then ends with the row.
    NormalStream(const NormalGrid& grid, int64_t first_sample, int64_t first_position) {
        for (int i = 0; i < 2; ++i) {
            position[i] = grid.first_position[i] + static_cast<uint64_t>(first_position);
            sample[i] = grid.first_sample[i] + static_cast<uint64_t>(first_sample);
        }
    }

    FASTGEN_INLINE void advance(const NormalGrid& grid) {
        const auto blocks = static_cast<uint64_t>(grid.blocks);
        for (int i = 0; i < 2; ++i) {
            position[i] += grid.position_step;
            const Vec<uint64_t> wraps = (Vec<uint64_t>)(position[i] >= blocks);  // all bits, or none
            position[i] -= wraps & blocks;
            sample[i] += grid.sample_step - wraps;
        }
    }
};

FASTGEN_INLINE void interleave(Vec<float>& a, Vec<float>& b) {
    constexpr std::make_integer_sequence<int, kLanes<float>> each{};
    const Vec<float> lower = lower_halves<float>(a, b, each);
    b = upper_halves<float>(a, b, each);
    a = lower;
}

// Stores the elements of four vectors in turn.
FASTGEN_INLINE void store_in_turn(Vec<float>* v, float* to) {
    interleave(v[0], v[2]);
    interleave(v[1], v[3]);
    interleave(v[0], v[1]);
    interleave(v[2], v[3]);
    for (int i = 0; i < 4; ++i) store(to + i * kLanes<float>, v[i]);
}

// In two loops, of random bits and of numbers: in loops this short the processor works on several vectors at a time.
FASTGEN_INLINE void normals(const PhiloxKeys& keys, const NormalGrid& grid, NormalStream stream, uint32_t draw,
                            int64_t vectors, float* to) {
    const Vec<uint64_t> draws = draw + Vec<uint64_t>{};
    for (int64_t i = 0; i < vectors; ++i) {
        Vec<uint64_t> even[4], odd[4];
        philox(keys, draws, stream.position[0], stream.sample[0], even);
        philox(keys, draws, stream.position[1], stream.sample[1], odd);
        stream.advance(grid);
        for (int lane = 0; lane < 4; ++lane) {
            const Vec<uint64_t> bits = (even[lane] & 0xffffffff) | odd[lane] << 32;
            store(to + (4 * i + lane) * kLanes<float>, (Vec<float>)bits);
        }
    }
    for (int64_t i = 0; i < vectors; ++i, to += 4 * kLanes<float>) {
        Vec<int32_t> k[4];
        for (int lane = 0; lane < 4; ++lane) k[lane] = odd_24_bits((Vec<uint32_t>)load(to + lane * kLanes<float>));
        Vec<float> v[4];
        for (int pair = 0; pair < 4; pair += 2) {
            const Vec<float> radius = normal_radius(k[pair]);
            cos_sin(k[pair + 1], v[pair], v[pair + 1]);
            v[pair] *= radius;
            v[pair + 1] *= radius;
        }
        store_in_turn(v, to);
    }
}

}  // namespace fastgen::FASTGEN_ISA

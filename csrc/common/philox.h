// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011): a counter-based
// generator. Four 32-bit numbers are a pure function of a 128-bit counter and a 64-bit key. How fastgen fills the
// counter, and which draw is used for what: the table in fastgen/ops/philox.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTGEN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTGEN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastgen {

FASTGEN_HOST_DEVICE void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
        const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

// Uniform in the open interval (0, 1): an odd multiple of 2^-24. Every step is exact in float32; (bits >> 8) + 0.5
// would not be and would round up to 1.
FASTGEN_HOST_DEVICE float philox_uniform(uint32_t bits) { return float((bits >> 8) | 1u) * (1.0f / 16777216.0f); }

// The draw of one (block, position, sample) of a seed.
FASTGEN_HOST_DEVICE void philox_draw(uint64_t seed, uint32_t block, uint32_t position, uint64_t sample,
                                     uint32_t out[4]) {
    const uint32_t counter[4] = {block, position, uint32_t(sample), uint32_t(sample >> 32)};
    const uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    philox4x32_10(counter, key, out);
}

}  // namespace fastgen

// fastgen: per-isa
//
// Loops that reach the limits of one core, so that every measured time can be given as a fraction of what is possible.
//
//   fma_*       acc[i] = acc[i] * x + y, or acc[i] + x * y, on independent accumulators that stay in registers: no
//               loads, no stores.
//   dot_bfloat16  acc[i] += dot products of bf16 pairs, the same way (AVX512-BF16 only).
//   read_bytes  streams an array through registers.
//
// Each returns a value that depends on all of its work, which keeps the compiler from dropping it.
#include "ceilings.h"

#include <utility>

#include "vec.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

FASTGEN_DECLARE_CEILINGS(FASTGEN_ISA)

namespace fastgen::FASTGEN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Enough chains to hide a multiply-add of 4 to 8 cycles on two units, and with their two operands still within the 16
// registers of SSE and AVX2; ARM has 32 and up to four units.
#if defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 14;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU __attribute__((vector_size(kVectorBytes)));
typedef VecU UnalignedVecU __attribute__((aligned(8), may_alias));

// Floating-point operations of one iteration.
extern const int64_t flops_float32 = kChains * 2 * (kVectorBytes / 4);
extern const int64_t flops_float64 = kChains * 2 * (kVectorBytes / 8);
#ifdef __AVX512BF16__
extern const int64_t flops_bfloat16 = kChains * 2 * (kVectorBytes / 2);
#else
extern const int64_t flops_bfloat16 = 0;  // no such instruction
#endif

// Keeps a vector in a register and its value unknown to the compiler.
template <typename V>
static inline void opaque(V& v) {
#if defined(__x86_64__)
    asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(v));
#endif
}

// ARM's multiply-add is one to a sum; without any, as in SSE, a product that is always the same would not be computed.
template <typename V>
static inline V next(V acc, V x, V y) {
#if defined(__aarch64__)
    return fma(x, y, acc);
#else
    return fma(acc, x, y);
#endif
}

// i is every chain: GCC keeps an array that loops run over in memory.
template <typename T, typename V, int... i>
static double fma_loop(int64_t iterations, std::integer_sequence<int, i...>) {
    V x = V{} + T(0.5), y = V{} + T(1);  // the accumulators converge, to 2 or by rounding: no overflow, no subnormals
    V acc[] = {(V{} + T(i))...};
    opaque(x);
    opaque(y);
    for (int64_t n = 0; n < iterations; ++n) ((acc[i] = next(acc[i], x, y)), ...);
    return (static_cast<double>(acc[i][0]) + ...);
}

using Chains = std::make_integer_sequence<int, kChains>;
double fma_float32(int64_t iterations) { return fma_loop<float, VecF>(iterations, Chains{}); }
double fma_float64(int64_t iterations) { return fma_loop<double, VecD>(iterations, Chains{}); }

#ifdef __AVX512BF16__
double dot_bfloat16(int64_t iterations) {
    __m512 acc[kChains];
    __m512i ones = _mm512_set1_epi32(0x3f803f80);
    opaque(ones);
    const __m512bh x = (__m512bh)ones, y = x;
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(float(i));
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], x, y);
    }
    double sum = 0;
    for (int i = 0; i < kChains; ++i) sum += acc[i][0];
    return sum;
}
#else
double dot_bfloat16(int64_t) { return 0; }
#endif

uint64_t read_bytes(const void* data, int64_t bytes, int64_t repeats) {
    constexpr int kUnroll = 8;
    const int64_t vectors = bytes / kVectorBytes;
    VecU acc[kUnroll] = {};
    for (int64_t r = 0; r < repeats; ++r) {
        const auto* p = static_cast<const UnalignedVecU*>(data);
        for (int64_t n = 0; n + kUnroll <= vectors; n += kUnroll, p += kUnroll) {
#pragma GCC unroll 8
            for (int i = 0; i < kUnroll; ++i) acc[i] ^= p[i];
        }
#pragma GCC unroll 8
        for (int i = 0; i < kUnroll; ++i) opaque(acc[i]);  // an even number of passes must not cancel
    }
    uint64_t sum = 0;
    for (int i = 0; i < kUnroll; ++i) sum ^= acc[i][0];
    return sum;
}

}  // namespace fastgen::FASTGEN_ISA

// The one matrix product of the library:
//
//     C[r, j] = init[r, j] + sum over taps t, k < K_t of  A_t[r, k] * B_t[k, j]        r < rows, j < cols
//
// A tap is a strided view of the left operand (a shifted read of a feature map) and the slice of the right operand
// that goes with it. The right operand is kept in panels of 64 bytes of columns (16 floats, 8 doubles):
//
//     B_t[k, j] = b[j / kPanel * b_panel_stride + k * b_k_stride + j % kPanel]
//
// Packed weights have b_k_stride = kPanel and b_panel_stride = K_total * kPanel; the rows of a plain matrix, padded
// to whole panels, are read in place with b_k_stride = row length and b_panel_stride = kPanel. Rows of B that start on
// 64-byte boundaries load twice as fast.
//
// float products also take right operands in bfloat16, in words of two consecutive k of one column (BFloat16Pair):
//
//     word of B_t[k, j] = b[j / 16 * b_panel_stride + k / 2 * b_k_stride + j % 16],    even k in its low half
//
// Each tap starts a word, so one of an odd K_t ends with a half that is not read. Strides count words: packed weights
// have b_k_stride = 16 and b_panel_stride = 16 * (sum of ceil(K_t / 2)). A bfloat16 is a float without its lower 16
// bits, and the product is that of these floats: bit for bit the float product with the rounded weights.
//
// And in signed bytes, each times a power of two that a tap has for each column (ScaledInt8): the 16 powers of a panel,
// then its bytes,
//
//     byte of B_t[k, j] = b[j / 16 * b_panel_stride + kPowersBytes + k * b_k_stride + j % 16]
//
// so that packed weights have b_k_stride = 16 and a tap takes kPowersBytes + 16 * K_t of a panel. Powers of two round
// nothing: bit for bit the float product with what the bytes stand for.
//
// And they take the sum of several lines of floats, added as they are read (FilterLines): of the one at b and that
// `second_line` floats on, or of four neighbours, (l0 + l1) + (l2 + l3) with `signs`. So weights of minimal filtering,
// each of which goes into several sums, need not be multiplied in memory.
//
// Contract: the (t, k) of an element are cut, in order, into chunks of kTapGemmChunk; a chunk is one chain of fused
// multiply-adds from zero, and the chunks are added to init in order. So the bits do not depend on rows, cols, the
// element's place, tile shapes or threads, are the same on AVX2, AVX-512 and ARM, and the error grows with the chunk
// rather than with K.
#pragma once

#include <cstdint>

#ifdef FASTGEN_ISA
#include "vec.h"
#endif

namespace fastgen {

// The bfloat16s of two consecutive k of one column of B.
struct BFloat16Pair {
    uint32_t bits;
};

struct ScaledInt8 {
    int8_t value;
};

inline constexpr int64_t kPowersBytes = 64;  // of a panel of a tap

enum class Combination { sum, difference, all_four };
enum class Signs { plus_plus, plus_minus, minus_plus, minus_minus };  // of the second pair, and in the pairs

template <Combination>
struct FilterLines {
    float first;
};

template <class T>
inline constexpr int kPanel = 64 / static_cast<int>(sizeof(T));

inline constexpr int64_t kTapGemmChunk = 128;

template <class T>
constexpr __attribute__((always_inline)) int64_t panels_of(int64_t cols) {
    return (cols + kPanel<T> - 1) / kPanel<T>;
}

// Elements up to whole panels, which are whole cache lines: vectors that straddle two of them load at half speed.
template <class T>
constexpr __attribute__((always_inline)) int64_t aligned(int64_t elements) {
    return panels_of<T>(elements) * kPanel<T>;
}

template <class T, class W = T>
struct Tap {
    const T* a;  // A_t[r, k] = a[r * row_stride + k * k_stride]
    int64_t row_stride;
    int64_t k_stride;
    int64_t k;   // K_t, may be 0
    const W* b;  // B_t[0, 0]
};

template <class T, class W = T>
struct TapGemm {
    const Tap<T, W>* taps;
    int64_t num_taps;
    int64_t b_panel_stride;
    int64_t b_k_stride;
    const T* init;            // null for zero; may be c itself
    int64_t init_row_stride;  // 0 broadcasts one row: a bias
    T* c;
    int64_t c_row_stride;
    int64_t rows;
    int64_t cols;  // B is read up to whole panels; init and c are touched only below cols
    // What will be read next, such as the weights of the next product: products of 4 and more rows fetch it into
    // the cache meanwhile.
    const void* next = nullptr;
    int64_t next_bytes = 0;
    int64_t second_line = 0;  // of FilterLines
    Signs signs = Signs::plus_plus;
};

}  // namespace fastgen

#define FASTGEN_DECLARE_TAP_GEMM(ISA)                                                \
    namespace fastgen::ISA {                                                         \
    void tap_gemm(const TapGemm<float>& gemm);                                       \
    void tap_gemm(const TapGemm<float, BFloat16Pair>& gemm);                         \
    void tap_gemm(const TapGemm<float, ScaledInt8>& gemm);                           \
    void tap_gemm(const TapGemm<double>& gemm);                                      \
    void tap_gemm(const TapGemm<float, FilterLines<Combination::sum>>& gemm);        \
    void tap_gemm(const TapGemm<float, FilterLines<Combination::difference>>& gemm); \
    void tap_gemm(const TapGemm<float, FilterLines<Combination::all_four>>& gemm);   \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_TAP_GEMM(FASTGEN_ISA)
#endif

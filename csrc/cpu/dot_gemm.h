// The matrix product of bfloat16 convolutions, on the processor's dot products of pairs where it has them:
//
//     C[r, j] = sum over taps t, k < K_t of  A_t[r, k] * B_t[k, j]        r < rows, j < 16 * panels
//
// A tap is a strided view of the left operand, whose k are neighbours, and the slice of the right operand that goes with it.
// Words hold two consecutive k, the even one in the low half; every K_t is even. The right operand is packed in panels of
// 16 columns:
//
//     word of B_t[k, j] = b[j / 16 * b_panel_stride + k / 2 * 16 + j % 16]
//
// Contract: an element is one chain from zero in float32, tap by tap and word by word, of the word's odd k first, then the
// even; each product is exact, each sum is rounded once. So the bits do not depend on rows, columns or the element's place
// and are the same on all instruction sets with a fused multiply-add, but for denormal numbers: AVX512-BF16 takes them for
// zero.
#pragma once

#include <cstdint>

namespace fastgen {

// A float without its lower 16 bits.
struct BFloat16 {
    uint16_t bits;
};

struct DotTap {
    const BFloat16* a;  // A_t[r, k] = a[r * row_stride + k]
    int64_t row_stride;
    int64_t k;
    const BFloat16* b;  // two to a word
};

struct DotGemm {
    const DotTap* taps;
    int64_t num_taps;
    int64_t b_panel_stride;  // in words
    float* c;
    int64_t c_row_stride;
    int64_t rows;
    int64_t panels;
    const BFloat16* next = nullptr;  // as many panels that will be read next: they are fetched meanwhile
};

}  // namespace fastgen

#define FASTGEN_DECLARE_DOT_GEMM(ISA)   \
    namespace fastgen::ISA {            \
    void dot_gemm(const DotGemm& gemm); \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_DOT_GEMM(FASTGEN_ISA)
#endif

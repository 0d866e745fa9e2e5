// The one matrix product of the library:
//
//     C[r, j] = init[r, j] + sum over taps t, k < K_t of  A_t[r, k] * B_t[k, j]        r < rows, j < cols
//
// A tap is a strided view of the left operand (a shifted read of a feature map) and the slice of the right operand that goes with
// it.  The right operand is kept in panels of 64 bytes of columns (16 floats, 8 doubles):  B_t[k, j] = b[(j / 16) *
// b_panel_stride + k * b_k_stride + j % 16].  Packed weights have b_k_stride 16 and b_panel_stride K_total * 16; rows of a plain
// matrix, padded to whole panels, are read in place with b_k_stride = row length and b_panel_stride 16.
//
// Contract: every element of C is one chain of fused multiply-adds in the order of (t, k), starting from init.  Its bits do not
// depend on rows, cols, the position in the tile, tile shapes or threads, and are the same on AVX2 and AVX-512.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vec.h"

namespace fastgen::FASTGEN_ISA {

template <class T>
inline constexpr int kPanel = 64 / static_cast<int>(sizeof(T));

template <class T>
struct Tap {
    const T* a;          // A_t[r, k] = a[r * row_stride + k * k_stride]
    int64_t row_stride;
    int64_t k_stride;
    int64_t k;           // K_t, may be 0
    const T* b;          // B_t[0, 0]
};

template <class T>
struct TapGemm {
    const Tap<T>* taps;
    int num_taps;
    int64_t b_panel_stride;
    int64_t b_k_stride;
    const T* init;            // null for zero; may be c itself
    int64_t init_row_stride;  // 0 broadcasts one row: a bias
    T* c;
    int64_t c_row_stride;
    int64_t rows;
    int64_t cols;  // B and its last panel are readable up to a whole panel; init and c are touched only below cols
};

template <class T>
void tap_gemm(const TapGemm<T>& gemm);

extern template void tap_gemm(const TapGemm<float>&);
extern template void tap_gemm(const TapGemm<double>&);

inline constexpr int64_t panels_of(int64_t cols, int panel) { return (cols + panel - 1) / panel; }

// Packs the row-major matrix [k, cols] (rows row_stride apart) into panels; zeros fill the last panel.  dst holds
// panels_of(cols) * panel_stride elements, rows k0 and up of the K_total = panel_stride / kPanel rows of every panel are written.
template <class T>
inline void pack_panels(const T* src, int64_t row_stride, int64_t k, int64_t cols, T* dst, int64_t panel_stride) {
    constexpr int panel = kPanel<T>;
    for (int64_t j = 0; j < cols; j += panel, dst += panel_stride) {
        const int64_t n = cols - j < panel ? cols - j : panel;
        for (int64_t i = 0; i < k; ++i) {
            for (int64_t c = 0; c < panel; ++c) dst[i * panel + c] = c < n ? src[i * row_stride + j + c] : T(0);
        }
    }
}

}  // namespace fastgen::FASTGEN_ISA

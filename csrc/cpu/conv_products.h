// What the convolutions of phase_conv.h and overlap_add.h share: products of either kind of elements, and vectors of them.
#pragma once

#include "bfloat16.h"
#include "dot_gemm.h"
#include "integers.h"
#include "tap_conv.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {

// Cache lines, in T, for `count` elements X.
template <class T, class X>
FASTGEN_INLINE int64_t lines_for(int64_t count) {
    return ceil_div(count * static_cast<int64_t>(sizeof(X)), 64) * kPanel<T>;
}

template <class X>
inline constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(X));

// Vectors of so many elements that lie one after the other: they start on cache lines and not a power of two apart, which
// would put them all into one cache set.
template <class X>
FASTGEN_INLINE int64_t odd_lines(int64_t elements) {
    const int64_t lines = ceil_div(elements, kLine<X>);
    return (lines + (lines % 2 == 0)) * kLine<X>;
}

template <class E>
struct Products {
    using Term = Tap<E>;

    static FASTGEN_INLINE Term term(const E* a, int64_t row_stride, int64_t k, const E* b) {
        return {a, row_stride, 1, k, b};
    }
    static FASTGEN_INLINE void run(const Term* terms, int64_t count, int64_t panel_stride, E* c, int64_t c_stride,
                                   int64_t rows, int64_t panels, const E* next) {
        tap_gemm({terms, count, panel_stride, kPanel<E>, nullptr, 0, c, c_stride, rows, panels * kPanel<E>, next,
                  next ? panels * panel_stride * static_cast<int64_t>(sizeof(E)) : 0});
    }
    // Of the weights of a panel: input channel c, column j.
    static FASTGEN_INLINE int64_t weight_at(int64_t c, int64_t j) { return c * kPanel<E> + j; }
    static FASTGEN_INLINE E rounded(double x) { return static_cast<E>(x); }
};

template <>
struct Products<BFloat16> {
    using E = BFloat16;
    using Term = DotTap;

    static FASTGEN_INLINE Term term(const E* a, int64_t row_stride, int64_t k, const E* b) {
        return {a, row_stride, k, b};
    }
    static FASTGEN_INLINE void run(const Term* terms, int64_t count, int64_t panel_stride, float* c, int64_t c_stride,
                                   int64_t rows, int64_t panels, const E* next) {
        dot_gemm({terms, count, panel_stride / 2, c, c_stride, rows, panels, next});
    }
    static FASTGEN_INLINE int64_t weight_at(int64_t c, int64_t j) { return (c / 2 * kPanel<float> + j) * 2 + c % 2; }
    static FASTGEN_INLINE E rounded(double x) { return round_to_bfloat16(x); }
};

}  // namespace fastgen::FASTGEN_ISA

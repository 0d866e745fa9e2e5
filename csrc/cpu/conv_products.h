// What the convolutions of tap_conv.cpp and overlap_add.h share: products of either kind of elements, and vectors of them.
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

template <class E>
FASTGEN_INLINE Vec<SumOf<E>> load_lanes(const E* p, int lanes) {
    return lanes == kLanes<SumOf<E>> ? load(p) : load_n(p, lanes);
}

template <class E>
FASTGEN_INLINE void store_lanes(E* p, Vec<SumOf<E>> x, int lanes) {
    if (lanes == kLanes<SumOf<E>>)
        store(p, x);
    else
        store_n(p, x, lanes);
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
    static FASTGEN_INLINE double value(E x) { return x; }
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
    static FASTGEN_INLINE double value(E x) { return to_float(x); }
};

// The points of minimal filtering by two taps, as sums of filter elements that a product makes itself: they lie in lines
// of a panel g00, g01, g10, g11 of each k. Point 4 y + x is (g00 +x g01) +y (g10 +x g11), where +0 takes the first, +1 the
// sum, +2 the difference, +3 the second.
inline constexpr int64_t kFilterLines = 4;

FASTGEN_INLINE int64_t filter_line_at(int64_t k, int64_t element, int64_t column) {
    return (k * kFilterLines + element) * kPanel<float> + column;
}

FASTGEN_INLINE void run_point(int point, const float* a, int64_t row_stride, int64_t k, const float* b, float* c,
                              int64_t c_stride, int64_t rows, int64_t panels, const float* next,
                              int64_t next_elements) {
    constexpr int64_t line = kPanel<float>, step = kFilterLines * line;
    const int y = point / 4, x = point % 4;
    const bool pair_y = y == 1 || y == 2, pair_x = x == 1 || x == 2;
    const auto run = [&](auto weights) __attribute__((always_inline)) {
        using W = decltype(weights);
        const Tap<float, W> term{a, row_stride, 1, k,
                                 reinterpret_cast<const W*>(b + ((y == 3 ? 2 : 0) + (x == 3 ? 1 : 0)) * line)};
        tap_gemm({&term, 1, k * step, step, nullptr, 0, c, c_stride, rows, panels * line, next,
                  next_elements * static_cast<int64_t>(sizeof(float)), (pair_x ? 1 : 2) * line,
                  y == 1 ? (x == 1 ? Signs::plus_plus : Signs::plus_minus)
                         : (x == 1 ? Signs::minus_plus : Signs::minus_minus)});
    };
    if (pair_y && pair_x) return run(FilterLines<Combination::all_four>{});
    if (!pair_y && !pair_x) return run(0.0f);
    if ((pair_y ? y : x) == 1) return run(FilterLines<Combination::sum>{});
    run(FilterLines<Combination::difference>{});
}

}  // namespace fastgen::FASTGEN_ISA

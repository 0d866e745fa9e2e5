// Minimal filtering: m neighbouring outputs of an r-tap filter from m + r - 1 products instead of m r.
//
// S. Winograd, "Arithmetic Complexity of Computations", SIAM 1980, chapter V; A. Lavin and S. Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016, section 4.1. y_j = sum_t d_{j+t} g_t is a combination of products of one
// number made of the d and one made of the g each. Here they belong to the points 0, 1, -1 and infinity:
//
//     of the filter           r = 2:  g0, g0 + g1, g0 - g1, g1
//                             r = 3:  g0, g0 + g1 + g2, g0 - g1 + g2, g2
//     of the input            full tile, four inputs:   d0 - d2, d1 + d2, d2 - d1, d3 - d1
//                             short tile, three inputs: d0 - d1, 2 d1,    -,       d2 - d1
//
// from which come 2 y_j: without halves the points of r = 2 are sums that a product can make of its weights as it goes.
// A full tile has m = 5 - r outputs; a short one (r = 2 alone) has two and does without the point -1. So tiles of three
// and of two outputs share their weights, and a line of any length is cut without waste. In two dimensions rows and
// columns are transformed in turn: 16 products of a full tile stand for 36 (r = 2 or 3), the 9 of a short one for 16.
//
// Larger tiles need further points, whose powers cost accuracy: with the point 2 the error of float32 is 3 to 5 times that
// of the plain sum, with the four points above 0.9 to 1.6 times.
#pragma once

#include <cstdint>

#include "phase_plan.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {

// Tiles in two dimensions are of four kinds, by the axes (y, x) along which they are full; in an order in which those that
// have a point are neighbours.
constexpr int kTileKinds = 4;
constexpr bool is_full(int axis, int kind) { return axis == 0 ? kind < 2 : kind == 1 || kind == 2; }

template <class V>
FASTGEN_INLINE void filter_points(int64_t taps, const V* g, int64_t stride, V* out, int64_t out_stride) {
    const V first = g[0], last = g[(taps - 1) * stride];
    const V even = taps == 3 ? first + last : first, odd = g[stride];
    out[0] = first;
    out[out_stride] = even + odd;
    out[2 * out_stride] = even - odd;
    out[3 * out_stride] = last;
}

// From three or four inputs to as many points, in place.
template <bool Full, class V>
FASTGEN_INLINE void input_points(V* d, int64_t stride) {
    const V d0 = d[0], d1 = d[stride], d2 = d[2 * stride];
    if constexpr (Full) {
        d[0] = d0 - d2;
        d[stride] = d1 + d2;
        d[2 * stride] = d2 - d1;
        d[3 * stride] -= d1;
    } else {
        d[0] = d0 - d1;
        d[stride] = d1 + d1;
        d[3 * stride] = d2 - d1;
    }
}

// From products to twice the outputs, in place. `two`: a vector of twos.
template <bool Full, int Taps, class V>
FASTGEN_INLINE void outputs_of_points(V* m, int64_t stride, V two) {
    const V m0 = m[0], m1 = m[stride], m3 = m[3 * stride];
    if constexpr (!Full) {
        m[0] = fma(two, m0, m1);
        m[stride] = fma(two, m3, m1);
    } else {
        const V m2 = m[2 * stride], sum = m1 + m2, difference = m1 - m2;
        m[0] = fma(two, m0, sum);
        m[stride] = Taps == 2 ? difference : fma(two, m3, difference);
        if constexpr (Taps == 2) m[2 * stride] = fma(two, m3, sum);
    }
}

inline constexpr int64_t kFilterLines = 4;  // of two by two taps

FASTGEN_INLINE int64_t filter_line_at(int64_t k, int64_t element, int64_t column) {
    return (k * kFilterLines + element) * kPanel<float> + column;
}

// A product with point y * kPoints + x of two by two taps, which it sums from the filter elements itself: for each k they
// are lines g00, g01, g10, g11 of a panel. `next_elements` from `next` on are fetched meanwhile.
FASTGEN_INLINE void run_point(int point, const float* a, int64_t row_stride, int64_t k, const float* b, float* c,
                              int64_t c_stride, int64_t rows, int64_t panels, const float* next,
                              int64_t next_elements) {
    constexpr int64_t line = kPanel<float>, step = kFilterLines * line;
    const int y = point / kPoints, x = point % kPoints;
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

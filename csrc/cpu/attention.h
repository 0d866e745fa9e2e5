// Attention of one query, for the plan executor: softmax of its products with keys, times values.
//
// Included by sources that are compiled once per instruction set. Keys and values lie where the plan's planes have
// them, their channels contiguous, one position after the other. Sums run in one order, whatever lies beside.
#pragma once

#include <cstdint>
#include <utility>

#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {

// Positions of a plane in raster order, for one sample, from some channel on.
struct Positions {
    const float* first;
    int64_t columns;  // of a row
    int64_t stride, row_stride;
    const float* at(int64_t position) const {
        return first + position / columns * row_stride + position % columns * stride;
    }
};

// f(pointer, index of the position from `begin` on, count) for runs of positions that lie `stride` apart.
template <class F>
FASTGEN_INLINE void for_runs(const Positions& positions, int64_t begin, int64_t end, F f) {
    for (int64_t s = begin; s < end;) {
        const int64_t left = positions.columns - s % positions.columns;
        const int64_t count = left < end - s ? left : end - s;
        f(positions.at(s), s - begin, count);
        s += count;
    }
}

template <int kOdd, int... kIndex>
FASTGEN_INLINE Vec<float> every_second(Vec<float> a, Vec<float> b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (2 * kIndex + kOdd)...);
#else
    return __builtin_shuffle(a, b, Vec<int32_t>{(2 * kIndex + kOdd)...});
#endif
}

// Lane i is the sum of the lanes of v[i]; v is overwritten.
FASTGEN_INLINE Vec<float> totals(Vec<float>* v) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>{};
    for (int n = kLanes<float>; n > 1; n /= 2) {
        for (int i = 0; i < n / 2; ++i) {
            v[i] = every_second<0>(v[2 * i], v[2 * i + 1], lanes) + every_second<1>(v[2 * i], v[2 * i + 1], lanes);
        }
    }
    return v[0];
}

// scores[i] = scale * query . keys[begin + i] + bias[i], for `depth` channels; bias may be null. Whole vectors are
// written.
inline void attention_scores(const float* query, int64_t depth, const Positions& keys, int64_t begin, int64_t end,
                             float scale, const float* bias, float* scores) {
    constexpr int64_t kL = kLanes<float>;
    const int64_t whole = depth / kL * kL;
    const int rest = static_cast<int>(depth - whole);
    for_runs(keys, begin, end, [&](const float* key, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; i += kL) {
            const int64_t n = count - i < kL ? count - i : kL;
            Vec<float> sums[kL] = {};
            for (int64_t j = 0; j < n; ++j) {
                const float* k = key + (i + j) * keys.stride;
                Vec<float> sum{};
                for (int64_t c = 0; c < whole; c += kL) sum = fma(load(query + c), load(k + c), sum);
                if (rest) sum = fma(load_n(query + whole, rest), load_n(k + whole, rest), sum);
                sums[j] = sum;
            }
            Vec<float> result = totals(sums) * broadcast(scale);
            if (bias) result = result + load_n(bias + first + i, static_cast<int>(n));
            store(scores + first + i, result);
        }
    });
}

// scores[i] become exp(scores[i] - max); returns their sum, 0 where all are -inf. A vector past the last is written.
inline float attention_weights(float* scores, int64_t count) {
    constexpr int64_t kL = kLanes<float>;
    const Vec<float> none = broadcast(-__builtin_inff());
    store(scores + count, none);
    Vec<float> most = none;
    for (int64_t i = 0; i < count; i += kL) most = max(most, load(scores + i));
    float top = most[0];
    for (int i = 1; i < kL; ++i) top = most[i] > top ? most[i] : top;
    if (top == -__builtin_inff()) return 0.0f;
    Vec<float> total{};
    for (int64_t i = 0; i < count; i += kL) {
        const Vec<float> e = exp(load(scores + i) - broadcast(top));
        store(scores + i, e);
        total = total + e;
    }
    float sum = 0.0f;
    for (int i = 0; i < kL; ++i) sum += total[i];
    return sum;
}

// to[c] = sum of weights[i] * values[begin + i][c], over `kVectors` vectors of channels, the last of `rest` lanes.
template <int kVectors>
FASTGEN_INLINE void attention_sum_of(const float* weights, const Positions& values, int64_t begin, int64_t end,
                                     float factor, int rest, float* to) {
    constexpr int kL = kLanes<float>, kParts = kVectors > 2 ? 2 : 4;  // sums at a time: one would wait for itself
    Vec<float> sums[kParts][kVectors] = {};
    for_runs(values, begin, end, [&](const float* value, int64_t first, int64_t count) {
        const auto add = [&](int64_t i, int part) {
            const float* v = value + i * values.stride;
            const Vec<float> weight = broadcast(weights[first + i]);
            for (int c = 0; c < kVectors - 1; ++c) sums[part][c] = fma(weight, load(v + c * kL), sums[part][c]);
            const Vec<float> last = load_n(v + (kVectors - 1) * kL, rest);
            sums[part][kVectors - 1] = fma(weight, last, sums[part][kVectors - 1]);
        };
        int64_t i = 0;
        for (; i + kParts <= count; i += kParts) {
            for (int part = 0; part < kParts; ++part) add(i + part, part);
        }
        for (; i < count; ++i) add(i, 0);
    });
    for (int c = 0; c < kVectors; ++c) {
        Vec<float> sum = sums[0][c] + sums[1][c];
        if (kParts > 2) sum = sum + (sums[2][c] + sums[3][c]);
        store_n(to + c * kL, sum * broadcast(factor), c < kVectors - 1 ? kL : rest);
    }
}

inline void attention_sum(const float* weights, const Positions& values, int64_t begin, int64_t end, float factor,
                          int64_t channels, float* to) {
    constexpr int64_t kL = kLanes<float>;
    for (int64_t c = 0; c < channels;) {
        Positions here = values;
        here.first += c;
        const int64_t left = channels - c;
        const int64_t vectors = left > 3 * kL ? 4 : left > kL ? 2 : 1;
        const int64_t most = vectors * kL, count = left < most ? left : most;
        const int rest = static_cast<int>(count - (vectors - 1) * kL);
        if (vectors == 4) {
            attention_sum_of<4>(weights, here, begin, end, factor, rest, to + c);
        } else if (vectors == 2) {
            attention_sum_of<2>(weights, here, begin, end, factor, rest, to + c);
        } else {
            attention_sum_of<1>(weights, here, begin, end, factor, rest, to + c);
        }
        c += count;
    }
}

}  // namespace fastgen::FASTGEN_ISA

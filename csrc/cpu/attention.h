// Attention of one query, for the plan executor: softmax of its products with keys, times values, for some heads.
//
// Included by sources that are compiled once per instruction set. Keys and values lie where the plan's planes have
// them: the heads of a position side by side, the positions far apart. So all heads of a position are read at once.
// Sums run in one order, whatever heads come together.
#pragma once

#include <cstdint>
#include <utility>

#include "plan_executor.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {

constexpr int kPositions = 4;  // whose values are added at a time
// How many floats ahead keys and values are fetched: positions lie so far apart that the processor's prefetchers, which
// stay within a page, never get going.
constexpr int64_t kFloatsAhead = 2048;

// In positions of which so many floats are read; none where scores are biases alone.
inline int64_t positions_ahead(int64_t floats) { return floats > 0 ? (kFloatsAhead - 1) / floats + 1 : 0; }

FASTGEN_INLINE void fetch(const float* first, int64_t floats) {
    for (int64_t c = 0; c < floats; c += 16) __builtin_prefetch(first + c, 0, 3);
}

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

// Lane i is the sum of the lanes of v[i]; v is overwritten.
FASTGEN_INLINE Vec<float> totals(Vec<float>* v) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>{};
    for (int n = kLanes<float>; n > 1; n /= 2) {
        for (int i = 0; i < n / 2; ++i) {
            const Vec<float> a = v[2 * i], b = v[2 * i + 1];
            v[i] = every_second<float, 0>(a, b, lanes) + every_second<float, 1>(a, b, lanes);
        }
    }
    return v[0];
}

// scores[h * pitch + i] = capped(scale * query . keys[begin + i]) + bias[h * bias_stride + i] + added[begin + i], of heads
// that are `depth` channels each; capped(x) is x where the cap is 0, else cap * tanh(x / cap); bias and where `added`
// begins may be null. Whole vectors are written.
inline void attention_scores(const float* query, int heads, int64_t depth, const Positions& keys, int64_t begin,
                             int64_t end, float scale, float cap, const float* bias, int64_t bias_stride,
                             const Positions& added, float* scores, int64_t pitch) {
    constexpr int64_t kL = kLanes<float>;
    const int64_t whole = depth / kL * kL;
    const int rest = static_cast<int>(depth - whole);
    const int64_t ahead = positions_ahead(heads * depth) * keys.stride;
    for_runs(keys, begin, end, [&](const float* key, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; i += kL) {
            const int64_t n = count - i < kL ? count - i : kL;
            Vec<float> products[kPlanHeads][kL];  // of each head and position, to be summed over their lanes
            for (int64_t j = 0; j < n; ++j) {
                const float* k = key + (i + j) * keys.stride;
                fetch(k + ahead, heads * depth);
                const float* q = query;
                for (int h = 0; h < heads; ++h, k += depth, q += depth) {
                    Vec<float> sum{};
                    for (int64_t c = 0; c < whole; c += kL) sum = fma(load(q + c), load(k + c), sum);
                    if (rest) sum = fma(load_n(q + whole, rest), load_n(k + whole, rest), sum);
                    products[h][j] = sum;
                }
            }
            float of_key[kL] = {};
            if (added.first) {
                const float* a = added.at(begin + first + i);
                for (int64_t j = 0; j < n; ++j) of_key[j] = a[j * added.stride];
            }
            for (int h = 0; h < heads; ++h) {
                for (int64_t j = n; j < kL; ++j) products[h][j] = Vec<float>{};
                Vec<float> result = totals(products[h]) * broadcast(scale);
                if (cap != 0.0f) result = tanh(result / broadcast(cap)) * broadcast(cap);
                if (bias) result = result + load_n(bias + h * bias_stride + first + i, static_cast<int>(n));
                store(scores + h * pitch + first + i, result + load(of_key));
            }
        }
    });
}

// scores[i] become exp(scores[i] - max), for `count` of them; returns the inverse of their sum, 0 where all are -inf.
// A vector past the last is written.
inline float attention_weights(float* scores, int64_t count) {
    constexpr int64_t kL = kLanes<float>;
    const Vec<float> none = broadcast(-__builtin_inff());
    store(scores + count, none);
    Vec<float> most = none;
    for (int64_t i = 0; i < count; i += kL) most = max(most, load(scores + i));
    float top = most[0];
    for (int i = 1; i < kL; ++i) top = top < most[i] ? most[i] : top;
    if (top == -__builtin_inff()) top = 0.0f;
    Vec<float> total{};
    for (int64_t i = 0; i < count; i += kL) {
        const Vec<float> e = exp(load(scores + i) - broadcast(top));
        store(scores + i, e);
        total = total + e;
    }
    float sum = 0.0f;
    for (int i = 0; i < kL; ++i) sum += total[i];
    return sum == 0.0f ? 0.0f : 1.0f / sum;
}

// to[c] += sum of weights[h * pitch + i] * values[i * stride + c] over kCount positions, h being the head of channel c.
// The channels are [first, end) of heads of `width` channels, and values and to begin with the first.
template <int kCount>
FASTGEN_INLINE void attention_add(const float* weights, int64_t pitch, const float* values, int64_t stride,
                                  int64_t width, int64_t first, int64_t end, float* to) {
    constexpr int64_t kL = kLanes<float>;
    for (int64_t channel = first; channel < end; weights += pitch) {
        const int64_t left = width - channel % width, count = left < end - channel ? left : end - channel;
        Vec<float> weight[kCount];
        for (int i = 0; i < kCount; ++i) weight[i] = broadcast(weights[i]);
        const float* v = values + (channel - first);
        float* sums = to + (channel - first);
        int64_t c = 0;
        for (; c + kL <= count; c += kL) {
            Vec<float> sum = load(sums + c);
            for (int i = 0; i < kCount; ++i) sum = fma(weight[i], load(v + i * stride + c), sum);
            store(sums + c, sum);
        }
        if (c < count) {
            const int rest = static_cast<int>(count - c);
            Vec<float> sum = load_n(sums + c, rest);
            for (int i = 0; i < kCount; ++i) sum = fma(weight[i], load_n(v + i * stride + c, rest), sum);
            store_n(sums + c, sum, rest);
        }
        channel += count;
    }
}

// The same for positions [begin, end) of the values; weights are those from `begin` on. `to` begins as zeros.
inline void attention_sum(const float* weights, int64_t pitch, const Positions& values, int64_t begin, int64_t end,
                          int64_t width, int64_t first, int64_t end_channel, float* to) {
    for (int64_t c = first; c < end_channel; ++c) to[c - first] = 0.0f;
    const int64_t channels = end_channel - first, ahead = positions_ahead(channels) * values.stride;
    for_runs(values, begin, end, [&](const float* value, int64_t at, int64_t count) {
        int64_t i = 0;
        for (; i + kPositions <= count; i += kPositions) {
            for (int p = 0; p < kPositions; ++p) {
                fetch(value + (i + p) * values.stride + ahead, channels);
            }
            attention_add<kPositions>(weights + at + i, pitch, value + i * values.stride, values.stride, width, first,
                                      end_channel, to);
        }
        for (; i < count; ++i) {
            attention_add<1>(weights + at + i, pitch, value + i * values.stride, values.stride, width, first,
                             end_channel, to);
        }
    });
}

}  // namespace fastgen::FASTGEN_ISA

// Tiles of logistic_mixture_nll.cpp: vectors of pixels, with their parameters as [parameter][pixel], whatever the layout of
// the tensors.
#pragma once

#include <utility>

#include "logistic_mixture_nll.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {

// The pixels of one tile in raster order. Lanes beyond the last pixel repeat it: they are read, but not written.
template <class T>
struct PixelTile {
    enum Step : uint8_t { kStay, kRight, kNextRow, kNextImage };

    int64_t height, width;
    int64_t n, h, w;  // the first pixel
    int count;
    bool in_row;
    Step steps[kLanes<T>];  // from each pixel to the next, unless all are in a row

    PixelTile(const LogisticMixtureNll& job, int64_t first) : height(job.height), width(job.width) {
        const int64_t row = first / width, left = job.batch * height * width - first;
        n = row / height;
        h = row - n * height;
        w = first - row * width;
        count = left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
        in_row = count == kLanes<T> && w + count <= width;
        if (in_row) return;
        int64_t x = w, y = h;
        for (int i = 0; i < kLanes<T>; ++i) {
            steps[i] = i + 1 >= count ? kStay : kRight;
            if (++x < width || steps[i] == kStay) continue;
            x = 0;
            steps[i] = ++y < height ? kNextRow : kNextImage;
            if (y == height) y = 0;
        }
    }
};

// Where the pixels of a tile are in a tensor.
template <class T, class U>
struct Pixels {
    U* at[kLanes<T>];  // channel 0 of each pixel
    int64_t stride;    // between channels
    bool adjacent;     // whether the pixels are neighbours in memory

    Pixels(const PixelTile<T>& tile, const PixelTensor<U>& tensor) : stride(tensor.c), adjacent(true) {
        const int64_t row = tensor.h - (tile.width - 1) * tensor.w;
        const int64_t deltas[] = {0, tensor.w, row, row + tensor.n - tile.height * tensor.h};
        U* p = tensor.data + tile.n * tensor.n + tile.h * tensor.h + tile.w * tensor.w;
        if (tile.in_row) {
            for (int i = 0; i < kLanes<T>; ++i) at[i] = p + i * tensor.w;
            adjacent = tensor.w == 1;
            return;
        }
        for (int i = 0; i < kLanes<T>; ++i) {
            at[i] = p;
            const int64_t delta = deltas[tile.steps[i]];
            adjacent = adjacent && (delta == 1 || i + 1 == kLanes<T>);
            p += delta;
        }
    }
};

// Brings to the cache, bit by bit, what the tile after this one will need; the processor does not foresee it, because
// tiles are read and written in bursts.
struct PixelsAhead {
    const char* at;
    int64_t step;

    template <class T, class U>
    explicit PixelsAhead(const Pixels<T, U>& tile)
        : at(reinterpret_cast<const char*>(tile.at[0] + kLanes<T> * (tile.at[1] - tile.at[0]))),
          step(tile.stride == 1 ? kVecBytes : tile.stride * static_cast<int64_t>(sizeof(U))) {}

    // `count` parameters, `distance` apart, to the second-level cache: in the first one, channels displace each other.
    FASTGEN_INLINE void fetch(int64_t param, int64_t distance, int count) const {
        const char* p = at + param * step;
#pragma GCC unroll 10
        for (int i = 0; i < count; ++i, p += distance * step) __builtin_prefetch(p, 0, 2);
    }
};

template <class T>
FASTGEN_INLINE Vec<T> gather(const Pixels<T, const T>& pixels) {
    if (pixels.adjacent) return load(pixels.at[0]);
    T values[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) values[i] = *pixels.at[i];
    return load(values);
}

template <class T>
struct LevelsOf {
    typedef uint8_t type __attribute__((vector_size(kLanes<T>)));
    typedef int32_t integers __attribute__((vector_size(kLanes<T> * 4)));
};

template <class T>
FASTGEN_INLINE Vec<T> gather_levels(const Pixels<T, const uint8_t>& pixels, int channel) {
    typename LevelsOf<T>::type levels;
    if (pixels.adjacent) {
        __builtin_memcpy(&levels, pixels.at[0] + channel * pixels.stride, sizeof levels);
    } else {
        for (int i = 0; i < kLanes<T>; ++i) levels[i] = pixels.at[i][channel * pixels.stride];
    }
    return __builtin_convertvector(__builtin_convertvector(levels, typename LevelsOf<T>::integers), Vec<T>);
}

// Rows to columns: interleaves the first half of the rows with the second, log2(kLanes) times.
template <class T>
FASTGEN_INLINE void transpose(Vec<T>* rows) {
    constexpr int lanes = kLanes<T>;
    constexpr std::make_integer_sequence<int, lanes> each{};
#pragma GCC unroll 4
    for (int size = 1; size < lanes; size *= 2) {
        Vec<T> next[lanes];
#pragma GCC unroll 8
        for (int i = 0; i < lanes / 2; ++i) {
            next[2 * i] = lower_halves<T>(rows[i], rows[i + lanes / 2], each);
            next[2 * i + 1] = upper_halves<T>(rows[i], rows[i + lanes / 2], each);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = next[i];
    }
}

template <class T>
void load_dense_pixels(const T* const* from, int64_t params, T* to) {
    constexpr int lanes = kLanes<T>;
    Vec<T> rows[lanes];
    int64_t p = 0;
    for (; p + lanes <= params; p += lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = load(from[i] + p);
        transpose<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(to + (p + i) * lanes, rows[i]);
    }
    const int left = static_cast<int>(params - p);
    if (left == 0) return;
    for (int i = 0; i < lanes; ++i) rows[i] = load_n(from[i] + p, left);
    transpose<T>(rows);
    for (int i = 0; i < left; ++i) store(to + (p + i) * lanes, rows[i]);
}

template <class T>
void store_dense_pixels(const T* from, int64_t params, int count, T* const* to) {
    constexpr int lanes = kLanes<T>;
    Vec<T> rows[lanes];
    int64_t p = 0;
    for (; p + lanes <= params; p += lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = load(from + (p + i) * lanes);
        transpose<T>(rows);
        for (int i = 0; i < count; ++i) store(to[i] + p, rows[i]);
    }
    const int left = static_cast<int>(params - p);
    if (left == 0) return;
    for (int i = 0; i < lanes; ++i) rows[i] = i < left ? load(from + (p + i) * lanes) : Vec<T>{};
    transpose<T>(rows);
    for (int i = 0; i < count; ++i) store_n(to[i] + p, rows[i], left);
}

template <class T>
void load_tile(const Pixels<T, const T>& from, int64_t params, T* to) {
    constexpr int lanes = kLanes<T>;
    if (from.adjacent) {
        for (int64_t p = 0; p < params; ++p) store(to + p * lanes, load(from.at[0] + p * from.stride));
        return;
    }
    if (from.stride == 1) return load_dense_pixels(from.at, params, to);
    for (int64_t p = 0; p < params; ++p) {
        for (int i = 0; i < lanes; ++i) to[p * lanes + i] = from.at[i][p * from.stride];
    }
}

template <class T>
void store_tile(const T* from, int64_t params, int count, const Pixels<T, T>& to) {
    constexpr int lanes = kLanes<T>;
    if (to.adjacent) {
        for (int64_t p = 0; p < params; ++p) store(to.at[0] + p * to.stride, load(from + p * lanes));
        return;
    }
    if (to.stride == 1) return store_dense_pixels(from, params, count, to.at);
    for (int64_t p = 0; p < params; ++p) {
        for (int i = 0; i < count; ++i) to.at[i][p * to.stride] = from[p * lanes + i];
    }
}

}  // namespace fastgen::FASTGEN_ISA

// Images of any strides, and their rows copied to channels-last memory.
#pragma once

#include <cstdint>

namespace fastgen {

// A tensor [N, C, H, W]: its first element and the element strides of the dimensions.
template <class T>
struct Image {
    const T* data;
    int64_t n, c, h, w;
};

}  // namespace fastgen

#ifdef FASTGEN_ISA
#include "vec.h"

namespace fastgen::FASTGEN_ISA {

template <class T>
FASTGEN_INLINE void transpose_4x4(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    for (int64_t i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < 4; ++j) to[i * to_stride + j] = from[j * from_stride + i];
    }
}

#if defined(__x86_64__)
FASTGEN_INLINE void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m128 r0 = _mm_loadu_ps(from), r1 = _mm_loadu_ps(from + from_stride);
    __m128 r2 = _mm_loadu_ps(from + 2 * from_stride), r3 = _mm_loadu_ps(from + 3 * from_stride);
    _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
    _mm_storeu_ps(to, r0);
    _mm_storeu_ps(to + to_stride, r1);
    _mm_storeu_ps(to + 2 * to_stride, r2);
    _mm_storeu_ps(to + 3 * to_stride, r3);
}
#elif defined(__aarch64__)
FASTGEN_INLINE void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    const float32x4_t r0 = vld1q_f32(from), r1 = vld1q_f32(from + from_stride);
    const float32x4_t r2 = vld1q_f32(from + 2 * from_stride), r3 = vld1q_f32(from + 3 * from_stride);
    const float32x4_t low02 = vzip1q_f32(r0, r2), low13 = vzip1q_f32(r1, r3);
    const float32x4_t high02 = vzip2q_f32(r0, r2), high13 = vzip2q_f32(r1, r3);
    vst1q_f32(to, vzip1q_f32(low02, low13));
    vst1q_f32(to + to_stride, vzip2q_f32(low02, low13));
    vst1q_f32(to + 2 * to_stride, vzip1q_f32(high02, high13));
    vst1q_f32(to + 3 * to_stride, vzip2q_f32(high02, high13));
}
#endif

// Copies channels c0..c1-1 of row y of image n to `to`, positions `step` apart.
template <class T>
FASTGEN_INLINE void fetch(const Image<T>& image, int64_t n, int64_t y, int64_t c0, int64_t c1, int64_t width, T* to,
                          int64_t step) {
    const T* from = image.data + n * image.n + y * image.h + c0 * image.c;
    int64_t x = 0;
    if (image.w == 1 && c1 - c0 == 8) {
        for (; x + 4 <= width; x += 4) {
            transpose_4x4(from + x, image.c, to + x * step, step);
            transpose_4x4(from + 4 * image.c + x, image.c, to + x * step + 4, step);
        }
    }
    for (; x < width; ++x) {
        for (int64_t c = 0; c < c1 - c0; ++c) to[x * step + c] = from[x * image.w + c * image.c];
    }
}

template <class T>
FASTGEN_INLINE void copy(const T* from, int64_t count, T* to) {
    if constexpr (sizeof(T) < sizeof(float)) {
        __builtin_memcpy(to, from, count * sizeof(T));
        return;
    } else {
        int64_t i = 0;
        for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i));
#if defined(__AVX512F__)
        const int rest = static_cast<int>(count - i);
        if (rest > 0) store_n(to + i, load_n(from + i, rest), rest);
#else
        for (; i < count; ++i) to[i] = from[i];
#endif
    }
}

// A target of fetch_rows: lines from `first` on, one after the other, of positions with all their channels.
template <class T>
struct DenseLines {
    T* data;
    int64_t first, width, channels;
    FASTGEN_INLINE T* at(int64_t y, int64_t c) const { return data + (y - first) * width * channels + c; }
    FASTGEN_INLINE int64_t step() const { return channels; }
    FASTGEN_INLINE int64_t run() const { return channels; }
};

// Copies rows y0..y1-1 of image n to where they belong in `target`, which keeps `run` channels together.
template <class T, class Target>
void fetch_rows(const Image<T>& image, int64_t n, int64_t y0, int64_t y1, int64_t width, int64_t channels,
                const Target& target) {
    if (image.c != 1) {
        // Planes: eight channels at a time, all rows of them, so that a plane's cache lines are used up before they
        // leave the cache.
        for (int64_t c = 0; c < channels; c += 8) {
            const int64_t end = c + 8 < channels ? c + 8 : channels;
            for (int64_t y = y0; y < y1; ++y) fetch(image, n, y, c, end, width, target.at(y, c), target.step());
        }
        return;
    }
    for (int64_t y = y0; y < y1; ++y) {
        const T* from = image.data + n * image.n + y * image.h;
        if (target.run() == channels && target.step() == channels && image.w == channels) {
            __builtin_memcpy(target.at(y, 0), from, width * channels * sizeof(T));
            continue;
        }
        for (int64_t x = 0; x < width; ++x, from += image.w) {
            for (int64_t c = 0; c < channels; c += target.run()) {
                const int64_t run = target.run() < channels - c ? target.run() : channels - c;
                copy(from + c, run, target.at(y, c) + x * target.step());
            }
        }
    }
}

}  // namespace fastgen::FASTGEN_ISA
#endif

// Zeros between pixels, a small filter for all channels, and every so many of the results; see upfirdn2d.cpp.
#pragma once

#include <cstdint>

#include "image.h"

namespace fastgen {

// Of one axis: sizes, zeros put before the input (negative: what is cut off), pixels per input pixel and per output pixel.
struct FilterAxis {
    int64_t in_size, out_size, kernel, before, up, down;
};

template <class T>
struct UpFirDn2d {
    int64_t images, run;  // `run` channels lie side by side; planes are images of one
    FilterAxis y, x;
    int64_t threads;
    const T* input;   // dense [images][y.in_size][x.in_size][run]
    const T* filter;  // [y.kernel][x.kernel], as a correlation
    T* output;        // dense [images][y.out_size][x.out_size][run]
};

}  // namespace fastgen

#define FASTGEN_DECLARE_UPFIRDN2D(ISA)            \
    namespace fastgen::ISA {                      \
    void upfirdn2d(const UpFirDn2d<float>& job);  \
    void upfirdn2d(const UpFirDn2d<double>& job); \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_UPFIRDN2D(FASTGEN_ISA)
#endif

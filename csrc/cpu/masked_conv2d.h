// Masked convolution, forward and backward; the formulas are in masked_conv2d.cpp.
#pragma once

#include <cstdint>

#include "image.h"

namespace fastgen {

struct MaskedConv2d {
    int64_t batch, in_channels, out_channels, height, width;
    int64_t kernel_h, kernel_w;  // odd
    bool own_color;              // type B: the centre tap reads its own colour group
    int64_t colors, splits;      // splits divides out_channels
    int64_t threads;
};

// Elements of scratch that the functions below need.
struct MaskedConv2dScratch {
    int64_t forward, input_gradient, weight_gradient;
};

// The limit on kernel_h / 2 + splits.
inline constexpr int kMaskedConv2dMaxTaps = 128;

}  // namespace fastgen

// weight and its gradient are contiguous [Cout, Cin, kh, kw]; output and grad_input are dense [N, H, W, C]; bias and
// grad_bias may be null.
#define FASTGEN_DECLARE_MASKED_CONV2D_OF(T)                                                                          \
    MaskedConv2dScratch masked_conv2d_scratch(const MaskedConv2d& conv, const T*);                                   \
    void masked_conv2d_forward(const MaskedConv2d& conv, const Image<T>& input, const T* weight, const T* bias,      \
                               T* output, T* scratch);                                                               \
    void masked_conv2d_input_gradient(const MaskedConv2d& conv, const Image<T>& grad_output, const T* weight,        \
                                      T* grad_input, T* scratch);                                                    \
    void masked_conv2d_weight_gradient(const MaskedConv2d& conv, const Image<T>& input, const Image<T>& grad_output, \
                                       T* grad_weight, T* grad_bias, T* scratch);

#define FASTGEN_DECLARE_MASKED_CONV2D(ISA)   \
    namespace fastgen::ISA {                 \
    FASTGEN_DECLARE_MASKED_CONV2D_OF(float)  \
    FASTGEN_DECLARE_MASKED_CONV2D_OF(double) \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_MASKED_CONV2D(FASTGEN_ISA)
#endif

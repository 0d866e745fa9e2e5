// Convolutions of which a pixel's output sees no later row, forward and backward: masked ones, and those whose window
// ends with the pixel's own row. The formulas are in masked_conv2d.cpp and masked_conv2d_weight_gradient.cpp.
#pragma once

#include <cstdint>

#include "image.h"

namespace fastgen {

struct MaskedConv2d {
    int64_t batch, in_channels, out_channels, height, width;
    int64_t kernel_h, kernel_w;  // of the weight in memory; what follows says which of its taps are open
    int64_t above, left;         // the row and the column of the kernel that are the pixel's own
    int64_t own_taps;            // open ones in the pixel's own row: left + 1 of a mask, kernel_w of a window
    bool own_color;              // the last open tap reads its own colour group: type B of a mask, any window
    int64_t colors, splits;      // splits divides out_channels
    int64_t threads;
};

// The limit on above + splits.
inline constexpr int kMaskedConv2dMaxTaps = 128;

}  // namespace fastgen

// weight and its gradient are contiguous [Cout, Cin, kh, kw]; output and grad_input are dense [N, H, W, C]; bias and
// grad_bias may be null. The scratch sizes count elements of T.
#define FASTGEN_DECLARE_MASKED_CONV2D_OF(T)                                                                          \
    int64_t masked_conv2d_forward_scratch(const MaskedConv2d& conv, const T*);                                       \
    int64_t masked_conv2d_input_gradient_scratch(const MaskedConv2d& conv, const T*);                                \
    int64_t masked_conv2d_weight_gradient_scratch(const MaskedConv2d& conv, const T*);                               \
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

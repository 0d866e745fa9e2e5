// The gradient of the weights of convolutions and transposed convolutions; formula and ways are in
// conv_weight_gradient.cpp.
#pragma once

#include <cstdint>

#include "image.h"
#include "phase_plan.h"

namespace fastgen {

// As of a transposed convolution. Of an ordinary one, the gradient of its output takes the place of the input, and its
// input that of the gradient.
struct WeightGradientShape {
    int64_t batch, threads;
    int64_t groups, in_channels, out_channels;  // channels of one group
    int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];

    // Tiles of the input, where it is computed by minimal filtering.
    constexpr AxisTiles tiles(int axis) const { return {0, in_size[axis], kernel[axis] / stride[axis]}; }

    // Whether it is: where that takes less than the direct way, with as many sums as several positions have products.
    constexpr bool minimal() const {
        constexpr int64_t kLeastChannels = 32;  // from there on making the points costs less than it saves
        constexpr int64_t kLeastSize = 3;       // of sums over fewer pixels PyTorch's have half the error
        constexpr int64_t kLeastTiles = 64;
        const AxisTiles y = tiles(0), x = tiles(1);
        if (groups != 1 || y.taps != x.taps || (y.taps != 2 && y.taps != 3)) return false;
        for (int i = 0; i < 2; ++i) {
            if (dilation[i] != 1 || kernel[i] != tiles(i).taps * stride[i] || in_size[i] < kLeastSize) return false;
        }
        return in_channels >= kLeastChannels && out_channels >= kLeastChannels &&
               batch * y.count() * x.count() >= kLeastTiles &&
               5 * y.products() * x.products() <= 4 * y.taps * in_size[0] * x.taps * in_size[1];
    }
};

}  // namespace fastgen

// The scratch size counts elements of T; scratch starts on a cache line. Of both images channels are neighbours; behind
// that of the gradient is readable memory for one more cache line, unless a group's output channels are whole cache lines.
// The result is a contiguous [Cin, Cout / groups, kh, kw].
#define FASTGEN_DECLARE_CONV_WEIGHT_GRADIENT_OF(T)                                                           \
    int64_t conv_weight_gradient_scratch_size(const WeightGradientShape& shape, const T*);                   \
    void conv_weight_gradient(const WeightGradientShape& shape, const Image<T>& input, const Image<T>& grad, \
                              T* result, T* scratch);

#define FASTGEN_DECLARE_CONV_WEIGHT_GRADIENT(ISA)   \
    namespace fastgen::ISA {                        \
    FASTGEN_DECLARE_CONV_WEIGHT_GRADIENT_OF(float)  \
    FASTGEN_DECLARE_CONV_WEIGHT_GRADIENT_OF(double) \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_CONV_WEIGHT_GRADIENT(FASTGEN_ISA)
#endif

// BatchNorm and activation behind a convolution in training, forward and backward; the formulas are in channel_pass.cpp.
#pragma once

#include <cstdint>

#include "activations.h"
#include "image.h"

namespace fastgen {

// Passes over dense [positions][channels] arrays, with vectors of one value per channel.
template <class T>
struct ChannelPass {
    int64_t positions, channels, threads;
    const T* conv;
    const T* grad;  // of the output
    const T* scale;
    const T* shift;
    const T* mean;
    const T* inverse_std;
    Activation activation;
    T parameter;
};

}  // namespace fastgen

// Scratch sizes count elements of T; scratch starts on a cache line.
#define FASTGEN_DECLARE_CHANNEL_PASS_OF(T)                                                                          \
    int64_t channel_pass_scratch_size(const ChannelPass<T>& pass);                                                  \
    void channel_statistics(const ChannelPass<T>& pass, T* mean, T* var, T* scratch);                               \
    void channel_forward(const ChannelPass<T>& pass, T* output, T* scratch);                                        \
    void channel_reductions(const ChannelPass<T>& pass, T* grad_sum, T* grad_normalised_sum, T* scratch);           \
    void channel_backward(const ChannelPass<T>& pass, const T* grad_mean, const T* grad_normalised_mean, T* result, \
                          T* scratch);

#define FASTGEN_DECLARE_CHANNEL_PASS(ISA)   \
    namespace fastgen::ISA {                \
    FASTGEN_DECLARE_CHANNEL_PASS_OF(float)  \
    FASTGEN_DECLARE_CHANNEL_PASS_OF(double) \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_CHANNEL_PASS(FASTGEN_ISA)
#endif

// Scale, noise, bias and activation behind a convolution, in one pass; see scaled_act.cpp.
#pragma once

#include <cstdint>

#include "activations.h"
#include "image.h"

namespace fastgen {

template <class T>
struct ScaledAct {
    int64_t images, channels, positions;
    bool channels_last, one_scale, one_noise;  // where one is for all images
    int64_t threads;
    T* data;         // dense, in place
    const T* scale;  // [images or 1][channels]; like what follows it may be missing
    const T* noise;  // [images or 1][positions]
    const T* bias;   // [channels]
    Activation activation;
    T parameter, gain, limit;  // infinite where nothing is clamped
};

}  // namespace fastgen

#define FASTGEN_DECLARE_SCALED_ACT(ISA)            \
    namespace fastgen::ISA {                       \
    void scaled_act(const ScaledAct<float>& job);  \
    void scaled_act(const ScaledAct<double>& job); \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_SCALED_ACT(FASTGEN_ISA)
#endif

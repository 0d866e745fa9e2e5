// Normalisation by groups of channels with an activation; the formulas are in group_norm_act.cpp.
#pragma once

#include <cstdint>

#include "activations.h"
#include "image.h"
#include "tap_conv.h"

namespace fastgen {

template <class E>
struct GroupNormAct {
    int64_t batch, channels, height, width, groups;
    int64_t threads;
    Image<E> input;
    const E* weight;  // [channels] or null, as is bias
    const E* bias;
    double eps;
    Activation activation;
    SumOf<E> parameter;
    E* output;  // dense [batch][height][width][channels]
};

}  // namespace fastgen

// Scratch starts on a cache line; its size counts doubles and needs neither pointers nor strides.
#define FASTGEN_DECLARE_GROUP_NORM_ACT_OF(E)                         \
    int64_t group_norm_act_scratch_size(const GroupNormAct<E>& job); \
    void group_norm_act(const GroupNormAct<E>& job, double* scratch);

#define FASTGEN_DECLARE_GROUP_NORM_ACT(ISA)     \
    namespace fastgen::ISA {                    \
    FASTGEN_DECLARE_GROUP_NORM_ACT_OF(BFloat16) \
    FASTGEN_DECLARE_GROUP_NORM_ACT_OF(float)    \
    FASTGEN_DECLARE_GROUP_NORM_ACT_OF(double)   \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_GROUP_NORM_ACT(FASTGEN_ISA)
#endif

// Convolutions and transposed convolutions, by one of three kernels (phase_conv.h, overlap_add.h, depthwise_conv.h):
//
//     output[n, o, y, x] = activation( scale[o] * z + shift[o] ),    z = sum over taps, channels of  input * weight
#pragma once

#include <cstdint>
#include <type_traits>

#include "activations.h"
#include "dot_gemm.h"
#include "image.h"
#include "phase_plan.h"

namespace fastgen {

// What elements are summed in.
template <class E>
struct SumTraits {
    using type = E;
};
template <>
struct SumTraits<BFloat16> {
    using type = float;
};
template <class E>
using SumOf = typename SumTraits<E>::type;

template <class E>
inline constexpr ConvElement kConvElement{64 / static_cast<int64_t>(sizeof(SumOf<E>)), std::is_same_v<E, float>,
                                          std::is_same_v<E, SumOf<E>>};

// Weights of any layout, by element strides: the channels count within a group.
template <class T>
struct ConvWeight {
    const T* data;
    int64_t group, in_channel, out_channel, kernel_y, kernel_x;
};

template <class E>
struct TapConvCall {
    int64_t batch, threads;
    Image<E> input;
    const E* packed;
    const SumOf<E>* scale;  // [groups * out_channels], null for ones
    const SumOf<E>* shift;  // the same, null for zeros
    Activation activation;
    SumOf<E> parameter;  // of the activation
    E* output;           // dense [N, H, W, groups * out_channels]
};

}  // namespace fastgen

// tap_conv_packed_size: elements of `packed`; tap_conv_scratch_size: of `scratch`. Both buffers start on a cache line.
// Of bfloat16 the input channels of a group must be even.
#define FASTGEN_DECLARE_TAP_CONV_OF(T)                                                                 \
    int64_t tap_conv_packed_size(const ConvPlan& plan, const T*);                                      \
    int64_t tap_conv_scratch_size(const ConvPlan& plan, const TapConvCall<T>& call);                   \
    void tap_conv_pack(const ConvPlan& plan, const ConvWeight<T>& weight, T* packed, int64_t threads); \
    void tap_conv(const ConvPlan& plan, const TapConvCall<T>& call, SumOf<T>* scratch);

#define FASTGEN_DECLARE_TAP_CONV(ISA)     \
    namespace fastgen::ISA {              \
    FASTGEN_DECLARE_TAP_CONV_OF(BFloat16) \
    FASTGEN_DECLARE_TAP_CONV_OF(float)    \
    FASTGEN_DECLARE_TAP_CONV_OF(double)   \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_TAP_CONV(FASTGEN_ISA)
#endif

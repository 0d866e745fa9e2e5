// fastgen: per-isa
// The plan of a convolution (phase_plan.h) says which kernel computes it; the formula is that of tap_conv.h.

#include "tap_conv.h"

#include "depthwise_conv.h"
#include "overlap_add.h"
#include "phase_conv.h"

namespace fastgen::FASTGEN_ISA {
namespace {

// Calls body with what computes the calls of a plan.
template <class E, class Body>
FASTGEN_INLINE auto with_kernel(const ConvPlan& plan, const TapConvCall<E>& call, SumOf<E>* scratch, const Body& body) {
    if constexpr (kConvElement<E>.by_channel) {
        if (plan.depthwise) return body(DepthwiseConv<E>{plan, call, scratch});
    }
    if (plan.overlap_add) return body(OverlapAdd<E>{plan, call, scratch});
    return body(PhaseConv<E>{plan, call, scratch});
}

}  // namespace

#define FASTGEN_DEFINE_TAP_CONV(T)                                                                        \
    int64_t tap_conv_packed_size(const ConvPlan& plan, const T*) {                                        \
        return with_kernel<T>(plan, {}, nullptr, [](const auto& conv) { return conv.packed_size(); });    \
    }                                                                                                     \
    int64_t tap_conv_scratch_size(const ConvPlan& plan, const TapConvCall<T>& call) {                     \
        return with_kernel<T>(plan, call, nullptr, [](const auto& conv) { return conv.scratch_size(); }); \
    }                                                                                                     \
    void tap_conv_pack(const ConvPlan& plan, const ConvWeight<T>& weight, T* packed, int64_t threads) {   \
        TapConvCall<T> call{};                                                                            \
        call.threads = threads;                                                                           \
        with_kernel<T>(plan, call, nullptr, [&](const auto& conv) { conv.pack(weight, packed); });        \
    }                                                                                                     \
    void tap_conv(const ConvPlan& plan, const TapConvCall<T>& call, SumOf<T>* scratch) {                  \
        with_kernel<T>(plan, call, scratch, [](const auto& conv) { conv.run(); });                        \
    }

FASTGEN_DEFINE_TAP_CONV(BFloat16)
FASTGEN_DEFINE_TAP_CONV(float)
FASTGEN_DEFINE_TAP_CONV(double)

}  // namespace fastgen::FASTGEN_ISA

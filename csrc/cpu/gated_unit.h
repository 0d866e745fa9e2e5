// The gated activation unit; the formulas are in gated_unit.cpp.
#pragma once

#include <cstdint>

namespace fastgen {

// Feature maps [pixels of all samples][channels], dense: the input has twice the channels of all others.
template <class T>
struct GatedUnit {
    int64_t pixels, channels;
    bool tanh;  // else the first half is taken as it is
    const T* input;
    int64_t threads;
};

}  // namespace fastgen

// `residual` may be null.
#define FASTGEN_DECLARE_GATED_UNIT_OF(T)                                    \
    void gated_unit(const GatedUnit<T>& job, const T* residual, T* output); \
    void gated_unit_gradient(const GatedUnit<T>& job, const T* grad, T* grad_input);

#define FASTGEN_DECLARE_GATED_UNIT(ISA)   \
    namespace fastgen::ISA {              \
    FASTGEN_DECLARE_GATED_UNIT_OF(float)  \
    FASTGEN_DECLARE_GATED_UNIT_OF(double) \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_GATED_UNIT(FASTGEN_ISA)
#endif

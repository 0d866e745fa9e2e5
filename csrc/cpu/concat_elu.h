// ELU of features and of their negatives, with dropout; the formulas are in concat_elu.cpp.
#pragma once

#include <cstdint>

namespace fastgen {

// Feature maps [pixels of all samples][channels], dense; outputs have those of all inputs, and then those of their
// negatives where there are any.
template <class T>
struct ConcatElu {
    int64_t samples, pixels;  // of a sample
    int64_t num_inputs;
    const T* const* inputs;
    const int64_t* channels;
    bool negate;
    // Of 65536: a feature is dropped where its 16 random bits are below; the others are multiplied by `scale`.
    int64_t dropped;
    double scale;
    uint64_t seed;
    int64_t threads;
};

// With dropout, a pixel has no more features than this.
inline constexpr int64_t kConcatEluMaxDropout = 8192;

}  // namespace fastgen

#define FASTGEN_DECLARE_CONCAT_ELU_OF(T)                 \
    void concat_elu(const ConcatElu<T>& job, T* output); \
    void concat_elu_gradient(const ConcatElu<T>& job, const T* grad, T* const* grad_inputs);

#define FASTGEN_DECLARE_CONCAT_ELU(ISA)   \
    namespace fastgen::ISA {              \
    FASTGEN_DECLARE_CONCAT_ELU_OF(float)  \
    FASTGEN_DECLARE_CONCAT_ELU_OF(double) \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_CONCAT_ELU(FASTGEN_ISA)
#endif

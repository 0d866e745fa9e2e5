// Likelihood of mixtures of discretised logistic distributions; the formulas are in logistic_mixture_nll.cpp.
#pragma once

#include <cstdint>

namespace fastgen {

// A tensor [N, C, H, W], or [N, H, W] with c unused: its first element and the element strides of the dimensions.
template <class T>
struct PixelTensor {
    T* data;
    int64_t n, c, h, w;
};

struct LogisticMixtureNll {
    int64_t batch, height, width;
    int64_t colours;     // 1 or 3
    int64_t components;  // at least 1
    int64_t levels;      // 2..256
    int64_t threads;
};

}  // namespace fastgen

// nll is dense [N, H, W]; gradient is grad times the derivative of nll by the parameters. Scratch: as many elements as
// logistic_mixture_nll_scratch says.
#define FASTGEN_DECLARE_LOGISTIC_MIXTURE_NLL_OF(T)                                                                 \
    int64_t logistic_mixture_nll_scratch(const LogisticMixtureNll& job, const T*);                                 \
    void logistic_mixture_nll(const LogisticMixtureNll& job, const PixelTensor<const T>& params,                   \
                              const PixelTensor<const uint8_t>& images, T* nll, T* scratch);                       \
    void logistic_mixture_nll_gradient(const LogisticMixtureNll& job, const PixelTensor<const T>& params,          \
                                       const PixelTensor<const uint8_t>& images, const PixelTensor<const T>& grad, \
                                       const PixelTensor<T>& gradient, T* scratch);

#define FASTGEN_DECLARE_LOGISTIC_MIXTURE_NLL(ISA)   \
    namespace fastgen::ISA {                        \
    FASTGEN_DECLARE_LOGISTIC_MIXTURE_NLL_OF(float)  \
    FASTGEN_DECLARE_LOGISTIC_MIXTURE_NLL_OF(double) \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_LOGISTIC_MIXTURE_NLL(FASTGEN_ISA)
#endif

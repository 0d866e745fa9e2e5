// Mixture of discretised logistic distributions (Salimans et al. 2017, "PixelCNN++", sections 2.1 and 2.2): parameter
// layout and drawing. The likelihood is in cpu/logistic_mixture_nll.cpp; fastgen/sampling/heads/logistic_mixture.py is
// the definition of a draw.
//
// Parameters of a pixel with C colours (1 or 3) and K components: K mixture logits, then for each colour K means, K log
// scales and, of three colours, K coefficients. Coefficient 0 is that of red in the mean of green, 1 and 2 are those of
// red and green in the mean of blue, each through tanh.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace fastgen {

inline constexpr double kMinLogScale = -7.0;   // smaller ones count as this
inline constexpr double kMaxLogScale = 700.0;  // of a draw: e^700 is near the largest double

// Kinds of parameters that a colour has.
FASTGEN_HOST_DEVICE constexpr int64_t logistic_mixture_kinds(int64_t colours) { return colours == 3 ? 3 : 2; }

FASTGEN_HOST_DEVICE constexpr int64_t logistic_mixture_params(int64_t colours, int64_t components) {
    return components * (1 + colours * logistic_mixture_kinds(colours));
}

// The smallest component whose cumulative probability softmax(logits * inverse_temperature) is at least `uniform`.
FASTGEN_HOST_DEVICE int64_t logistic_mixture_component(const float* logits, int64_t components, double uniform,
                                                       double inverse_temperature) {
    double largest = logits[0] * inverse_temperature, sum = 0.0, cumulative = 0.0;
    for (int64_t k = 1; k < components; ++k) {
        const double logit = logits[k] * inverse_temperature;
        largest = logit > largest ? logit : largest;
    }
    for (int64_t k = 0; k < components; ++k) sum += __builtin_exp(logits[k] * inverse_temperature - largest);
    for (int64_t k = 0; k + 1 < components; ++k) {
        cumulative += __builtin_exp(logits[k] * inverse_temperature - largest) / sum;
        if (cumulative >= uniform) return k;
    }
    return components - 1;
}

// The level whose bin holds x; a bin holds its upper bound, the outer ones take the tails. NaN gives 0.
FASTGEN_HOST_DEVICE int32_t logistic_mixture_level(double x, int64_t levels) {
    const double position = (x + 1.0) * ((levels - 1) / 2.0) - 0.5;
    if (!(position > 0.0)) return 0;
    if (position > levels - 2.0) return static_cast<int32_t>(levels - 1);
    return static_cast<int32_t>(__builtin_ceil(position));
}

// Scale and standard noise of a draw.
FASTGEN_HOST_DEVICE double logistic_mixture_scale(double log_scale) {
    return __builtin_exp(log_scale < kMinLogScale ? kMinLogScale : log_scale > kMaxLogScale ? kMaxLogScale : log_scale);
}

FASTGEN_HOST_DEVICE double logistic_mixture_noise(double uniform) { return __builtin_log(uniform / (1.0 - uniform)); }

// Draws the levels of a pixel.
//   params     [logistic_mixture_params(colours, components)]
//   uniforms   [1 + colours] in (0, 1): for the component, then for each colour
//   encoding   [levels]: the value that each level has in the means of later colours
//   drawn      [colours]
FASTGEN_HOST_DEVICE void logistic_mixture_draw(const float* params, int64_t components, int64_t colours, int64_t levels,
                                               const float* uniforms, double inverse_temperature, const float* encoding,
                                               int32_t* drawn) {
    const int64_t k = logistic_mixture_component(params, components, uniforms[0], inverse_temperature);
    const int64_t block = logistic_mixture_kinds(colours) * components;
    for (int64_t c = 0; c < colours; ++c) {
        const float* own = params + components + c * block + k;
        double mean = own[0];
        for (int64_t i = 0; i < c; ++i) {
            const float coefficient = params[components + (i + c - 1) * block + 2 * components + k];
            mean += __builtin_tanh(coefficient) * encoding[drawn[i]];
        }
        const double spread = logistic_mixture_scale(own[components]) / inverse_temperature;
        drawn[c] = logistic_mixture_level(mean + spread * logistic_mixture_noise(uniforms[1 + c]), levels);
    }
}

}  // namespace fastgen

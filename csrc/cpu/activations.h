// Activation functions and their derivatives on vectors, as torch.nn.functional defines them. A NaN stays one.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastgen {

enum class Activation : int32_t { none, relu, leaky_relu, elu, tanh, sigmoid, silu, gelu };

}  // namespace fastgen

#ifdef FASTGEN_ISA
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {

template <Activation A>
struct ActivationTag {
    static constexpr Activation value = A;
};

// Calls body with the tag of an activation.
template <class Body>
FASTGEN_INLINE void with_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::none:
            return body(ActivationTag<Activation::none>{});
        case Activation::relu:
            return body(ActivationTag<Activation::relu>{});
        case Activation::leaky_relu:
            return body(ActivationTag<Activation::leaky_relu>{});
        case Activation::elu:
            return body(ActivationTag<Activation::elu>{});
        case Activation::tanh:
            return body(ActivationTag<Activation::tanh>{});
        case Activation::sigmoid:
            return body(ActivationTag<Activation::sigmoid>{});
        case Activation::silu:
            return body(ActivationTag<Activation::silu>{});
        case Activation::gelu:
            return body(ActivationTag<Activation::gelu>{});
    }
}

// x sigmoid(x). Where that is subnormal, a sigmoid of 0 is as good: x times it is nearly 0, and NaN at -inf.
FASTGEN_INLINE Vec<float> silu(Vec<float> x) {
    const Vec<int32_t> bits = (Vec<int32_t>)x;
    const Vec<float> one = broadcast(1.0f), e = exp_flushed((Vec<float>)(bits | ~0x7fffffff));
    return x * where(bits < 0, e, one) / (one + e);
}

FASTGEN_INLINE Vec<double> silu(Vec<double> x) { return x * sigmoid(x); }

// The distribution function of the standard normal.
template <class V>
FASTGEN_INLINE V normal_cdf(V x) {
    using T = std::decay_t<decltype(x[0])>;
    const V half = V{} + T(0.5);
    return fma(half, erf(x * T(0.70710678118654752)), half);
}

// `parameter` is the negative slope of a leaky ReLU and the alpha of an ELU.
template <Activation A, class V>
FASTGEN_INLINE V activate(V x, V parameter) {
    if constexpr (A == Activation::relu) return max(V{}, x);
    if constexpr (A == Activation::leaky_relu) return where(x > V{}, x, x * parameter);
    // e^x - 1 = tanh(x / 2) (e^x + 1), without its cancellation near zero.
    if constexpr (A == Activation::elu) {
        const V e = exp(x);
        const V negative = tanh(x * (V{} + 0.5f)) * (e + 1.0f);
        return where(x > V{}, x, where(x < V{} - 30.0f, V{} - 1.0f, negative) * parameter);
    }
    if constexpr (A == Activation::tanh) return tanh(x);
    if constexpr (A == Activation::sigmoid) return sigmoid(x);
    if constexpr (A == Activation::silu) return silu(x);
    if constexpr (A == Activation::gelu) return x * normal_cdf(x);
    return x;
}

template <Activation A, class V>
FASTGEN_INLINE V activation_gradient(V x, V parameter) {
    const V one = V{} + 1.0f;
    if constexpr (A == Activation::relu) return where(x <= V{}, V{}, one);
    if constexpr (A == Activation::leaky_relu) return where(x > V{}, one, parameter);
    if constexpr (A == Activation::elu) return where(x > V{}, one, parameter * exp(x));
    if constexpr (A == Activation::tanh) {
        const V y = tanh(x);
        return one - y * y;
    }
    if constexpr (A == Activation::sigmoid) {
        const V y = sigmoid(x);
        return y * (one - y);
    }
    if constexpr (A == Activation::silu) {
        const V y = sigmoid(x);
        return y * fma(x, one - y, one);
    }
    if constexpr (A == Activation::gelu) {
        using T = std::decay_t<decltype(x[0])>;
        const V density = exp(x * x * T(-0.5)) * T(0.39894228040143268);
        return fma(x, density, normal_cdf(x));
    }
    return one;
}

}  // namespace fastgen::FASTGEN_ISA
#endif

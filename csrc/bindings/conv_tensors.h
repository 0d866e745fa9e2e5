// Images and the tensors of a BatchNorm, as the bindings of convolutions get them.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/dot_gemm.h"
#include "cpu/image.h"
#include "pointer.h"

namespace fastgen {

using Pair = std::array<int64_t, 2>;
using Strides = std::array<int64_t, 4>;

template <class T>
Image<T> image(uintptr_t data, const Strides& strides) {
    return {pointer<const T>(data), strides[0], strides[1], strides[2], strides[3]};
}

// The tensors [C] of a bias and a BatchNorm, or null.
using ChannelTensors = std::array<uintptr_t, 5>;  // bias, mean, var, weight, bias of the BatchNorm

template <class T>
double to_double(T x) {
    return x;
}

inline double to_double(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// scale * z + shift is the BatchNorm of z + bias; in double, so that folding costs no accuracy.
template <class E, class T>
void fold(const ChannelTensors& tensors, double eps, int64_t channels, T* scale, T* shift) {
    const auto at = [&](int i, int64_t c, double missing) {
        return tensors[i] ? to_double(pointer<const E>(tensors[i])[c]) : missing;
    };
    for (int64_t c = 0; c < channels; ++c) {
        double factor = at(3, c, 1.0);
        if (tensors[2]) factor /= std::sqrt(at(2, c, 0.0) + eps);
        scale[c] = static_cast<T>(factor);
        shift[c] = static_cast<T>((at(0, c, 0.0) - at(1, c, 0.0)) * factor + at(4, c, 0.0));
    }
}

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

template <class T>
int64_t line_up(int64_t elements) {
    return (elements + kLine<T> - 1) / kLine<T> * kLine<T>;
}

}  // namespace fastgen

// The elementwise programs of a plan's steps: one operation on all rows and panels of a tile.
#pragma once

#include "plan_thread.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

FASTGEN_INLINE Vec<float> each_lane(Vec<float> x, float (*f)(float)) {
    for (int i = 0; i < kLanes<float>; ++i) x[i] = f(x[i]);
    return x;
}
inline float sqrt_of(float x) { return __builtin_sqrtf(x); }

FASTGEN_INLINE Vec<float> expm1_of_minus_abs(Vec<float> x) {
    Vec<float> lack;
    exp_flushed(-abs(x), lack);
    return -lack;
}

// Above zero as e^x (1 - e^-x), which does not cancel.
FASTGEN_INLINE Vec<float> expm1(Vec<float> x) {
    const Vec<float> below = expm1_of_minus_abs(x);
    return where(x > Vec<float>{}, exp(x) * -below, below);
}

FASTGEN_INLINE Vec<float> positive_or(Vec<float> x, Vec<float> other) { return where(x > Vec<float>{}, x, other); }

template <class F>
FASTGEN_INLINE void map(float* dst, int64_t dst_row_stride, int64_t rows, int64_t panels, PlanValue a, F f) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < panels; ++j) {
            const float* x = a.p + r * a.row_stride + j * a.panel_stride;
            float* out = dst + r * dst_row_stride + j * kPanelColumns;
            for (int v = 0; v < kPanelColumns; v += kLanes<float>) store(out + v, f(load(x + v)));
        }
    }
}

template <class F>
FASTGEN_INLINE void map(float* dst, int64_t dst_row_stride, int64_t rows, int64_t panels, PlanValue a, PlanValue b,
                        F f) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < panels; ++j) {
            const float* x = a.p + r * a.row_stride + j * a.panel_stride;
            const float* y = b.p + r * b.row_stride + j * b.panel_stride;
            float* out = dst + r * dst_row_stride + j * kPanelColumns;
            for (int v = 0; v < kPanelColumns; v += kLanes<float>) store(out + v, f(load(x + v), load(y + v)));
        }
    }
}

inline void apply(PlanOp op, float* dst, int64_t stride, int64_t rows, int64_t panels, PlanValue a, PlanValue b) {
    using V = Vec<float>;
    switch (op) {
        case PlanOp::copy:
            return map(dst, stride, rows, panels, a, [](V x) { return x; });
        case PlanOp::neg:
            return map(dst, stride, rows, panels, a, [](V x) { return -x; });
        case PlanOp::abs:
            return map(dst, stride, rows, panels, a, [](V x) { return abs(x); });
        case PlanOp::relu:
            return map(dst, stride, rows, panels, a, [](V x) { return max(V{}, x); });
        case PlanOp::elu:
            return map(dst, stride, rows, panels, a, [](V x) { return positive_or(x, expm1_of_minus_abs(x)); });
        case PlanOp::expm1_of_minus_abs:
            return map(dst, stride, rows, panels, a, [](V x) { return expm1_of_minus_abs(x); });
        case PlanOp::exp:
            return map(dst, stride, rows, panels, a, [](V x) { return exp(x); });
        case PlanOp::expm1:
            return map(dst, stride, rows, panels, a, [](V x) { return expm1(x); });
        case PlanOp::log:
            return map(dst, stride, rows, panels, a, [](V x) { return log(x); });
        case PlanOp::sqrt:
            return map(dst, stride, rows, panels, a, [](V x) { return each_lane(x, sqrt_of); });
        case PlanOp::erf:
            return map(dst, stride, rows, panels, a, [](V x) { return erf(x); });
        case PlanOp::tanh:
            return map(dst, stride, rows, panels, a, [](V x) { return tanh(x); });
        case PlanOp::sigmoid:
            return map(dst, stride, rows, panels, a, [](V x) { return sigmoid(x); });
        case PlanOp::add:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return x + y; });
        case PlanOp::sub:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return x - y; });
        case PlanOp::mul:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return x * y; });
        case PlanOp::div:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return x / y; });
        case PlanOp::max:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return max(x, y); });
        case PlanOp::min:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return min(x, y); });
        case PlanOp::positive_or:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return positive_or(x, y); });
        case PlanOp::acc:
        case PlanOp::load:
        case PlanOp::constant:
            break;
    }
}

// result = value, as rows of channels `pitch` apart.
inline void write(const PlanValue& value, float* result, int64_t pitch, int64_t rows, int64_t channels) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < channels; c += kLanes<float>) {
            const float* x =
                value.p + r * value.row_stride + c / kPanelColumns * value.panel_stride + c % kPanelColumns;
            store_n(result + r * pitch + c, load(x), static_cast<int>(min_of(channels - c, kLanes<float>)));
        }
    }
}

}  // namespace
}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
//
//     out[p, c] = act(a) sigmoid(b) + residual[p, c],        a = x[p, c], b = x[p, C + c]
//     da = g sigmoid(b) act'(a),    db = g act(a) sigmoid(b) sigmoid(-b)
//
// for pixels p and channels c < C; act is tanh or the identity. Both functions and their slopes are quotients of few
// terms, none of which cancels or overflows. With d = e^-|b|, e = e^-2|a| and l = 1 - e:
//
//     sigmoid(b) = (b < 0 ? d : 1) / (1 + d),    sigmoid(b) sigmoid(-b) = d / (1 + d)^2
//     |tanh(a)| = l / (1 + e),                   tanh'(a) = 4 e / (1 + e)^2
//
// so that one division does for an output. The slopes keep their accuracy where sigmoid and tanh have rounded to one;
// in gradients, factors below 2^-126 may be 0.
#include "gated_unit.h"

#include "normal_tiles.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class T>
FASTGEN_INLINE Bits<T> sign_bit() {
    return (Bits<T>)broadcast(T(-0.0));
}

template <class T>
FASTGEN_INLINE Vec<T> minus_abs(Vec<T> x) {
    return (Vec<T>)((Bits<T>)x | sign_bit<T>());
}

// top / bottom is the value, and slope / bottom^2 its derivative.
template <class T>
struct Quotient {
    Vec<T> top, bottom, slope;
};

// Of x, and e^-|x|.
template <class T>
FASTGEN_INLINE Quotient<T> sigmoid_of(Vec<T> x, Vec<T> d) {
    const Vec<T> one = broadcast(T(1));
    return {where(x < Vec<T>{}, d, one), one + d, d};
}

template <class T>
FASTGEN_INLINE Quotient<T> tanh_of(Vec<T> x) {
    const Vec<T> minus = minus_abs<T>(x);
    Vec<T> lack;
    const Vec<T> e = exp_flushed(minus + minus, lack);
    const Vec<T> top = (Vec<T>)((Bits<T>)lack | ((Bits<T>)x & sign_bit<T>()));
    return {top, broadcast(T(1)) + e, broadcast(T(4)) * e};
}

// So many channels of a pixel: where they are in the input, and in a feature map of half its channels.
struct Some {
    int64_t a, b, half, count;
};

// Calls function(some) for all channels of all pixels, a vector at a time. The function has copies of what it needs, and
// each thread one of the function: stores might otherwise change them, as far as the compiler knows.
template <class T, class Function>
FASTGEN_INLINE void for_each_vector(const GatedUnit<T>& job, Function function) {
    in_parallel(job.threads, [&](int64_t thread, int64_t threads) {
        const Function run = function;
        const int64_t channels = job.channels, end = job.pixels * (thread + 1) / threads;
        for (int64_t p = job.pixels * thread / threads; p < end; ++p) {
            Some some{2 * p * channels, (2 * p + 1) * channels, p * channels, kLanes<T>};
            int64_t left = channels;
            for (; left >= kLanes<T>; left -= kLanes<T>) {
                run(some);
                some = {some.a + kLanes<T>, some.b + kLanes<T>, some.half + kLanes<T>, kLanes<T>};
            }
            some.count = left;
            if (left) run(some);
        }
    });
}

template <class T, bool kTanh>
void forward(const GatedUnit<T>& job, const T* residual, T* output) {
    for_each_vector(job, [input = job.input, residual, output](const Some& some) {
        const Vec<T> a = load_some<T>(input + some.a, some.count);
        const Vec<T> b = load_some<T>(input + some.b, some.count);
        const Quotient<T> gate = sigmoid_of<T>(b, exp(minus_abs<T>(b)));
        Vec<T> y;
        if constexpr (kTanh) {
            const Quotient<T> tanh = tanh_of<T>(a);
            y = tanh.top * gate.top / (tanh.bottom * gate.bottom);
        } else {
            y = a * gate.top / gate.bottom;
        }
        if (residual) y = y + load_some<T>(residual + some.half, some.count);
        store_some<T>(output + some.half, y, some.count);
    });
}

template <class T, bool kTanh>
void backward(const GatedUnit<T>& job, const T* grad, T* grad_input) {
    for_each_vector(job, [input = job.input, grad, grad_input](const Some& some) {
        const Vec<T> one = broadcast(T(1)), g = load_some<T>(grad + some.half, some.count);
        const Vec<T> b = load_some<T>(input + some.b, some.count);
        Vec<T> a = load_some<T>(input + some.a, some.count);
        const Quotient<T> gate = sigmoid_of<T>(b, exp_flushed(minus_abs<T>(b)));
        const Vec<T> over_gate = one / gate.bottom;
        Vec<T> da = g * (gate.top * over_gate);
        if constexpr (kTanh) {
            const Quotient<T> tanh = tanh_of<T>(a);
            const Vec<T> over_tanh = one / tanh.bottom;
            da = da * (tanh.slope * over_tanh * over_tanh);
            a = tanh.top * over_tanh;
        }
        store_some<T>(grad_input + some.a, da, some.count);
        store_some<T>(grad_input + some.b, g * a * (gate.slope * over_gate * over_gate), some.count);
    });
}

}  // namespace

#define FASTGEN_DEFINE_GATED_UNIT_OF(T)                                               \
    void gated_unit(const GatedUnit<T>& job, const T* residual, T* output) {          \
        (job.tanh ? forward<T, true> : forward<T, false>)(job, residual, output);     \
    }                                                                                 \
    void gated_unit_gradient(const GatedUnit<T>& job, const T* grad, T* grad_input) { \
        (job.tanh ? backward<T, true> : backward<T, false>)(job, grad, grad_input);   \
    }

FASTGEN_DEFINE_GATED_UNIT_OF(float)
FASTGEN_DEFINE_GATED_UNIT_OF(double)

}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
//
//     out[p, c]     = keep[p, c] elu(x[p, c]),        elu(v) = v where v > 0, else e^v - 1
//     out[p, C + c] = keep[p, C + c] elu(-x[p, c])
//
// for pixels p and the C channels of all inputs together; keep is 0 or `scale`. One of elu(v) and elu(-v) is |v|, the
// other e^-|v| - 1: one exponential does for both, and in the gradient for both derivatives, 1 and e^-|v|. What is kept
// of a pixel is drawn before its features are computed, in the forward pass and again in the backward pass.
#include "concat_elu.h"

#include "integers.h"
#include "normal_tiles.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

typedef uint16_t Halves __attribute__((vector_size(kVecBytes)));

template <class T>
struct Narrow {  // a 16-bit mask for each lane
    typedef int16_t type __attribute__((vector_size(2 * kLanes<T>)));
};

FASTGEN_INLINE Vec<int32_t> widened(Narrow<float>::type mask) { return __builtin_convertvector(mask, Vec<int32_t>); }
FASTGEN_INLINE Vec<uint64_t> widened(Narrow<double>::type mask) { return __builtin_convertvector(mask, Vec<uint64_t>); }

// Which of the F features of a pixel are kept: 0 for a dropped one, else -1. Features 4q .. 4q + 3 take the four 16-bit
// halves, low ones first, of two numbers of the draw (block q mod B, pixel, sample), B = 8 ceil(F / 64): of the first two
// where q < B, else of the others. Eight blocks are a whole vector or more on every instruction set.
template <class T>
class Dropout {
public:
    Dropout(uint64_t seed, int64_t dropped, double scale, int64_t features)
        : keys_(seed),
          dropped_(static_cast<uint16_t>(dropped)),
          scale_(scale),
          blocks_(dropped ? 8 * ceil_div(features, 64) : 0) {}

    void draw(uint64_t sample, uint64_t pixel) {
        constexpr int64_t lanes = kVecBytes / 8;
        Vec<uint64_t> block{};
        for (int64_t i = 0; i < lanes; ++i) block[i] = i;
        for (int64_t b = 0; b < blocks_; b += lanes, block += lanes) {
            Vec<uint64_t> words[4];
            philox(keys_, block, pixel + Vec<uint64_t>{}, sample + Vec<uint64_t>{}, words);
            for (int64_t part = 0; part < 2; ++part) {
                const Halves halves = (Halves)((words[2 * part] & 0xffffffff) | words[2 * part + 1] << 32);
                const auto kept = halves >= dropped_ + Halves{};
                __builtin_memcpy(kept_ + 4 * (part * blocks_ + b), &kept, sizeof kept);
            }
        }
    }

    // Features `at`, ...
    FASTGEN_INLINE Vec<T> operator()(Vec<T> x, int64_t at) const {
        if (!blocks_) return x;
        typename Narrow<T>::type narrow;
        __builtin_memcpy(&narrow, kept_ + at, sizeof narrow);
        const auto mask = widened(narrow);
        return (Vec<T>)((decltype(mask))(x * broadcast(static_cast<T>(scale_))) & mask);
    }

private:
    const PhiloxKeys keys_;
    const uint16_t dropped_;
    const double scale_;
    const int64_t blocks_;
    int16_t kept_[kConcatEluMaxDropout + kLanes<float>];
};

// So many features of input `input` from element `at` on, which go to element `to` of the outputs, their negatives to
// `negated`; they are features `feature` and `negated_feature` of their pixel.
struct Some {
    int64_t input, at, count, to, negated, feature, negated_feature;
};

// Calls function(some, dropout) for all features, a vector at a time.
template <class T, class Function>
void for_each_vector(const ConcatElu<T>& job, Function function) {
    int64_t width = 0;
    for (int64_t i = 0; i < job.num_inputs; ++i) width += job.channels[i];
    const int64_t features = width * (job.negate ? 2 : 1), all = job.samples * job.pixels;
    in_parallel(job.threads, [&](int64_t thread, int64_t threads) {
        Dropout<T> dropout(job.seed, job.dropped, job.scale, features);
        for (int64_t p = all * thread / threads; p < all * (thread + 1) / threads; ++p) {
            dropout.draw(p / job.pixels, p % job.pixels);
            int64_t first = 0;
            for (int64_t i = 0; i < job.num_inputs; first += job.channels[i++]) {
                for (int64_t c = 0; c < job.channels[i]; c += kLanes<T>) {
                    const int64_t feature = first + c, to = p * features + feature;
                    function(Some{i, p * job.channels[i] + c, min_of(kLanes<T>, job.channels[i] - c), to, to + width,
                                  feature, feature + width},
                             dropout);
                }
            }
        }
    });
}

template <class T>
FASTGEN_INLINE Vec<T> minus_abs(Vec<T> x) {
    return where(x > Vec<T>{}, -x, x);
}

template <class T>
void forward(const ConcatElu<T>& job, T* output) {
    for_each_vector(job, [&](const Some& some, const Dropout<T>& dropout) {
        const Vec<T> x = load_some<T>(job.inputs[some.input] + some.at, some.count);
        Vec<T> lack;
        exp_flushed(minus_abs<T>(x), lack);  // lack = 1 - e^-|x|
        store_some<T>(output + some.to, dropout(where(x > Vec<T>{}, x, -lack), some.feature), some.count);
        if (!job.negate) return;
        store_some<T>(output + some.negated, dropout(where(x < Vec<T>{}, -x, -lack), some.negated_feature), some.count);
    });
}

template <class T>
void backward(const ConcatElu<T>& job, const T* grad, T* const* grad_inputs) {
    for_each_vector(job, [&](const Some& some, const Dropout<T>& dropout) {
        const Vec<T> x = load_some<T>(job.inputs[some.input] + some.at, some.count), one = broadcast(T(1));
        const Vec<T> slope = exp_flushed(minus_abs<T>(x));
        const Vec<T> g = dropout(load_some<T>(grad + some.to, some.count), some.feature);
        Vec<T> sum = g * where(x > Vec<T>{}, one, slope);
        if (job.negate) {
            const Vec<T> h = dropout(load_some<T>(grad + some.negated, some.count), some.negated_feature);
            sum = sum - h * where(x < Vec<T>{}, one, slope);
        }
        store_some<T>(grad_inputs[some.input] + some.at, sum, some.count);
    });
}

}  // namespace

void concat_elu(const ConcatElu<float>& job, float* output) { forward(job, output); }
void concat_elu(const ConcatElu<double>& job, double* output) { forward(job, output); }
void concat_elu_gradient(const ConcatElu<float>& job, const float* grad, float* const* grad_inputs) {
    backward(job, grad, grad_inputs);
}
void concat_elu_gradient(const ConcatElu<double>& job, const double* grad, double* const* grad_inputs) {
    backward(job, grad, grad_inputs);
}

}  // namespace fastgen::FASTGEN_ISA

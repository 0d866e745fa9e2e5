// fastgen: per-isa
//
// Likelihood of mixtures of discretised logistic distributions, and its gradient, one vector of pixels at a time.
//
// With x the encoded level, h half the width of a bin, m the mean and s the log scale of a component, a bin's mass is
//     sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - e^-(a-b)),   a = (x - m + h) e^-s,   b = (x - m - h) e^-s,
// sigma(a) for the lowest level and sigma(-b) for the highest. Let z = |a + b| / 2, v = (a - b) / 2. Then
//     sigma(a) sigma(-b) = sigma(near) sigma(far),   near = v - z,   far = v + z,
// and far needs no exponential of its own: e^-far is e^-2v e^-|near| outside the bin (near < 0) and e^-2v / e^-|near|
// inside. Logarithms of small masses stay finite because each mass is kept as a pair,
//     mass = e^linear ratio,   linear = min(near, 0) - max(s - s0, 0),
// where a bin is `narrow` from the log scale s0 on: there 1 - e^-2v is 2v to the last bit, so that v may stay what it
// is at s0. The ratios of a component multiply without underflow, and one logarithm per pixel is all that is needed:
//     nll = log(sum e^logit) - log(sum e^(logit + linear) ratio).
//
// A tile is a vector of pixels. Its parameters are laid out as [parameter][pixel] in scratch, whatever the layout of
// the tensors, and replaced by their derivatives there.
#include "logistic_mixture_nll.h"

#include <omp.h>

#include "common/logistic_mixture.h"
#include "pixel_tiles.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class T>
struct Limits;
template <>
struct Limits<float> {
    static constexpr int32_t sign = INT32_MIN;
    static constexpr float far = 3.4028234e38f / 16;  // sums of six such numbers are finite
    static constexpr float narrow = 0x1p-25f;         // 1 - e^-2v is 2v to the last bit
};
template <>
struct Limits<double> {
    static constexpr int64_t sign = INT64_MIN;
    static constexpr double far = 1.7976931348623157e308 / 16;
    static constexpr double narrow = 0x1p-54;
};

// e^-60 stands for all smaller ones where they are added to 1: it is 0 to double precision, but not to be divided by.
constexpr double kLargestNear = 60.0;

template <class T>
FASTGEN_INLINE Bits<T> bits(Vec<T> x) {
    return (Bits<T>)x;
}
template <class T>
FASTGEN_INLINE Vec<T> bits(Bits<T> x) {
    return (Vec<T>)x;
}

// The constants of one call.
template <class T>
struct Constants {
    Vec<T> half, top, min_log_scale, narrow_log_scale;

    explicit Constants(int64_t levels)
        : half(broadcast(T(1.0 / (levels - 1)))),
          top(broadcast(T(levels - 1))),
          min_log_scale(broadcast(T(kMinLogScale))),
          narrow_log_scale(broadcast(T(-__builtin_log(Limits<T>::narrow * (levels - 1.0))))) {}
};

// A colour of a tile's pixels: what the network reads for its level, and what kind of bin that has.
template <class T>
struct Value {
    Vec<T> x;
    Bits<T> inner;       // all bits, but none for the lowest and the highest level
    Bits<T> inner_sign;  // of those, the sign bit alone
    Bits<T> falling;     // the sign bit for the lowest level
};

template <class T>
struct Mass {
    Vec<T> linear, ratio;
    Vec<T> by_mean, by_log_scale;  // derivatives of the logarithm
};

// The mass of a bin; `inverse` is e^-s.
template <bool kGradient, class T>
FASTGEN_INLINE Mass<T> mass(const Constants<T>& constants, const Value<T>& value, Vec<T> mean, Vec<T> log_scale,
                            Vec<T> inverse) {
    const Vec<T> zero{}, one = broadcast(T(1)), limit = broadcast(Limits<T>::far);
    const Vec<T> v = max(broadcast(Limits<T>::narrow), constants.half * inverse);
    const Vec<T> shrink = bits<T>(value.inner & bits<T>(min(limit, max(zero, log_scale - constants.narrow_log_scale))));
    const Vec<T> centre = (value.x - mean) * inverse;
    const Bits<T> sign = (bits<T>(centre) & value.inner_sign) | value.falling;
    const Vec<T> z = bits<T>(bits<T>(centre) ^ sign);

    Vec<T> lack;
    const Vec<T> root = bits<T>(value.inner & bits<T>(exp_flushed(-v, lack)));
    const Vec<T> bin = where(value.inner, lack, one) * (one + root);  // 1 - e^-2v; 1 where there is one edge only
    const Vec<T> both = root * root;                                  // e^-2v; 0 there

    const Vec<T> near = max(-limit, min(broadcast(T(kLargestNear)), v - z));
    const Vec<T> e = exp_flushed(bits<T>(bits<T>(near) | Limits<T>::sign));
    const auto inside = near > zero;
    const Vec<T> n = where(inside, e, one), f = both * where(inside, one, e);  // e^-far = f / n
    const Vec<T> near_sum = one + e, far_sum = n + f, sums = near_sum * far_sum;

    Mass<T> result;
    result.linear = min(zero, near) - shrink;
    if constexpr (!kGradient) {
        result.ratio = bin * n / sums;
    } else {
        const Vec<T> r = one / (sums * bin), by_sums = r * bin, by_bin = r * sums;
        const Vec<T> near_tail = n * by_sums * far_sum;  // sigma(-near)
        const Vec<T> far_tail = f * by_sums * near_sum;  // sigma(-far)
        const Vec<T> width = v + v;
        result.ratio = n * by_sums * bin;
        result.by_mean = bits<T>(bits<T>(inverse * (near_tail - far_tail)) ^ sign);
        const Vec<T> far_part = fma(width - near, far_tail, width * both * by_bin);
        const Vec<T> by_log_scale = -fma(near, near_tail, far_part);
        result.by_log_scale = where(log_scale < constants.min_log_scale, zero, by_log_scale);
    }
    return result;
}

// tanh, and its derivative.
template <class T>
FASTGEN_INLINE Vec<T> tanh(Vec<T> x, Vec<T>& slope) {
    const Vec<T> one = broadcast(T(1));
    Vec<T> lack;
    const Vec<T> e = exp_flushed(bits<T>(bits<T>(x + x) | Limits<T>::sign), lack);  // e^-2|x|
    const Vec<T> r = one / (one + e);
    slope = broadcast(T(4)) * e * r * r;
    return bits<T>(bits<T>(lack * r) | (bits<T>(x) & Limits<T>::sign));
}

// What a thread needs for a tile. Each array is [...][kLanes].
template <class T>
struct Scratch {
    T* params;
    T *linear, *ratio;     // [components]
    T *inverses, *slopes;  // [colours][components]: e^-s of the log scales, derivatives of tanh of the coefficients

    static int64_t size(const LogisticMixtureNll& job) {
        const int64_t params = logistic_mixture_params(job.colours, job.components);
        return (params + 2 * (1 + job.colours) * job.components) * kLanes<T>;
    }
    Scratch(const LogisticMixtureNll& job, T* memory) {
        const int64_t row = job.components * kLanes<T>;
        params = memory;
        linear = params + logistic_mixture_params(job.colours, job.components) * kLanes<T>;
        ratio = linear + row;
        inverses = ratio + row;
        slopes = inverses + job.colours * row;
    }
};

template <class T>
FASTGEN_INLINE Value<T> value_of(const Constants<T>& constants, Vec<T> level) {
    const Bits<T> bottom = level == Vec<T>{}, top = level == constants.top;
    const Vec<T> x = level * (constants.half + constants.half) - broadcast(T(1));
    return {x, ~(bottom | top), ~(bottom | top) & Limits<T>::sign, bottom & Limits<T>::sign};
}

// Parameters as they act. Apart from `component`, so that no exponential waits for another one.
template <int kColours, class T>
FASTGEN_INLINE void transform(const Constants<T>& constants, const Scratch<T>& scratch, int64_t row) {
    constexpr int kinds = logistic_mixture_kinds(kColours);
    for (int c = 0; c < kColours; ++c) {
        T *const log_scales = scratch.params + (2 + c * kinds) * row, *const coefficients = log_scales + row;
        for (int64_t at = 0; at < row; at += kLanes<T>) {
            const Vec<T> s = max(constants.min_log_scale, load(log_scales + at));
            store(scratch.inverses + c * row + at, exp_flushed(-s));
            if constexpr (kColours == 3) {
                Vec<T> slope;
                store(coefficients + at, tanh<T>(load(coefficients + at), slope));
                store(scratch.slopes + c * row + at, slope);
            }
        }
    }
}

// The joint mass of the component at `at`, as (linear, ratio). With kGradient the derivatives of its logarithm replace
// the parameters.
template <bool kGradient, int kColours, class T>
FASTGEN_INLINE void component(const Constants<T>& constants, const Value<T>* values, const Scratch<T>& scratch,
                              int64_t at, int64_t row, Vec<T>& linear, Vec<T>& ratio) {
    constexpr int kinds = logistic_mixture_kinds(kColours);
    T* const means = scratch.params + row + at;
    T* const coefficients = means + 2 * row;
    Vec<T> coefficient[kColours];
    if constexpr (kColours == 3) {
        for (int c = 0; c < 3; ++c) coefficient[c] = load(coefficients + c * kinds * row);
    }
#pragma GCC unroll 3
    for (int c = 0; c < kColours; ++c) {
        T *const own = means + c * kinds * row, *const log_scale = own + row;
        Vec<T> mean = load(own);
        for (int i = 0; i < c; ++i) mean = fma(coefficient[c - 1 + i], values[i].x, mean);
        const Vec<T> inverse = load(scratch.inverses + c * row + at);
        const Mass<T> one = mass<kGradient>(constants, values[c], mean, load(log_scale), inverse);
        linear = linear + one.linear;
        ratio = ratio * one.ratio;
        if constexpr (kGradient) {
            store(own, one.by_mean);
            store(log_scale, one.by_log_scale);
            for (int i = 0; i < c; ++i) {
                const Vec<T> slope = load(scratch.slopes + (c - 1 + i) * row + at);
                store(coefficients + (c - 1 + i) * kinds * row, one.by_mean * values[i].x * slope);
            }
        }
    }
}

// The result of a tile. With kGradient, `grad` times its derivatives replace the parameters.
template <bool kGradient, int kColours, class T>
FASTGEN_INLINE Vec<T> tile_nll(const LogisticMixtureNll& job, const Constants<T>& constants,
                               const Pixels<T, const uint8_t>& images, const Scratch<T>& scratch, Vec<T> grad,
                               const PixelsAhead& next_params, const PixelsAhead& next_gradient) {
    constexpr int lanes = kLanes<T>, blocks = 1 + kColours * logistic_mixture_kinds(kColours);
    const int64_t row = job.components * lanes;
    Value<T> values[kColours];
    for (int c = 0; c < kColours; ++c) values[c] = value_of(constants, gather_levels<T>(images, c));

    transform<kColours>(constants, scratch, row);

    Vec<T> largest = load(scratch.params);
    for (int64_t at = lanes; at < row; at += lanes) largest = max(largest, load(scratch.params + at));

    Vec<T> logits_sum{}, largest_linear = broadcast(-16 * Limits<T>::far);
    for (int64_t at = 0; at < row; at += lanes) {
        Vec<T> linear = load(scratch.params + at) - largest, ratio = broadcast(T(1));
        const Vec<T> weight = exp_flushed(linear);
        logits_sum = logits_sum + weight;
        if (kGradient) store(scratch.params + at, weight);
        component<kGradient, kColours, T>(constants, values, scratch, at, row, linear, ratio);
        next_params.fetch(at / lanes, job.components, blocks);
        if (kGradient) next_gradient.fetch(at / lanes, job.components, blocks);
        largest_linear = max(largest_linear, linear);
        store(scratch.linear + at, linear);
        store(scratch.ratio + at, ratio);
    }

    Vec<T> sum{};
    for (int64_t at = 0; at < row; at += lanes) {
        const Vec<T> weight = exp_flushed(load(scratch.linear + at) - largest_linear) * load(scratch.ratio + at);
        sum = sum + weight;
        if (kGradient) store(scratch.ratio + at, weight);
    }
    if constexpr (kGradient) {
        const Vec<T> prior_scale = grad / logits_sum, posterior_scale = -grad / sum;
        for (int64_t at = 0; at < row; at += lanes) {
            const Vec<T> posterior = load(scratch.ratio + at) * posterior_scale;
            T* const params = scratch.params + at;
            store(params, fma(load(params), prior_scale, posterior));
#pragma GCC unroll 10
            for (int i = 1; i < blocks; ++i) {
                store(params + i * row, load(params + i * row) * posterior);
            }
        }
    }
    return log(logits_sum / sum) - largest_linear;
}

template <bool kGradient, int kColours, class T>
void run(const LogisticMixtureNll& job, const PixelTensor<const T>& params, const PixelTensor<const uint8_t>& images,
         T* nll, const PixelTensor<const T>& grad, const PixelTensor<T>& gradient, T* memory) {
    const int64_t pixels = job.batch * job.height * job.width;
    const int64_t count = logistic_mixture_params(kColours, job.components);
#pragma omp parallel num_threads(job.threads)
    {
        const Constants<T> constants(job.levels);
        const Scratch<T> scratch(job, memory + omp_get_thread_num() * Scratch<T>::size(job));
#pragma omp for schedule(static)
        for (int64_t first = 0; first < pixels; first += kLanes<T>) {
            const PixelTile<T> tile(job, first);
            const Pixels<T, const T> inputs(tile, params);
            const Pixels<T, T> outputs(tile, kGradient ? gradient : PixelTensor<T>{});
            load_tile(inputs, count, scratch.params);
            const Pixels<T, const uint8_t> levels(tile, images);
            Vec<T> scale{};
            if (kGradient) scale = gather(Pixels<T, const T>(tile, grad));
            const Vec<T> result = tile_nll<kGradient, kColours, T>(job, constants, levels, scratch, scale,
                                                                   PixelsAhead(inputs), PixelsAhead(outputs));
            if (nll) store_n(nll + first, result, tile.count);
            if (kGradient) store_tile(scratch.params, count, tile.count, outputs);
        }
    }
}

}  // namespace

int64_t logistic_mixture_nll_scratch(const LogisticMixtureNll& job, const float*) {
    return job.threads * Scratch<float>::size(job);
}
void logistic_mixture_nll(const LogisticMixtureNll& job, const PixelTensor<const float>& params,
                          const PixelTensor<const uint8_t>& images, float* nll, float* scratch) {
    const auto function = job.colours == 3 ? run<false, 3, float> : run<false, 1, float>;
    function(job, params, images, nll, {}, {}, scratch);
}
void logistic_mixture_nll_gradient(const LogisticMixtureNll& job, const PixelTensor<const float>& params,
                                   const PixelTensor<const uint8_t>& images, const PixelTensor<const float>& grad,
                                   const PixelTensor<float>& gradient, float* scratch) {
    const auto function = job.colours == 3 ? run<true, 3, float> : run<true, 1, float>;
    function(job, params, images, nullptr, grad, gradient, scratch);
}

int64_t logistic_mixture_nll_scratch(const LogisticMixtureNll& job, const double*) {
    return job.threads * Scratch<double>::size(job);
}
void logistic_mixture_nll(const LogisticMixtureNll& job, const PixelTensor<const double>& params,
                          const PixelTensor<const uint8_t>& images, double* nll, double* scratch) {
    const auto function = job.colours == 3 ? run<false, 3, double> : run<false, 1, double>;
    function(job, params, images, nll, {}, {}, scratch);
}
void logistic_mixture_nll_gradient(const LogisticMixtureNll& job, const PixelTensor<const double>& params,
                                   const PixelTensor<const uint8_t>& images, const PixelTensor<const double>& grad,
                                   const PixelTensor<double>& gradient, double* scratch) {
    const auto function = job.colours == 3 ? run<true, 3, double> : run<true, 1, double>;
    function(job, params, images, nullptr, grad, gradient, scratch);
}

}  // namespace fastgen::FASTGEN_ISA

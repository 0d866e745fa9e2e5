// fastgen: per-isa
//
// Likelihood of mixtures of discretised logistic distributions, and its gradient, one vector of pixels at a time.
//
// With x the encoded level, h half the width of a bin, m the mean and s the log scale of a component, a bin's mass is
//     sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - e^-(a-b)),   a = (x - m + h) e^-s,   b = (x - m - h) e^-s,
// sigma(a) for the lowest level and sigma(-b) for the highest. Let z = |a + b| / 2, v = (a - b) / 2. Then
//     sigma(a) sigma(-b) = sigma(near) sigma(far),   near = v - z,   far = v + z,
// and far needs no exponential of its own: e^-far is e^-2v e^-|near| outside the bin (near < 0) and e^-2v / e^-|near|
// inside. Logarithms of small masses stay finite because each mass is kept as a pair (linear, ratio),
//     mass = e^linear ratio,   linear = min(near, 0) - max(-log 2v, 0),   ratio in [0.15, 1],
// so that a component's joint mass is the product of the ratios, and one logarithm per pixel is all that is needed:
//     nll = log(sum e^logit) - log(sum e^(logit + linear) ratio).
//
// A tile is a vector of pixels. Its parameters are laid out as [parameter][pixel] in scratch, whatever the layout of
// the tensors, and replaced by their derivatives there.
#include "logistic_mixture_nll.h"

#include <omp.h>

#include <utility>

#include "common/logistic_mixture.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class T>
struct Limits;
template <>
struct Limits<float> {
    static constexpr float far = 3.4028234e38f / 16;  // sums of six such numbers are finite
    static constexpr int sinh_terms = 3;
};
template <>
struct Limits<double> {
    static constexpr double far = 1.7976931348623157e308 / 16;
    static constexpr int sinh_terms = 8;
};

// e^-60 stands for all smaller ones where they are added to 1: it is 0 to double precision, but not to be divided by.
constexpr double kLargestNear = 60.0;

// sinh(y) / y for |y| <= 1/2, of z = y^2, by its series.
template <class T>
FASTGEN_INLINE Vec<T> sinh_over(Vec<T> z) {
    Vec<T> p = broadcast(T(1));
    for (int n = Limits<T>::sinh_terms; n > 0; --n)
        p = fma(p, z * broadcast(T(1.0 / (2 * n * (2 * n + 1)))), broadcast(T(1)));
    return p;
}

template <class T>
FASTGEN_INLINE Vec<T> magnitude(Vec<T> x) {
    return max(x, -x);
}

// The constants of one call, and what a level is to all components of a colour.
template <class T>
struct Constants {
    Vec<T> half, log_width, min_log_scale, top;

    explicit Constants(int64_t levels)
        : half(broadcast(T(1.0 / (levels - 1)))),
          log_width(broadcast(T(__builtin_log(2.0 / (levels - 1))))),
          min_log_scale(broadcast(T(kMinLogScale))),
          top(broadcast(T(levels - 1))) {}
};

template <class T>
struct Mass {
    Vec<T> linear, ratio;
    Vec<T> by_mean, by_log_scale;  // derivatives of the logarithm
};

template <bool kGradient, class T>
FASTGEN_INLINE Mass<T> mass(const Constants<T>& constants, Vec<T> level, Vec<T> x, Vec<T> mean, Vec<T> log_scale) {
    const Vec<T> zero{}, one = broadcast(T(1)), limit = broadcast(Limits<T>::far);
    const auto bottom = level == zero, top = level == constants.top;
    const auto edge = bottom | top;

    const Vec<T> s = max(constants.min_log_scale, log_scale);
    const Vec<T> inverse = exp(-s);
    const Vec<T> v = constants.half * inverse;
    const Vec<T> centre = min(limit, max(-limit, (x - mean) * inverse));
    const Vec<T> z = where(bottom, -centre, where(top, centre, magnitude<T>(centre)));
    const Vec<T> root = where(edge, zero, exp(-v));
    const Vec<T> both = root * root;  // e^-2v; without a far edge nothing comes from it
    const Vec<T> width = v + v;
    const Vec<T> narrow = root * sinh_over<T>(v * v);  // (1 - e^-2v) / 2v
    const Vec<T> bin = where(edge, one, where(width > one, one - both, narrow));
    const Vec<T> shrink = where(edge, zero, min(limit, max(zero, s - constants.log_width)));

    const Vec<T> near = min(broadcast(T(kLargestNear)), v - z);
    const auto inside = near > zero;
    const Vec<T> e = exp(-magnitude<T>(near));
    const Vec<T> n = where(inside, e, one), f = both * where(inside, one, e);  // e^-far = f / n
    const Vec<T> near_sum = one + e, far_sum = n + f;

    Mass<T> result;
    result.linear = min(zero, near) - shrink;
    if constexpr (!kGradient) {
        result.ratio = bin * n / (near_sum * far_sum);
    } else {
        const Vec<T> r = one / (near_sum * far_sum * bin);
        const Vec<T> by_bin = r * bin;
        result.ratio = bin * n * by_bin;
        const Vec<T> near_tail = n * far_sum * by_bin;  // sigma(-near)
        const Vec<T> far_tail = f * near_sum * by_bin;  // sigma(-far)
        const Vec<T> slope = near_tail - far_tail;
        const auto falling = bottom | (~top & (centre < zero));
        result.by_mean = inverse * where(falling, -slope, slope);
        const Vec<T> by_width = max(width, one) * both * (near_sum * far_sum * r);  // 2v e^-2v / (1 - e^-2v)
        const Vec<T> by_log_scale = -(near * near_tail + (v + z) * far_tail + by_width);
        result.by_log_scale = where(log_scale < constants.min_log_scale, zero, by_log_scale);
    }
    return result;
}

// The pixels of one tile: which they are, and where they are in a tensor.
template <class T>
struct Tile {
    int64_t first;
    int count;
    int64_t n[kLanes<T>], h[kLanes<T>], w[kLanes<T>];

    // Lanes beyond the last pixel repeat it: they are read, but not written.
    Tile(const LogisticMixtureNll& job, int64_t first) : first(first) {
        const int64_t area = job.height * job.width, left = job.batch * area - first;
        count = left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
        for (int i = 0; i < kLanes<T>; ++i) {
            const int64_t pixel = first + (i < count ? i : count - 1);
            n[i] = pixel / area;
            h[i] = pixel % area / job.width;
            w[i] = pixel % job.width;
        }
    }
};

template <class T, class U>
struct Pixels {
    U* at[kLanes<T>];  // channel 0 of each pixel
    int64_t stride;    // between channels
    bool adjacent;     // whether the pixels are neighbours in memory

    Pixels(const Tile<T>& tile, const PixelTensor<U>& tensor) : stride(tensor.c), adjacent(tile.count == kLanes<T>) {
        for (int i = 0; i < kLanes<T>; ++i) {
            at[i] = tensor.data + tile.n[i] * tensor.n + tile.h[i] * tensor.h + tile.w[i] * tensor.w;
            adjacent = adjacent && at[i] == at[0] + i;
        }
    }
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTGEN_TRANSPOSE
#endif
#endif

#ifdef FASTGEN_TRANSPOSE

// The elements of the lower, or the upper, halves of a and b in turn.
template <class T, int... i>
FASTGEN_INLINE Vec<T> lower_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (i / 2 + i % 2 * kLanes<T>)...);
}
template <class T, int... i>
FASTGEN_INLINE Vec<T> upper_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (i / 2 + i % 2 * kLanes<T> + kLanes<T> / 2)...);
}

// Rows to columns: interleaves the first half of the rows with the second, log2(kLanes) times.
template <class T>
FASTGEN_INLINE void transpose(Vec<T>* rows) {
    constexpr int lanes = kLanes<T>;
    constexpr std::make_integer_sequence<int, lanes> each{};
#pragma GCC unroll 4
    for (int size = 1; size < lanes; size *= 2) {
        Vec<T> next[lanes];
#pragma GCC unroll 8
        for (int i = 0; i < lanes / 2; ++i) {
            next[2 * i] = lower_halves<T>(rows[i], rows[i + lanes / 2], each);
            next[2 * i + 1] = upper_halves<T>(rows[i], rows[i + lanes / 2], each);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = next[i];
    }
}

template <class T>
void load_dense_pixels(const T* const* from, int64_t params, T* to) {
    constexpr int lanes = kLanes<T>;
    Vec<T> rows[lanes];
    int64_t p = 0;
    for (; p + lanes <= params; p += lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = load(from[i] + p);
        transpose<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(to + (p + i) * lanes, rows[i]);
    }
    const int left = static_cast<int>(params - p);
    if (left == 0) return;
    for (int i = 0; i < lanes; ++i) rows[i] = load_n(from[i] + p, left);
    transpose<T>(rows);
    for (int i = 0; i < left; ++i) store(to + (p + i) * lanes, rows[i]);
}

template <class T>
void store_dense_pixels(const T* from, int64_t params, int count, T* const* to) {
    constexpr int lanes = kLanes<T>;
    Vec<T> rows[lanes];
    int64_t p = 0;
    for (; p + lanes <= params; p += lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = load(from + (p + i) * lanes);
        transpose<T>(rows);
        for (int i = 0; i < count; ++i) store(to[i] + p, rows[i]);
    }
    const int left = static_cast<int>(params - p);
    if (left == 0) return;
    for (int i = 0; i < lanes; ++i) rows[i] = i < left ? load(from + (p + i) * lanes) : Vec<T>{};
    transpose<T>(rows);
    for (int i = 0; i < count; ++i) store_n(to[i] + p, rows[i], left);
}

#endif

template <class T>
void load_tile(const Pixels<T, const T>& from, int64_t params, T* to) {
    constexpr int lanes = kLanes<T>;
    if (from.adjacent) {
        for (int64_t p = 0; p < params; ++p) store(to + p * lanes, load(from.at[0] + p * from.stride));
        return;
    }
#ifdef FASTGEN_TRANSPOSE
    if (from.stride == 1) return load_dense_pixels(from.at, params, to);
#endif
    for (int64_t p = 0; p < params; ++p) {
        for (int i = 0; i < lanes; ++i) to[p * lanes + i] = from.at[i][p * from.stride];
    }
}

template <class T>
void store_tile(const T* from, int64_t params, int count, const Pixels<T, T>& to) {
    constexpr int lanes = kLanes<T>;
    if (to.adjacent) {
        for (int64_t p = 0; p < params; ++p) store(to.at[0] + p * to.stride, load(from + p * lanes));
        return;
    }
#ifdef FASTGEN_TRANSPOSE
    if (to.stride == 1) return store_dense_pixels(from, params, count, to.at);
#endif
    for (int64_t p = 0; p < params; ++p) {
        for (int i = 0; i < count; ++i) to.at[i][p * to.stride] = from[p * lanes + i];
    }
}

// What a thread needs for a tile. Each array is [...][kLanes].
template <class T>
struct Scratch {
    T *params, *linear, *ratio;

    static int64_t size(const LogisticMixtureNll& job) {
        return (logistic_mixture_params(job.colours, job.components) + 2 * job.components) * kLanes<T>;
    }
    Scratch(const LogisticMixtureNll& job, T* memory)
        : params(memory),
          linear(memory + logistic_mixture_params(job.colours, job.components) * kLanes<T>),
          ratio(linear + job.components * kLanes<T>) {}
};

// The levels of a tile's pixels, and what the network reads for them.
template <int kColours, class T>
struct Values {
    Vec<T> level[kColours], x[kColours];

    Values(const Constants<T>& constants, const Pixels<T, const uint8_t>& images) {
        for (int c = 0; c < kColours; ++c) {
            for (int i = 0; i < kLanes<T>; ++i) level[c][i] = images.at[i][c * images.stride];
            x[c] = level[c] * (constants.half + constants.half) - broadcast(T(1));
        }
    }
};

// The joint mass of component k, as (linear, ratio). With kGradient the derivatives of its logarithm replace the
// parameters: `own` are the component's means, others follow in steps of `row`.
template <bool kGradient, int kColours, class T>
FASTGEN_INLINE void component(const Constants<T>& constants, const Values<kColours, T>& values, T* own, int64_t row,
                              Vec<T>& linear, Vec<T>& ratio) {
    constexpr int kinds = logistic_mixture_kinds(kColours);
    Vec<T> coefficient[kColours];
    if constexpr (kColours == 3) {
        for (int c = 0; c < 3; ++c) coefficient[c] = tanh(load(own + (c * kinds + 2) * row));
    }
    for (int c = 0; c < kColours; ++c) {
        T* const params = own + c * kinds * row;
        Vec<T> mean = load(params);
        for (int i = 0; i < c; ++i) mean = fma(coefficient[c - 1 + i], values.x[i], mean);
        const Mass<T> one = mass<kGradient>(constants, values.level[c], values.x[c], mean, load(params + row));
        linear = linear + one.linear;
        ratio = ratio * one.ratio;
        if constexpr (kGradient) {
            store(params, one.by_mean);
            store(params + row, one.by_log_scale);
            for (int i = 0; i < c; ++i) {
                const Vec<T> t = coefficient[c - 1 + i];
                store(own + ((c - 1 + i) * kinds + 2) * row, one.by_mean * values.x[i] * (broadcast(T(1)) - t * t));
            }
        }
    }
}

// The result of a tile. With kGradient, `grad` times its derivatives replace the parameters.
template <bool kGradient, int kColours, class T>
FASTGEN_INLINE Vec<T> tile_nll(const LogisticMixtureNll& job, const Constants<T>& constants,
                               const Pixels<T, const uint8_t>& images, const Scratch<T>& scratch, Vec<T> grad) {
    constexpr int lanes = kLanes<T>;
    const int64_t row = job.components * lanes;
    const Values<kColours, T> values(constants, images);

    Vec<T> largest = load(scratch.params);
    for (int64_t at = lanes; at < row; at += lanes) largest = max(largest, load(scratch.params + at));

    Vec<T> logits_sum{}, largest_linear = broadcast(-16 * Limits<T>::far);
    for (int64_t at = 0; at < row; at += lanes) {
        Vec<T> linear = load(scratch.params + at) - largest, ratio = broadcast(T(1));
        const Vec<T> weight = exp(linear);
        logits_sum = logits_sum + weight;
        if (kGradient) store(scratch.params + at, weight);
        component<kGradient, kColours, T>(constants, values, scratch.params + row + at, row, linear, ratio);
        largest_linear = max(largest_linear, linear);
        store(scratch.linear + at, linear);
        store(scratch.ratio + at, ratio);
    }

    Vec<T> sum{};
    for (int64_t at = 0; at < row; at += lanes) {
        const Vec<T> weight = exp(load(scratch.linear + at) - largest_linear) * load(scratch.ratio + at);
        sum = sum + weight;
        if (kGradient) store(scratch.ratio + at, weight);
    }
    if constexpr (kGradient) {
        const Vec<T> prior_scale = grad / logits_sum, posterior_scale = -grad / sum;
        for (int64_t at = 0; at < row; at += lanes) {
            const Vec<T> posterior = load(scratch.ratio + at) * posterior_scale;
            T* const params = scratch.params + at;
            store(params, fma(load(params), prior_scale, posterior));
            for (int i = 1; i <= kColours * logistic_mixture_kinds(kColours); ++i) {
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
            const Tile<T> tile(job, first);
            load_tile(Pixels<T, const T>(tile, params), count, scratch.params);
            const Pixels<T, const uint8_t> levels(tile, images);
            Vec<T> scale{};
            if (kGradient) {
                const Pixels<T, const T> of_nll(tile, grad);
                for (int i = 0; i < kLanes<T>; ++i) scale[i] = *of_nll.at[i];
            }
            const Vec<T> result = tile_nll<kGradient, kColours, T>(job, constants, levels, scratch, scale);
            if (nll) store_n(nll + first, result, tile.count);
            if (kGradient) store_tile(scratch.params, count, tile.count, Pixels<T, T>(tile, gradient));
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

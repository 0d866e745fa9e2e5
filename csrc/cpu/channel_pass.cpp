// fastgen: per-isa
// With z the result of the convolution, per channel:
//
//     mean = E[z],  var = E[(z - mean)^2],  x = (z - mean) / sqrt(var + eps),  output = activation(scale * z + shift)
//
//     g  = dL/d output * activation'(scale * z + shift)          dL/d shift and scale of the BatchNorm: sum g, sum g x
//     dz = scale * (g - mean(g) - x * mean(g x))                 without the two means where x does not depend on the batch
//
// Arrays of few channels are read as if they had several times as many, so that rows are at least a few vectors long.
// Sums over positions run in chunks that depend on the shape alone, in T for a few rows and in double beyond; threads do
// not change the bits.

#include "channel_pass.h"

#include <omp.h>

#include "integers.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kShortestRow = 64;
constexpr int64_t kRowsInT = 16;     // summed before they are added in double
constexpr int64_t kMaxChunks = 64;   // partial sums
constexpr int64_t kColumnLines = 4;  // cache lines of a row that are summed together

// The arrays of a pass, as rows of `width` elements, and its vectors, spread to that width.
template <class T>
struct Rows {
    const ChannelPass<T>& pass;
    T* scratch;

    FASTGEN_INLINE int64_t repeats() const { return ceil_div(kShortestRow, pass.channels); }
    FASTGEN_INLINE int64_t width() const { return repeats() * pass.channels; }
    FASTGEN_INLINE int64_t padded() const { return aligned<T>(width()); }
    FASTGEN_INLINE int64_t elements() const { return pass.positions * pass.channels; }
    FASTGEN_INLINE int64_t rows() const { return ceil_div(elements(), width()); }
    FASTGEN_INLINE int64_t chunks() const { return min_of(kMaxChunks, ceil_div(rows(), kRowsInT)); }

    static constexpr int64_t kVectors = 6;
    FASTGEN_INLINE T* vector(int64_t i) const { return scratch + i * padded(); }
    FASTGEN_INLINE double* partial(int64_t chunk) const {  // two sums for each column
        return reinterpret_cast<double*>(scratch + kVectors * padded()) + chunk * 2 * padded();
    }
    FASTGEN_INLINE int64_t scratch_size() const {
        return kVectors * padded() + chunks() * 2 * padded() * static_cast<int64_t>(sizeof(double) / sizeof(T));
    }

    // A missing vector is `missing` everywhere.
    void spread(int64_t i, const T* values, T missing) const {
        T* to = vector(i);
        for (int64_t done = 0; done < padded(); done += pass.channels) {
            const int64_t count = min_of(pass.channels, padded() - done);
            for (int64_t c = 0; c < count; ++c) to[done + c] = values ? values[c] : missing;
        }
    }

    // Calls body(element, column, lanes) for all vectors of all rows.
    template <class Body>
    void for_each(const Body& body) const {
#pragma omp parallel for schedule(static) num_threads(pass.threads)
        for (int64_t row = 0; row < rows(); ++row) {
            const int64_t length = min_of(width(), elements() - row * width());
            for (int64_t j = 0; j < length; j += kLanes<T>) body(row * width() + j, j, lanes_below<T>(length - j));
        }
    }

    // Sums two values per element over positions: value(element, column, lanes, out) writes two vectors.
    template <class Value>
    void sum(const Value& value, double* first, double* second) const {
#pragma omp parallel for schedule(static) num_threads(pass.threads)
        for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
            const int64_t begin = rows() * chunk / chunks(), end = rows() * (chunk + 1) / chunks();
            for (int64_t j = 0; j < width(); j += kColumnLines * kPanel<T>)
                sum_columns(begin, end, j, partial(chunk), value);
        }
        add_up(0, first);
        if (second) add_up(1, second);
    }

    // One of the two sums of each channel, over chunks and repetitions.
    void add_up(int64_t which, double* totals) const {
        for (int64_t c = 0; c < pass.channels; ++c) totals[c] = 0.0;
        for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
            const double* sums = partial(chunk) + which * padded();
            for (int64_t repeat = 0; repeat < repeats(); ++repeat, sums += pass.channels) {
                for (int64_t c = 0; c < pass.channels; ++c) totals[c] += sums[c];
            }
        }
    }

    template <class Value>
    void sum_columns(int64_t begin, int64_t end, int64_t column, double* sums, const Value& value) const {
        constexpr int64_t kVecs = kColumnLines * kPanel<T> / kLanes<T>;
        const int64_t vecs = min_of(kVecs, (padded() - column) / kLanes<T>);
        double totals[2][kVecs * kLanes<T>] = {};
        for (int64_t first = begin; first < end; first += kRowsInT) {
            Vec<T> acc[2][kVecs] = {};
            for (int64_t row = first; row < min_of(end, first + kRowsInT); ++row) {
                const int64_t length = min_of(width(), elements() - row * width()) - column;
#pragma GCC unroll 16
                for (int64_t v = 0; v < kVecs; ++v) {  // of constant indices, so that sums stay in registers
                    const int lanes = lanes_below<T>(min_of(length, padded() - column) - v * kLanes<T>);
                    if (lanes == 0) break;
                    Vec<T> values[2];
                    value(row * width() + column + v * kLanes<T>, column + v * kLanes<T>, lanes, values);
                    acc[0][v] += keep(values[0], lanes);
                    acc[1][v] += keep(values[1], lanes);
                }
            }
            for (int64_t i = 0; i < 2; ++i) {
                for (int64_t v = 0; v < vecs; ++v) {
                    for (int64_t l = 0; l < kLanes<T>; ++l) totals[i][v * kLanes<T> + l] += acc[i][v][l];
                }
            }
        }
        for (int64_t i = 0; i < 2; ++i) {
            for (int64_t j = 0; j < vecs * kLanes<T>; ++j) sums[i * padded() + column + j] = totals[i][j];
        }
    }

    // The first lanes, and zeros.
    static FASTGEN_INLINE Vec<T> keep(Vec<T> x, int lanes) {
        if (lanes == kLanes<T>) return x;
        T copy[kLanes<T>];
        store(copy, x);
        return load_n(copy, lanes);
    }
};

enum VectorName : int64_t { kScale, kShift, kMean, kInverseStd, kGradMean, kGradNormalisedMean };

template <class T>
void spread_vectors(const Rows<T>& rows) {
    rows.spread(kScale, rows.pass.scale, T(1));
    rows.spread(kShift, rows.pass.shift, T(0));
    rows.spread(kMean, rows.pass.mean, T(0));
    rows.spread(kInverseStd, rows.pass.inverse_std, T(1));
}

// mean and var are vectors of the pass, [channels]; their sums are kept in the scratch, in double.
template <class T>
void statistics(const Rows<T>& rows, T* mean, T* var, double* sums) {
    const ChannelPass<T>& pass = rows.pass;
    rows.sum(
        [&](int64_t at, int64_t, int lanes, Vec<T>* out) __attribute__((always_inline)) {
            out[0] = load_some(pass.conv + at, lanes);
            out[1] = Vec<T>{};
        },
        sums, nullptr);
    for (int64_t c = 0; c < pass.channels; ++c) mean[c] = static_cast<T>(sums[c] / pass.positions);
    rows.spread(kMean, mean, T(0));
    const T* means = rows.vector(kMean);
    // The first sum corrects for the rounding of the mean.
    double* squares = sums + pass.channels;
    rows.sum(
        [&](int64_t at, int64_t j, int lanes, Vec<T>* out) __attribute__((always_inline)) {
            out[0] = load_some(pass.conv + at, lanes) - load(means + j);
            out[1] = out[0] * out[0];
        },
        sums, squares);
    for (int64_t c = 0; c < pass.channels; ++c) {
        const double offset = sums[c] / pass.positions;
        var[c] = static_cast<T>(squares[c] / pass.positions - offset * offset);
    }
}

template <Activation A, class T>
void forward(const Rows<T>& rows, T* output) {
    const ChannelPass<T>& pass = rows.pass;
    const T *scale = rows.vector(kScale), *shift = rows.vector(kShift);
    const Vec<T> parameter = broadcast(pass.parameter);
    rows.for_each([&](int64_t at, int64_t j, int lanes) __attribute__((always_inline)) {
        const Vec<T> z = load_some(pass.conv + at, lanes);
        store_some(output + at, activate<A>(fma(z, load(scale + j), load(shift + j)), parameter), lanes);
    });
}

template <Activation A, class T>
void reductions(const Rows<T>& rows, double* first, double* second) {
    const ChannelPass<T>& pass = rows.pass;
    const T *scale = rows.vector(kScale), *shift = rows.vector(kShift);
    const T *mean = rows.vector(kMean), *inverse_std = rows.vector(kInverseStd);
    const Vec<T> parameter = broadcast(pass.parameter);
    rows.sum(
        [&](int64_t at, int64_t j, int lanes, Vec<T>* out) __attribute__((always_inline)) {
            const Vec<T> z = load_some(pass.conv + at, lanes);
            const Vec<T> before = fma(z, load(scale + j), load(shift + j));
            out[0] = load_some(pass.grad + at, lanes) * activation_gradient<A>(before, parameter);
            out[1] = out[0] * ((z - load(mean + j)) * load(inverse_std + j));
        },
        first, second);
}

template <Activation A, class T>
void backward(const Rows<T>& rows, T* result) {
    const ChannelPass<T>& pass = rows.pass;
    const T *scale = rows.vector(kScale), *shift = rows.vector(kShift);
    const T *mean = rows.vector(kMean), *inverse_std = rows.vector(kInverseStd);
    const T *grad_mean = rows.vector(kGradMean), *grad_normalised_mean = rows.vector(kGradNormalisedMean);
    const Vec<T> parameter = broadcast(pass.parameter);
    rows.for_each([&](int64_t at, int64_t j, int lanes) __attribute__((always_inline)) {
        const Vec<T> z = load_some(pass.conv + at, lanes);
        const Vec<T> before = fma(z, load(scale + j), load(shift + j));
        const Vec<T> g = load_some(pass.grad + at, lanes) * activation_gradient<A>(before, parameter);
        const Vec<T> x = (z - load(mean + j)) * load(inverse_std + j);
        const Vec<T> centred = g - load(grad_mean + j) - x * load(grad_normalised_mean + j);
        store_some(result + at, load(scale + j) * centred, lanes);
    });
}

}  // namespace

#define FASTGEN_DEFINE_CHANNEL_PASS(T)                                                                              \
    int64_t channel_pass_scratch_size(const ChannelPass<T>& pass) {                                                 \
        return Rows<T>{pass, nullptr}.scratch_size() +                                                              \
               2 * aligned<T>(pass.channels) * static_cast<int64_t>(sizeof(double) / sizeof(T));                    \
    }                                                                                                               \
    void channel_statistics(const ChannelPass<T>& pass, T* mean, T* var, T* scratch) {                              \
        const Rows<T> rows{pass, scratch};                                                                          \
        statistics(rows, mean, var, reinterpret_cast<double*>(scratch + rows.scratch_size()));                      \
    }                                                                                                               \
    void channel_forward(const ChannelPass<T>& pass, T* output, T* scratch) {                                       \
        const Rows<T> rows{pass, scratch};                                                                          \
        spread_vectors(rows);                                                                                       \
        with_activation(pass.activation, [&](auto tag) { forward<decltype(tag)::value>(rows, output); });           \
    }                                                                                                               \
    void channel_reductions(const ChannelPass<T>& pass, T* grad_sum, T* grad_normalised_sum, T* scratch) {          \
        const Rows<T> rows{pass, scratch};                                                                          \
        spread_vectors(rows);                                                                                       \
        double* first = reinterpret_cast<double*>(scratch + rows.scratch_size());                                   \
        double* second = first + pass.channels;                                                                     \
        with_activation(pass.activation, [&](auto tag) { reductions<decltype(tag)::value>(rows, first, second); }); \
        for (int64_t c = 0; c < pass.channels; ++c) {                                                               \
            grad_sum[c] = static_cast<T>(first[c]);                                                                 \
            grad_normalised_sum[c] = static_cast<T>(second[c]);                                                     \
        }                                                                                                           \
    }                                                                                                               \
    void channel_backward(const ChannelPass<T>& pass, const T* grad_mean, const T* grad_normalised_mean, T* result, \
                          T* scratch) {                                                                             \
        const Rows<T> rows{pass, scratch};                                                                          \
        spread_vectors(rows);                                                                                       \
        rows.spread(kGradMean, grad_mean, T(0));                                                                    \
        rows.spread(kGradNormalisedMean, grad_normalised_mean, T(0));                                               \
        with_activation(pass.activation, [&](auto tag) { backward<decltype(tag)::value>(rows, result); });          \
    }

FASTGEN_DEFINE_CHANNEL_PASS(float)
FASTGEN_DEFINE_CHANNEL_PASS(double)

}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
// Training of the fused block. With z the result of the convolution, per channel:
//
//     mean = E[z],  var = E[(z - mean)^2],  x = (z - mean) / sqrt(var + eps),  output = activation(scale * z + shift)
//
//     g  = dL/d output * activation'(scale * z + shift)          dL/d shift and scale of the BatchNorm: sum g, sum g x
//     dz = scale * (g - mean(g) - x * mean(g x))                 without the two means where x does not depend on the batch
//
// and, o over output and i over input channels, (Y, X) = (y, x) * stride - padding + (ky, kx) * dilation:
//
//     dL/d weight[i, o, ky, kx] = sum over n, y, x of  input[n, y, x, i] * dz[n, Y, X, o]
//
// Arrays of few channels are read as if they had several times as many, so that rows are at least a few vectors long.
// Sums over positions run in chunks that depend on the shape alone, in T for a few rows and in double beyond; threads do
// not change the bits.
//
// The weight gradient is one tap-GEMM for each kernel element: rows are input channels, columns output channels, the sum
// runs along lines of the image. Of few output channels, the kernel elements of a row stand side by side as further columns:
// in memory they are neighbours.

#include "conv_transpose2d_bn_act.h"

#include <omp.h>

#include "integers.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

FASTGEN_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

template <class T>
FASTGEN_INLINE int lanes_below(int64_t count) {
    return static_cast<int>(min_of(max_of(count, 0), kLanes<T>));
}

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
        for (int64_t j = 0; j < padded(); ++j) vector(i)[j] = values ? values[j % pass.channels] : missing;
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
        for (int64_t c = 0; c < pass.channels; ++c) {
            double totals[2] = {};
            for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
                for (int64_t j = c; j < width(); j += pass.channels) {
                    totals[0] += partial(chunk)[j];
                    totals[1] += partial(chunk)[padded() + j];
                }
            }
            first[c] = totals[0];
            if (second) second[c] = totals[1];
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
                for (int64_t v = 0; v < vecs; ++v) {
                    const int lanes = lanes_below<T>(length - v * kLanes<T>);
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

template <class T>
FASTGEN_INLINE Vec<T> load_lanes(const T* p, int lanes) {
    return lanes == kLanes<T> ? load(p) : load_n(p, lanes);
}

template <class T>
FASTGEN_INLINE void store_lanes(T* p, Vec<T> x, int lanes) {
    if (lanes == kLanes<T>)
        store(p, x);
    else
        store_n(p, x, lanes);
}

// mean and var are vectors of the pass, [channels]; their sums are kept in the scratch, in double.
template <class T>
void statistics(const Rows<T>& rows, T* mean, T* var, double* sums) {
    const ChannelPass<T>& pass = rows.pass;
    rows.sum(
        [&](int64_t at, int64_t, int lanes, Vec<T>* out) __attribute__((always_inline)) {
            out[0] = load_lanes(pass.conv + at, lanes);
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
            out[0] = load_lanes(pass.conv + at, lanes) - load(means + j);
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
        const Vec<T> z = load_lanes(pass.conv + at, lanes);
        store_lanes(output + at, activate<A>(fma(z, load(scale + j), load(shift + j)), parameter), lanes);
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
            const Vec<T> z = load_lanes(pass.conv + at, lanes);
            const Vec<T> before = fma(z, load(scale + j), load(shift + j));
            out[0] = load_lanes(pass.grad + at, lanes) * activation_gradient<A>(before, parameter);
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
        const Vec<T> z = load_lanes(pass.conv + at, lanes);
        const Vec<T> before = fma(z, load(scale + j), load(shift + j));
        const Vec<T> g = load_lanes(pass.grad + at, lanes) * activation_gradient<A>(before, parameter);
        const Vec<T> x = (z - load(mean + j)) * load(inverse_std + j);
        const Vec<T> centred = g - load(grad_mean + j) - x * load(grad_normalised_mean + j);
        store_lanes(result + at, load(scale + j) * centred, lanes);
    });
}

template <class T>
struct WeightGradient {
    const ConvTransposeShape& shape;
    const Image<T>& input;
    const T* grad;
    T* result;
    T* scratch;

    static constexpr int64_t kBlockPositions = 512;  // of a product: they amortise loading and storing the tile

    FASTGEN_INLINE int64_t all_out() const { return shape.groups * shape.out_channels; }
    // Whether the kernel elements of a row are columns of one product.
    FASTGEN_INLINE bool side_by_side() const {
        return shape.groups == 1 && shape.dilation[1] == 1 && shape.out_channels < kPanel<T>;
    }
    FASTGEN_INLINE int64_t products() const {
        return shape.groups * shape.kernel[0] * (side_by_side() ? 1 : shape.kernel[1]);
    }
    FASTGEN_INLINE int64_t columns() const {
        return aligned<T>(shape.out_channels * (side_by_side() ? shape.kernel[1] : 1));
    }
    FASTGEN_INLINE int64_t parts() const {  // of the rows of a product, where products are few
        return min_of(ceil_div(shape.threads, products()), shape.in_channels);
    }
    FASTGEN_INLINE int64_t lines() const { return shape.batch * shape.in_size[0]; }
    // 1x1 maps: the sum of a product runs over images instead.
    FASTGEN_INLINE bool lines_are_dots() const { return shape.in_size[0] == 1 && shape.in_size[1] == 1; }
    FASTGEN_INLINE int64_t block_lines() const { return max_of(1, kBlockPositions / shape.in_size[1]); }
    FASTGEN_INLINE int64_t sums_size() const { return products() * shape.in_channels * columns(); }
    FASTGEN_INLINE int64_t taps_size() const {
        return aligned<T>(block_lines() * static_cast<int64_t>(sizeof(Tap<T>) / sizeof(T)));
    }
    FASTGEN_INLINE int64_t scratch_size() const { return sums_size() + shape.threads * taps_size(); }
    FASTGEN_INLINE T* sums(int64_t product) const { return scratch + product * shape.in_channels * columns(); }

    // Output coordinate of input coordinate `at` through kernel element k.
    FASTGEN_INLINE int64_t target(int axis, int64_t at, int64_t k) const {
        return at * shape.stride[axis] - shape.padding[axis] + k * shape.dilation[axis];
    }

    // One part of the channels of one product, over some lines.
    struct Piece {
        const WeightGradient& gradient;
        Tap<T>* taps;
        int64_t product, part;

        // Adds positions x0..x1-1 of lines first..last-1, through the kernel elements kx0..kx1-1 of a row.
        void add(int64_t first, int64_t last, int64_t x0, int64_t x1, int64_t kx0, int64_t kx1) const {
            const WeightGradient& g = gradient;
            const ConvTransposeShape& s = g.shape;
            const int64_t per_row = g.side_by_side() ? 1 : s.kernel[1];
            const int64_t ky = product / per_row % s.kernel[0], group = product / per_row / s.kernel[0];
            const int64_t row0 = s.in_channels * part / g.parts(), row1 = s.in_channels * (part + 1) / g.parts();
            const int64_t image = s.out_size[0] * s.out_size[1] * g.all_out();
            const bool dots = g.lines_are_dots();
            int64_t count = 0;
            for (int64_t line = first; line < last && x0 < x1; ++line) {
                const int64_t n = line / s.in_size[0], y = line % s.in_size[0], to = g.target(0, y, ky);
                if (to < 0 || to >= s.out_size[0]) continue;
                const T* a =
                    g.input.data + n * g.input.n + y * g.input.h + x0 * g.input.w + group * s.in_channels + row0;
                const T* b = g.grad + n * image + (to * s.out_size[1] + g.target(1, x0, kx0)) * g.all_out() +
                             group * s.out_channels;
                taps[count++] = {a, 1, dots ? g.input.n : g.input.w, dots ? last - first : x1 - x0, b};
                if (dots) break;
            }
            if (count == 0) return;
            const int64_t b_stride = dots ? image : s.stride[1] * g.all_out();
            T* c = g.sums(product) + row0 * g.columns() + (g.side_by_side() ? kx0 * s.out_channels : 0);
            tap_gemm({taps, count, kPanel<T>, b_stride, c, g.columns(), c, g.columns(), row1 - row0,
                      (kx1 - kx0) * s.out_channels});
        }

        void add_lines(int64_t first, int64_t last) const {
            const WeightGradient& g = gradient;
            const ConvTransposeShape& s = g.shape;
            const int64_t stride = s.stride[1], width = s.in_size[1];
            if (!g.side_by_side()) {
                const int64_t kx = product % s.kernel[1], at_zero = g.target(1, 0, kx);
                const int64_t x0 = max_of(0, -floor_div(at_zero, stride));
                const int64_t x1 = min_of(width, floor_div(s.out_size[1] - 1 - at_zero, stride) + 1);
                return add(first, last, x0, x1, kx, kx + 1);
            }
            // Positions from which the same kernel elements reach the output go together.
            const auto first_kx = [&](int64_t x) { return max_of(0, -g.target(1, x, 0)); };
            const auto last_kx = [&](int64_t x) { return min_of(s.kernel[1], s.out_size[1] - g.target(1, x, 0)); };
            for (int64_t x0 = 0, x1 = 0; x0 < width; x0 = x1) {
                const int64_t kx0 = first_kx(x0), kx1 = last_kx(x0);
                for (x1 = x0 + 1; x1 < width && first_kx(x1) == kx0 && last_kx(x1) == kx1;) ++x1;
                if (kx0 < kx1) add(first, last, x0, x1, kx0, kx1);
            }
        }
    };

    void finish(int64_t channel) const {
        const int64_t group = channel / shape.in_channels, row = channel % shape.in_channels;
        T* to = result + channel * shape.out_channels * shape.kernel[0] * shape.kernel[1];
        for (int64_t o = 0; o < shape.out_channels; ++o) {
            for (int64_t ky = 0; ky < shape.kernel[0]; ++ky) {
                for (int64_t kx = 0; kx < shape.kernel[1]; ++kx) {
                    const int64_t line = group * shape.kernel[0] + ky;
                    const T* from =
                        side_by_side() ? sums(line) + kx * shape.out_channels : sums(line * shape.kernel[1] + kx);
                    *to++ = from[row * columns() + o];
                }
            }
        }
    }

    void run() const {
        const int64_t pieces = products() * parts();
#pragma omp parallel num_threads(shape.threads)
        {
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            Tap<T>* taps = reinterpret_cast<Tap<T>*>(scratch + sums_size() + thread * taps_size());
#pragma omp for schedule(static)
            for (int64_t i = 0; i < sums_size(); ++i) scratch[i] = T(0);
            // Every piece has all of its lines added by one thread, in order; a block of lines serves all the thread's
            // pieces while it is in the cache.
            const int64_t begin = pieces * thread / threads, end = pieces * (thread + 1) / threads;
            for (int64_t line = 0; line < lines(); line += block_lines()) {
                const int64_t last = min_of(line + block_lines(), lines());
                for (int64_t i = begin; i < end; ++i)
                    Piece{*this, taps, i / parts(), i % parts()}.add_lines(line, last);
            }
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t c = 0; c < shape.groups * shape.in_channels; ++c) finish(c);
        }
    }
};

}  // namespace

#define FASTGEN_DEFINE_CONV_TRANSPOSE2D_BN_ACT(T)                                                                   \
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
    }                                                                                                               \
    int64_t conv_transpose_weight_scratch_size(const ConvTransposeShape& shape, const T*) {                         \
        return WeightGradient<T>{shape, {}, nullptr, nullptr, nullptr}.scratch_size();                              \
    }                                                                                                               \
    void conv_transpose_weight_gradient(const ConvTransposeShape& shape, const Image<T>& input, const T* grad,      \
                                        T* result, T* scratch) {                                                    \
        WeightGradient<T>{shape, input, grad, result, scratch}.run();                                               \
    }

FASTGEN_DEFINE_CONV_TRANSPOSE2D_BN_ACT(float)
FASTGEN_DEFINE_CONV_TRANSPOSE2D_BN_ACT(double)

}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
// With i over input and o over output channels of a transposed convolution, (Y, X) = (y, x) * stride - padding + (ky, kx)
// * dilation:
//
//     dL/d weight[i, o, ky, kx] = sum over n, y, x of  input[n, y, x, i] * grad[n, Y, X, o]
//
// There are two ways. Directly: one tap-GEMM for each kernel element, whose rows are input channels, whose columns are
// output channels, and whose sum runs along lines of the image. Of few output channels, the kernel elements of a row stand
// side by side as further columns: in memory they are neighbours.
//
// By minimal filtering (minimal_filter.h), where along both axes every stride-th kernel element makes a filter of two or
// three taps: the gradients w_t = sum_j a_j b_(j+t) of a filter over a tile of the input, a, and the tile of the gradient
// that these taps read, b, are what a filter of the a_j makes of the b_j. So both tiles are transformed to their points,
// every point is a product over the tiles of all images, and their sums are transformed to the gradients at the end. Tiles
// of two input pixels (of two taps) do without one point, as there; tiles are ordered so that those that have a point
// follow one another.
//
// Sums do not depend on the number of threads.

#include "conv_weight_gradient.h"

#include <omp.h>

#include <type_traits>

#include "conv_products.h"
#include "integers.h"
#include "minimal_filter.h"
#include "phase_plan.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class T>
struct Direct {
    const WeightGradientShape& shape;
    const Image<T>& input;
    const Image<T>& grad;
    T* result;
    T* scratch;

    static constexpr int64_t kBlockPositions = 512;  // of a product: they amortise loading and storing the tile

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

    // Some rows of one product, over some lines.
    struct Piece {
        const Direct& gradient;
        Tap<T>* taps;
        int64_t product, row0, row1;

        // Adds positions x0..x1-1 of lines first..last-1, through the kernel elements kx0..kx1-1 of a row.
        void add(int64_t first, int64_t last, int64_t x0, int64_t x1, int64_t kx0, int64_t kx1) const {
            const Direct& g = gradient;
            const WeightGradientShape& s = g.shape;
            const int64_t per_row = g.side_by_side() ? 1 : s.kernel[1];
            const int64_t ky = product / per_row % s.kernel[0], group = product / per_row / s.kernel[0];
            const bool dots = g.lines_are_dots();
            int64_t count = 0;
            for (int64_t line = first; line < last && x0 < x1; ++line) {
                const int64_t n = line / s.in_size[0], y = line % s.in_size[0], to = g.target(0, y, ky);
                if (to < 0 || to >= s.out_size[0]) continue;
                const T* a =
                    g.input.data + n * g.input.n + y * g.input.h + x0 * g.input.w + group * s.in_channels + row0;
                const T* b = g.grad.data + n * g.grad.n + to * g.grad.h + g.target(1, x0, kx0) * g.grad.w +
                             group * s.out_channels;
                taps[count++] = {a, 1, dots ? g.input.n : g.input.w, dots ? last - first : x1 - x0, b};
                if (dots) break;
            }
            if (count == 0) return;
            const int64_t b_stride = dots ? g.grad.n : s.stride[1] * g.grad.w;
            T* c = g.sums(product) + row0 * g.columns() + (g.side_by_side() ? kx0 * s.out_channels : 0);
            tap_gemm({taps, count, kPanel<T>, b_stride, c, g.columns(), c, g.columns(), row1 - row0,
                      (kx1 - kx0) * s.out_channels});
        }

        void add_lines(int64_t first, int64_t last) const {
            const Direct& g = gradient;
            const WeightGradientShape& s = g.shape;
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
        const int64_t rows = products() * shape.in_channels;
#pragma omp parallel num_threads(shape.threads)
        {
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            Tap<T>* taps = reinterpret_cast<Tap<T>*>(scratch + sums_size() + thread * taps_size());
#pragma omp for schedule(static)
            for (int64_t i = 0; i < sums_size(); ++i) scratch[i] = T(0);
            // Every row of a product has all of its lines added by one thread, in order; a block of lines serves all the
            // thread's rows while it is in the cache.
            const int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
            for (int64_t line = 0; line < lines(); line += block_lines()) {
                const int64_t last = min_of(line + block_lines(), lines());
                for (int64_t row = begin, next; row < end; row = next) {
                    const int64_t product = row / shape.in_channels, first = product * shape.in_channels;
                    next = min_of(end, first + shape.in_channels);
                    Piece{*this, taps, product, row - first, next - first}.add_lines(line, last);
                }
            }
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t c = 0; c < shape.groups * shape.in_channels; ++c) finish(c);
        }
    }
};

template <class T>
struct Filtered {
    const WeightGradientShape& shape;
    const Image<T>& input;
    const Image<T>& grad;
    T* result;
    T* scratch;

    // Both stay in the last-level cache. More than 32 MB of scratch would be new memory in each call.
    static constexpr int64_t kSumsBytes = 8 << 20, kTilesBytes = 8 << 20;
    static constexpr int64_t kLeastTiles = 64, kMostTiles = 512;  // of a block, but the last one
    static constexpr int64_t kAllPoints = kPoints * kPoints;
    static constexpr int64_t kPieceTiles = 8;                 // that a thread transforms at a time
    static constexpr int64_t kColumnsAtOnce = 4 * kPanel<T>;  // of a product that a thread computes

    FASTGEN_INLINE int64_t taps() const { return shape.kernel[0] / shape.stride[0]; }
    FASTGEN_INLINE AxisTiles axis(int i) const { return shape.tiles(i); }
    FASTGEN_INLINE int64_t filters() const { return shape.stride[0] * shape.stride[1]; }

    // Tiles of the batch.
    static FASTGEN_INLINE bool has_point(int64_t point, int kind) {
        return (point / kPoints != kExtraPoint || is_full(0, kind)) &&
               (point % kPoints != kExtraPoint || is_full(1, kind));
    }
    FASTGEN_INLINE int64_t first_tile(int i, int kind) const { return is_full(i, kind) ? 0 : axis(i).full(); }
    FASTGEN_INLINE int64_t tiles(int i, int kind) const {
        return is_full(i, kind) ? axis(i).full() : axis(i).count() - axis(i).full();
    }
    FASTGEN_INLINE int64_t tiles(int kind) const { return shape.batch * tiles(0, kind) * tiles(1, kind); }
    FASTGEN_INLINE int64_t all_tiles() const { return shape.batch * axis(0).count() * axis(1).count(); }

    struct Tile {
        int kind;
        int64_t n, y, x;  // of its first input pixel
    };
    Tile tile(int64_t index) const {
        int kind = 0;
        for (; index >= tiles(kind); ++kind) index -= tiles(kind);
        const int64_t row = index / tiles(1, kind), n = row / tiles(0, kind);
        return {kind, n, axis(0).begin(first_tile(0, kind) + row % tiles(0, kind)),
                axis(1).begin(first_tile(1, kind) + index % tiles(1, kind))};
    }

    // Of a block of tiles that starts at `first`, the tiles with a point.
    struct Range {
        int64_t begin, end;
    };
    Range with_point(int64_t point, int64_t first, int64_t last) const {
        int64_t begin = -1, end = 0, at = 0;
        for (int kind = 0; kind < kTileKinds; at += tiles(kind++)) {
            if (!has_point(point, kind)) continue;
            if (begin < 0) begin = at;
            end = at + tiles(kind);
        }
        begin = max_of(first, min_of(last, max_of(begin, 0)));
        return {begin - first, max_of(begin, min_of(last, end)) - first};
    }

    // Scratch: the sums of all filters' points; a block of tiles of the input, and of the gradient for one filter.
    struct Sizes {
        int64_t columns;                             // of a strip of output channels
        int64_t tile_channels, tiles;                // of a block
        int64_t sums_step, inputs_step, grads_step;  // from point to point

        explicit Sizes(const Filtered& g) : tile_channels(odd_lines<T>(g.shape.in_channels)) {
            constexpr int64_t kPoint = kAllPoints * static_cast<int64_t>(sizeof(T));
            const int64_t panels = panels_of<T>(g.shape.out_channels);
            const int64_t panel_bytes = g.filters() * kPoint * g.shape.in_channels * kPanel<T>;
            const int64_t strips = ceil_div(panels, max_of(1, kSumsBytes / panel_bytes));
            columns = ceil_div(panels, strips) * kPanel<T>;
            const int64_t fitting = kTilesBytes / (kPoint * (tile_channels + columns));
            const int64_t most = max_of(kLeastTiles, min_of(kMostTiles, fitting));
            tiles = ceil_div(g.all_tiles(), ceil_div(g.all_tiles(), most));
            sums_step = odd_lines<T>(g.shape.in_channels * columns);
            inputs_step = odd_lines<T>(tiles * tile_channels);
            grads_step = odd_lines<T>(tiles * columns);
        }
    };
    FASTGEN_INLINE int64_t sums_size(const Sizes& sizes) const { return filters() * kAllPoints * sizes.sums_step; }
    int64_t scratch_size() const {
        const Sizes sizes(*this);
        return sums_size(sizes) + kAllPoints * (sizes.inputs_step + sizes.grads_step);
    }
    FASTGEN_INLINE T* sums(const Sizes& sizes, int64_t filter) const {
        return scratch + filter * kAllPoints * sizes.sums_step;
    }
    FASTGEN_INLINE T* inputs(const Sizes& sizes) const { return scratch + sums_size(sizes); }
    FASTGEN_INLINE T* grads(const Sizes& sizes) const { return inputs(sizes) + kAllPoints * sizes.inputs_step; }

    // A block of tiles and a strip of output channels.
    struct Part {
        int64_t first, last, o0, o1;
    };

    // function(y, x) with both as types.
    template <class Function>
    static FASTGEN_INLINE void with_bools(bool y, bool x, const Function& function) {
        if (y)
            x ? function(std::true_type{}, std::true_type{}) : function(std::true_type{}, std::false_type{});
        else
            x ? function(std::false_type{}, std::true_type{}) : function(std::false_type{}, std::false_type{});
    }

    // The rows and columns of a tile by their first one and step: where they lie in the image, null outside.
    struct Window {
        const T* at[kPoints][kPoints];

        Window(const Image<T>& image, int64_t n, const int64_t* size, int64_t y, int64_t x, int64_t step_y,
               int64_t step_x, int64_t rows, int64_t cols) {
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t row = y + i * step_y;
                for (int64_t j = 0; j < cols; ++j) {
                    const int64_t column = x + j * step_x;
                    const bool inside = row >= 0 && row < size[0] && column >= 0 && column < size[1];
                    at[i][j] = inside ? image.data + n * image.n + row * image.h + column * image.w : nullptr;
                }
            }
        }
        FASTGEN_INLINE Vec<T> load(int64_t i, int64_t j, int64_t c, int64_t count) const {
            return at[i][j] ? load_some<T>(at[i][j] + c, count) : Vec<T>{};
        }
    };

    void transform_input(const Sizes& sizes, const Part& part, int64_t index) const {
        T* const to = inputs(sizes) + index * sizes.tile_channels;
        const int64_t step = sizes.inputs_step;
        const Tile t = tile(part.first + index);
        const auto run = [&](auto three_rows, auto three_cols) __attribute__((always_inline)) {
            constexpr int64_t rows = decltype(three_rows)::value ? 3 : 2, cols = decltype(three_cols)::value ? 3 : 2;
            const Window window(input, t.n, shape.in_size, t.y, t.x, 1, 1, rows, cols);
            for (int64_t c = 0; c < shape.in_channels; c += kLanes<T>) {
                const int64_t count = min_of(kLanes<T>, shape.in_channels - c);
                Vec<T> lines[kPoints * cols] = {}, points[kAllPoints];
                for (int64_t j = 0; j < cols; ++j) {
                    Vec<T> column[rows];
                    for (int64_t i = 0; i < rows; ++i) column[i] = window.load(i, j, c, count);
                    filter_points(rows, column, 1, lines + j, cols);
                }
                for (int64_t p = 0; p < kPoints; ++p) filter_points(cols, lines + p * cols, 1, points + p * kPoints, 1);
                for (int64_t p = 0; p < kAllPoints; ++p) store(to + p * step + c, points[p]);
            }
        };
        with_bools(taps() == 2 && is_full(0, t.kind), taps() == 2 && is_full(1, t.kind), run);
    }

    void transform_grad(const Sizes& sizes, const Part& part, int64_t filter, int64_t index) const {
        T* const to = grads(sizes) + index * kPanel<T>;
        const int64_t step = sizes.grads_step, panel = sizes.tiles * kPanel<T>;
        const Tile t = tile(part.first + index);
        const int64_t ky = filter / shape.stride[1], kx = filter % shape.stride[1];
        const Window window(grad, t.n, shape.out_size, t.y * shape.stride[0] - shape.padding[0] + ky,
                            t.x * shape.stride[1] - shape.padding[1] + kx, shape.stride[0], shape.stride[1],
                            kPoints - !is_full(0, t.kind), kPoints - !is_full(1, t.kind));
        const auto run = [&](auto full_y, auto full_x) __attribute__((always_inline)) {
            constexpr bool kFullY = decltype(full_y)::value, kFullX = decltype(full_x)::value;
            for (int64_t c = 0; c < part.o1 - part.o0; c += kLanes<T>) {
                const int64_t count = min_of(kLanes<T>, part.o1 - part.o0 - c);
                Vec<T> points[kAllPoints] = {};
                for (int64_t i = 0; i < kPoints - !kFullY; ++i) {
                    for (int64_t j = 0; j < kPoints - !kFullX; ++j)
                        points[i * kPoints + j] = window.load(i, j, part.o0 + c, count);
                }
                for (int64_t i = 0; i < kPoints - !kFullY; ++i) input_points<kFullX>(points + i * kPoints, 1);
                for (int64_t j = 0; j < kPoints; ++j) input_points<kFullY>(points + j, kPoints);
                T* const lines = to + c / kPanel<T> * panel + c % kPanel<T>;
                for (int64_t p = 0; p < kAllPoints; ++p) store(lines + p * step, points[p]);
            }
        };
        with_bools(is_full(0, t.kind), is_full(1, t.kind), run);
    }

    // Adds the products of a point, for some of the strip's columns.
    void multiply(const Sizes& sizes, const Part& part, int64_t filter, int64_t point, int64_t column) const {
        const Range range = with_point(point, part.first, part.last);
        const T* a = inputs(sizes) + point * sizes.inputs_step + range.begin * sizes.tile_channels;
        const T* b = grads(sizes) + point * sizes.grads_step + column * sizes.tiles + range.begin * kPanel<T>;
        T* c = sums(sizes, filter) + point * sizes.sums_step + column;
        const T* before = part.first ? c : nullptr;
        const int64_t step = sizes.columns, cols = min_of(kColumnsAtOnce, sizes.columns - column);
        const Tap<T> tap{a, 1, sizes.tile_channels, range.end - range.begin, b};
        tap_gemm({&tap, 1, sizes.tiles * kPanel<T>, kPanel<T>, before, step, c, step, shape.in_channels, cols});
    }

    void finish(const Sizes& sizes, const Part& part, int64_t channel) const {
        if (taps() == 2) return gradients<2>(sizes, part, channel);
        gradients<3>(sizes, part, channel);
    }

    template <int kTaps>
    void gradients(const Sizes& sizes, const Part& part, int64_t channel) const {
        constexpr int kInputs = kPoints + 1 - kTaps;
        const int64_t elements = shape.kernel[0] * shape.kernel[1];
        const Vec<T> two = broadcast(T(2)), quarter = broadcast(T(0.25));
        for (int64_t o = part.o0; o < part.o1; o += kLanes<T>) {
            T* to = result + (channel * shape.out_channels + o) * elements;
            const int64_t count = min_of(kLanes<T>, part.o1 - o);
            for (int64_t filter = 0; filter < filters(); ++filter) {
                Vec<T> m[kAllPoints];
                const T* const from = sums(sizes, filter) + channel * sizes.columns + o - part.o0;
                for (int64_t p = 0; p < kAllPoints; ++p) m[p] = load(from + p * sizes.sums_step);
                for (int64_t i = 0; i < kPoints; ++i) outputs_of_points<true, kInputs>(m + i * kPoints, 1, two);
                for (int64_t j = 0; j < kTaps; ++j) outputs_of_points<true, kInputs>(m + j, kPoints, two);
                const int64_t ky = filter / shape.stride[1], kx = filter % shape.stride[1];
                for (int64_t y = 0; y < kTaps; ++y) {
                    for (int64_t x = 0; x < kTaps; ++x) {
                        const Vec<T> w = quarter * m[y * kPoints + x];
                        T* at = to + (ky + y * shape.stride[0]) * shape.kernel[1] + kx + x * shape.stride[1];
                        for (int64_t l = 0; l < count; ++l) at[l * elements] = w[l];
                    }
                }
            }
        }
    }

    void run() const {
        const Sizes sizes(*this);
#pragma omp parallel num_threads(shape.threads)
        for (int64_t o = 0; o < shape.out_channels; o += sizes.columns)
            strip(sizes, o, min_of(o + sizes.columns, shape.out_channels));
    }

    // By all threads.
    void strip(const Sizes& sizes, int64_t o0, int64_t o1) const {
        const int64_t all = all_tiles(), pieces = ceil_div(o1 - o0, kColumnsAtOnce);
        for (int64_t first = 0; first < all; first += sizes.tiles) {
            const Part part{first, min_of(first + sizes.tiles, all), o0, o1};
            if (o0 == 0 || sizes.tiles < all) {  // else they are still there
#pragma omp for schedule(dynamic, kPieceTiles) nowait
                for (int64_t i = 0; i < part.last - first; ++i) transform_input(sizes, part, i);
            }
            for (int64_t filter = 0; filter < filters(); ++filter) {
#pragma omp for schedule(dynamic, kPieceTiles)
                for (int64_t i = 0; i < part.last - first; ++i) transform_grad(sizes, part, filter, i);
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < kAllPoints * pieces; ++i)
                    multiply(sizes, part, filter, i / pieces, i % pieces * kColumnsAtOnce);
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < shape.in_channels; ++c) finish(sizes, {0, all, o0, o1}, c);
    }
};

}  // namespace

#define FASTGEN_DEFINE_CONV_WEIGHT_GRADIENT(T)                                                               \
    int64_t conv_weight_gradient_scratch_size(const WeightGradientShape& shape, const T*) {                  \
        const Image<T> none{};                                                                               \
        if (shape.minimal()) return Filtered<T>{shape, none, none, nullptr, nullptr}.scratch_size();         \
        return Direct<T>{shape, none, none, nullptr, nullptr}.scratch_size();                                \
    }                                                                                                        \
    void conv_weight_gradient(const WeightGradientShape& shape, const Image<T>& input, const Image<T>& grad, \
                              T* result, T* scratch) {                                                       \
        if (shape.minimal()) return Filtered<T>{shape, input, grad, result, scratch}.run();                  \
        Direct<T>{shape, input, grad, result, scratch}.run();                                                \
    }

FASTGEN_DEFINE_CONV_WEIGHT_GRADIENT(float)
FASTGEN_DEFINE_CONV_WEIGHT_GRADIENT(double)

}  // namespace fastgen::FASTGEN_ISA

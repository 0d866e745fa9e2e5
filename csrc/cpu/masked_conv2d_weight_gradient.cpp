// fastgen: per-isa
// The gradients of weight and bias of the convolutions of masked_conv2d.cpp:
//
//     grad_w[o, i, dy, dx] = sum over n, y, x of  in[n, y + dy, x + dx, i] * grad[n, y, x, o],    of open taps (dy, dx)
//     grad_b[o]            = sum over n, y, x of  grad[n, y, x, o]
//
// It is the product of masked_conv2d.cpp transposed, of rows from the same ring: rows of the result are (tap, input
// channel), the sum runs over positions. Positions are cut into a few chunks that depend on the shape alone; their sums
// are added in order, so threads do not change the bits.

#include "masked_conv2d.h"

#include <omp.h>

#include "integers.h"
#include "masked_conv2d_ring.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

// Rows of the output's gradient from `first` on as panels [panel][position][kPanel]; row 0 of the image is row `top`.
template <class T>
struct GradBlock {
    T* data;
    int64_t width, panel_stride, top, first;

    FASTGEN_INLINE T* at(int64_t y, int64_t c) const {
        return data + c / kPanel<T> * panel_stride + (top + y - first) * width * kPanel<T> + c % kPanel<T>;
    }
    FASTGEN_INLINE int64_t step() const { return kPanel<T>; }
    FASTGEN_INLINE int64_t run() const { return kPanel<T>; }
};

template <class T>
struct WeightGradient {
    const MaskedConv2d& conv;
    const Image<T>& input;
    const Image<T>& grad;
    T* grad_weight;
    T* grad_bias;
    T* scratch;
    Filtered how = filtered(conv);
    // Divisions, done once.
    int64_t block_rows = max_of(1, min_of(conv.batch* conv.height, kBlockPositions / conv.width));
    int64_t chunks =
        max_of(1, min_of(min_of(ceil_div(conv.batch* conv.height* conv.width, kChunkPositions), kMaxChunks), blocks()));
    int64_t partials = conv.threads * thread_size();  // where in scratch they are

    static constexpr int64_t kBlockPositions = 128;  // of a product: they amortise loading and storing the tile
    static constexpr int64_t kMaxChunks = 8;         // partial sums: enough for threads and accuracy, little to add up
    static constexpr int64_t kChunkPositions = 1024;
    static constexpr int64_t kFinished = 8;  // input channels at a time: cache lines of weights, few of sums

    FASTGEN_INLINE int64_t depth() const { return lines_of(conv) * conv.in_channels; }
    FASTGEN_INLINE int64_t panels() const { return panels_of<T>(conv.out_channels); }
    FASTGEN_INLINE int64_t padded_out() const { return panels() * kPanel<T>; }
    FASTGEN_INLINE int64_t blocks() const { return ceil_div(conv.batch * conv.height, block_rows); }
    FASTGEN_INLINE int64_t ring_size() const {
        return aligned<T>(Ring<T>::size(conv, conv.in_channels, block_rows + conv.above));
    }
    FASTGEN_INLINE int64_t panel_stride() const { return block_rows * conv.width * kPanel<T>; }
    FASTGEN_INLINE int64_t pair_stride() const { return how.rows ? block_rows * pairs_of(conv) * kPanel<T> : 0; }
    // Panels of positions, and where the convolution is filtered of the sums and differences of pairs.
    FASTGEN_INLINE int64_t block_size() const {
        const int64_t finished = (kFinished * conv.kernel_h * conv.kernel_w + open_taps(conv)) * kPanel<T>;
        return max_of(panels() * (panel_stride() + 2 * pair_stride()), finished);
    }
    FASTGEN_INLINE T* pairs_at(T* grads, int64_t which, int64_t panel) const {
        return grads + panels() * panel_stride() + (which * panels() + panel) * pair_stride();
    }
    FASTGEN_INLINE int64_t thread_size() const { return ring_size() + block_size(); }
    FASTGEN_INLINE int64_t partial_size() const { return (depth() + 1) * padded_out(); }  // the last row: the bias
    FASTGEN_INLINE int64_t scratch_size() const { return conv.threads * thread_size() + chunks * partial_size(); }
    FASTGEN_INLINE T* partial(int64_t chunk) const { return scratch + partials + chunk * partial_size(); }

    // Rows r0..r1-1 of the batch, of panels p0..p1-1.
    void fetch_grad(T* grads, int64_t r0, int64_t r1, int64_t p0, int64_t p1) const {
        Image<T> columns = grad;
        columns.data += p0 * kPanel<T> * grad.c;
        const int64_t count = min_of(p1 * kPanel<T>, conv.out_channels) - p0 * kPanel<T>;
        for (int64_t r = r0; r < r1;) {
            const int64_t n = r / conv.height, top = n * conv.height, end = min_of(r1, top + conv.height);
            fetch_rows(columns, n, r - top, end - top, conv.width, count,
                       GradBlock<T>{grads + p0 * panel_stride(), conv.width, panel_stride(), top, r0});
            r = end;
        }
    }

    // Some of its columns are never written.
    void clear_last_panel(T* grads) const {
        const int64_t last = panels() - 1;
        for (int64_t i = 0; i < panel_stride(); ++i) grads[last * panel_stride() + i] = T(0);
    }

    void make_pairs(T* grads, int64_t rows, int64_t p0, int64_t p1) const {
        constexpr int64_t line = kPanel<T>;
        for (int64_t panel = p0; panel < p1; ++panel) {
            for (int64_t row = 0; row < rows; ++row) {
                const T* from = grads + panel * panel_stride() + row * conv.width * line;
                T* sums = pairs_at(grads, 0, panel) + row * pairs_of(conv) * line;
                T* differences = pairs_at(grads, 1, panel) + row * pairs_of(conv) * line;
                for (int64_t i = 0; i < pairs_of(conv) * line; i += kLanes<T>) {
                    const int64_t x = i / line * 2;
                    const T* first = from + x * line + i % line;
                    const Vec<T> a = load(first), b = x + 1 < conv.width ? load(first + line) : Vec<T>{};
                    store(sums + i, a + b);
                    store(differences + i, a - b);
                }
            }
        }
    }

    // Of a product with the gradients of one column of some panels: `line` is the first of its lines in the sum, of
    // `rows` channels; positions of a row are `step` apart in the ring, `positions` of them, and `grad_step` lines in
    // the panels at `grads`, a row `grad_row` of them.
    struct Product {
        int64_t line, rows, positions, step;
        const T* grads;
        int64_t panel_stride, grad_step, grad_row;
    };

    // Of rows r0..r1-1 those that have one d rows above; `from(r)`: where the first position of that is.
    template <class From>
    void multiply(const Product& product, int64_t d, int64_t r0, int64_t r1, T* sum, bool start, int64_t panel,
                  int64_t count, const From& from) const {
        Tap<T> taps[kBlockPositions];
        int64_t num_taps = 0;
        for (int64_t r = r0; r < r1; ++r) {
            if (r % conv.height < d) continue;
            taps[num_taps++] = {from(r - d), 1, product.step, product.positions,
                                product.grads + (r - r0) * product.grad_row * kPanel<T>};
        }
        T* c = sum + product.line * conv.in_channels * padded_out() + panel * kPanel<T>;
        tap_gemm({taps, num_taps, product.panel_stride, product.grad_step * kPanel<T>, start ? nullptr : c,
                  padded_out(), c, padded_out(), product.rows, count * kPanel<T>});
    }

    // Adds the products of rows r0..r1-1 of the batch to a partial sum, or starts it.
    void block(Ring<T>& ring, T* grads, T* sum, bool start, int64_t r0, int64_t r1, int64_t p0, int64_t p1) const {
        const int64_t above = conv.above, kw = conv.kernel_w, in = conv.in_channels, count = p1 - p0;
        const int64_t width = conv.width, pairs = pairs_of(conv);
        ring.advance(r0 - min_of(r0 % conv.height, above), r1 - 1, 0);
        fetch_grad(grads, r0, r1, p0, p1);
        if (how.rows) make_pairs(grads, r1 - r0, p0, p1);

        // The gradients that a point takes: of the first of each pair, sums, differences, of the second.
        const auto of_point = [&](int64_t point, int64_t line, int64_t step, int64_t panel) -> Product {
            if (point == 1 || point == 2)
                return {line, in, pairs, step, pairs_at(grads, point - 1, panel), pair_stride(), 1, pairs};
            const T* from = grads + panel * panel_stride() + (point == 3 ? kPanel<T> : 0);
            return {line, in, point == 3 ? width / 2 : pairs, step, from, panel_stride(), 2, width};
        };
        const auto as_they_are = [&](int64_t line, int64_t rows, int64_t panel) -> Product {
            return {line, rows, width, in, grads + panel * panel_stride(), panel_stride(), 1, width};
        };
        for (int64_t d = above; d >= 1; --d) {
            if (!how.rows) {
                multiply(as_they_are((above - d) * kw, kw * in, p0), d, r0, r1, sum, start, p0, count,
                         [&](int64_t r) { return ring.row(r); });
                continue;
            }
            for (int64_t point = 0; point < kPoints; ++point) {
                if (!has_point(how.rows, point)) continue;
                const int64_t line = (d - 1) * products_of(how.rows) + product_of(how.rows, point);
                multiply(of_point(point, line, ring.above(r0, point).step, p0), d, r0, r1, sum, start, p0, count,
                         [&](int64_t r) { return ring.above(r, point).first; });
            }
        }
        const int64_t own = own_line(conv);
        if (how.own) {
            for (int64_t point = 0; point < kPoints; ++point) {
                if (!has_point(how.own, point)) continue;
                const int64_t line = own + product_of(how.own, point);
                multiply(of_point(point, line, ring.own(r0, point).step, p0), 0, r0, r1, sum, start, p0, count,
                         [&](int64_t r) { return ring.own(r, point).first; });
            }
        } else {
            for (int64_t panel = p0; panel < p1;) {
                const int64_t bound = panel_inputs<T>(conv, panel);
                int64_t end = panel + 1;
                while (end < p1 && panel_inputs<T>(conv, end) == bound) ++end;
                const int64_t rows = (conv.own_taps - 1) * in + bound;
                multiply(as_they_are(own, rows, panel), 0, r0, r1, sum, start, panel, end - panel,
                         [&](int64_t r) { return ring.own_row(r); });
                panel = end;
            }
        }
        if (grad_bias) add_bias(grads, sum + depth() * padded_out(), start, (r1 - r0) * width, p0, p1);
    }

    // Column sums, within a block in double: plain PyTorch's cascaded sums are accurate too.
    void add_bias(const T* grads, T* sum, bool start, int64_t positions, int64_t p0, int64_t p1) const {
        for (int64_t panel = p0; panel < p1; ++panel) {
            const T* from = grads + panel * panel_stride();
            double total[kPanel<T>] = {};
            for (int64_t p = 0; p < positions; ++p) {
                for (int64_t j = 0; j < kPanel<T>; ++j) total[j] += from[p * kPanel<T> + j];
            }
            T* to = sum + panel * kPanel<T>;
            for (int64_t j = 0; j < kPanel<T>; ++j) to[j] = T(start ? total[j] : to[j] + total[j]);
        }
    }

    void chunk(int64_t chunk, Ring<T>& ring, T* grads, int64_t p0, int64_t p1) const {
        ring.restart();
        const int64_t first = blocks() * chunk / chunks, last = blocks() * (chunk + 1) / chunks;
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = i * block_rows, end = min_of(row + block_rows, conv.batch * conv.height);
            block(ring, grads, partial(chunk), i == first, row, end, p0, p1);
        }
    }

    // Adds the partial sums of a row in order.
    FASTGEN_INLINE void total(int64_t row, int64_t panel, T* to) const {
        for (int64_t j = 0; j < kPanel<T>; j += kLanes<T>) {
            Vec<T> sum{};
            for (int64_t s = 0; s < chunks; ++s) sum += load(partial(s) + row * padded_out() + panel * kPanel<T> + j);
            store(to + j, sum);
        }
    }

    // The gradients of the weights of input channel i, open tap by open tap [kPanel], whatever colours hide.
    void taps_of(int64_t i, int64_t panel, T* taps) const {
        const int64_t above = conv.above, kw = conv.kernel_w;
        if (!how.rows) return totals(0, open_taps(conv), i, panel, taps);
        for (int64_t d = 1; d <= above; ++d) {
            taps_of_points(how.rows, (d - 1) * products_of(how.rows), i, panel, taps + (above - d) * kw * kPanel<T>);
        }
        T* own = taps + above * kw * kPanel<T>;
        if (how.own)
            taps_of_points(how.own, own_line(conv), i, panel, own);
        else
            totals(own_line(conv), conv.own_taps, i, panel, own);
    }

    FASTGEN_INLINE void totals(int64_t line, int64_t count, int64_t i, int64_t panel, T* to) const {
        for (int64_t t = 0; t < count; ++t) total((line + t) * conv.in_channels + i, panel, to + t * kPanel<T>);
    }

    void taps_of_points(int64_t taps, int64_t line, int64_t i, int64_t panel, T* to) const {
        constexpr int64_t step = kPanel<T>;
        T points[kPoints * step] = {};
        totals(line, products_of(taps), i, panel, points);
        const Vec<T> half = broadcast(T(0.5));
        for (int64_t j = 0; j < step; j += kLanes<T>) {
            const Vec<T> p0 = load(points + j), p1 = load(points + step + j), p2 = load(points + 2 * step + j);
            if (taps == 2) {
                store(to + j, p0 + p1);
                store(to + step + j, p2 + p1);
                continue;
            }
            const Vec<T> both = half * (p1 + p2);
            store(to + j, p0 + both);
            store(to + step + j, half * (p1 - p2));
            store(to + 2 * step + j, load(points + 3 * step + j) + both);
        }
    }

    // Writes input channels i0..i1-1, at most kFinished, in PyTorch's layout: panel by panel, as the sums lie in memory,
    // and those channels of an output channel at once, as the weights do.
    void finish(int64_t i0, int64_t i1, T* room) const {
        const int64_t in = conv.in_channels, area = conv.kernel_h * conv.kernel_w, run = (i1 - i0) * area;
        const int64_t whole = open_taps(conv) - 1;
        const bool hides = conv.colors > 1 || !conv.own_color;  // the last tap, from some
        T* taps = room + kPanel<T> * run;
        for (int64_t j = 0; j < kPanel<T> * run; ++j) room[j] = T(0);
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t column = panel * kPanel<T>, columns = min_of(kPanel<T>, conv.out_channels - column);
            for (int64_t i = i0; i < i1; ++i) {
                if (panel + 1 < panels()) prefetch_sums(i, panel + 1);
                taps_of(i, panel, taps);
                T* to = room + (i - i0) * area;
                for (int64_t t = 0; t <= whole; ++t) {
                    for (int64_t j = 0; j < columns; ++j) to[j * run + t] = taps[t * kPanel<T> + j];
                }
                for (int64_t j = 0; j < columns && hides; ++j) {
                    if (i >= readable_inputs(conv, column + j)) to[j * run + whole] = T(0);
                }
            }
            for (int64_t j = 0; j < columns; ++j) {
                copy(room + j * run, run, grad_weight + ((column + j) * in + i0) * area);
            }
        }
    }

    FASTGEN_INLINE void prefetch_sums(int64_t i, int64_t panel) const {
        for (int64_t line = 0; line < lines_of(conv); ++line) {
            __builtin_prefetch(partial(0) + (line * conv.in_channels + i) * padded_out() + panel * kPanel<T>);
        }
    }

    void finish_bias(T* sums) const {
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t column = panel * kPanel<T>;
            total(depth(), panel, sums);
            copy(sums, min_of(kPanel<T>, conv.out_channels - column), grad_bias + column);
        }
    }

    void run() const {
        // Where there are more threads than chunks, the panels of a chunk are shared out as well.
        const int64_t groups = min_of(panels(), ceil_div(conv.threads, chunks));
#pragma omp parallel num_threads(conv.threads)
        {
            T* own = scratch + omp_get_thread_num() * thread_size();
            Ring<T> ring(input, conv, conv.in_channels, block_rows + conv.above, false, own);
            T* grads = own + ring_size();
            if (conv.out_channels % kPanel<T>) clear_last_panel(grads);
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < chunks * groups; ++item) {
                const int64_t group = item % groups;
                chunk(item / groups, ring, grads, panels() * group / groups, panels() * (group + 1) / groups);
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < conv.in_channels; i += kFinished)
                finish(i, min_of(i + kFinished, conv.in_channels), grads);
#pragma omp single nowait
            if (grad_bias) finish_bias(grads);
        }
    }
};

}  // namespace

#define FASTGEN_DEFINE_WEIGHT_GRADIENT(T)                                                                            \
    int64_t masked_conv2d_weight_gradient_scratch(const MaskedConv2d& conv, const T*) {                              \
        return WeightGradient<T>{conv, {}, {}, nullptr, nullptr, nullptr}.scratch_size();                            \
    }                                                                                                                \
    void masked_conv2d_weight_gradient(const MaskedConv2d& conv, const Image<T>& input, const Image<T>& grad_output, \
                                       T* grad_weight, T* grad_bias, T* scratch) {                                   \
        WeightGradient<T>{conv, input, grad_output, grad_weight, grad_bias, scratch}.run();                          \
    }

FASTGEN_DEFINE_WEIGHT_GRADIENT(float)
FASTGEN_DEFINE_WEIGHT_GRADIENT(double)

}  // namespace fastgen::FASTGEN_ISA

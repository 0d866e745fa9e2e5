// fastgen: per-isa
// Convolutions that see no later row on the tap-GEMM: masked ones, and those over a window that ends with the own row.
//
//     out[n, y, x, o]      = bias[o] + sum over open taps (dy, dx), i of  w[o, i, dy, dx] * in[n, y + dy, x + dx, i]
//     grad_in[n, y, x, i]  =           sum over open taps (dy, dx), o of  w[o, i, dy, dx] * grad[n, y - dy, x - dx, o]
//     grad_w[o, i, dy, dx] =           sum over n, y, x of                in[n, y + dy, x + dx, i] * grad[n, y, x, o]
//
// In reading order the open taps are the first ones of the kernel: rows above the own row whole, and of the own row some
// or all. All are open for all channels but the last one, which in a mask is the pixel itself and open between some
// colour groups. The gradient of the input is the same convolution with the taps in reverse order.
//
// Idea: an image row is copied into a small ring of zero-padded channels-last rows, whatever the layout of the
// source. There the taps of one kernel row are contiguous, so that a whole kernel row is one tap of the GEMM with K =
// kernel_w * channels. Only open taps are multiplied, and of the last one only the colour groups that some column
// of the panel needs. Kernels of 3x3, 2x3 and 2x2 take fewer products (masked_conv2d_ring.h).
//
// The weight gradient is the same product transposed: rows are (tap, input channel), the sum runs over positions.
// Positions are cut into a few chunks that depend on the shape alone; their sums are added in order, so threads do
// not change the bits.

#include "masked_conv2d.h"

#include <omp.h>

#include "integers.h"
#include "masked_conv2d_ring.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

// Both directions of the convolution: K runs over (tap in reading order, channel), reversed for the gradient. `direct`
// weights are those taps, [depth][kPanel] of a panel; filtered ones are made of them.
template <class T>
struct RowConvolution {
    const MaskedConv2d& conv;
    const Image<T>& source;
    bool reverse;
    int64_t in, out;  // channels of source and target
    const T* weight;  // contiguous [Cout, Cin, kh, kw]
    const T* bias;
    T* target;  // [N, H, W, out]
    T* scratch;
    Filtered how = filtered(conv);

    // Rows fetched together with the one that is needed: four use planes' cache lines better.
    static constexpr int64_t kAhead = 3;
    // Rows at a time: of so many positions, as long as the input of their products stays in the second-level cache, and
    // the weights beside it.
    static constexpr int64_t kBlockPositions = 32, kBlockBytes = 256 * 1024, kPanelBytes = 128 * 1024;
    static constexpr int64_t kPositions = 64;  // at a time, of images that are read in place

    FASTGEN_INLINE int64_t direct_depth() const { return open_taps(conv) * in; }
    FASTGEN_INLINE int64_t depth() const { return lines_of(conv) * in; }
    FASTGEN_INLINE int64_t panels() const { return panels_of<T>(out); }
    FASTGEN_INLINE int64_t block_rows() const {
        const int64_t positions = how.rows ? pairs_of(conv) : conv.width;
        const int64_t fitting = kBlockBytes / (positions * depth() * int64_t(sizeof(T)));
        return max_of(1, min_of(min_of(fitting, ceil_div(kBlockPositions, positions)), conv.batch * conv.height));
    }
    FASTGEN_INLINE int64_t ring_rows() const { return conv.above + block_rows() + kAhead; }
    FASTGEN_INLINE int64_t ring_size() const { return aligned<T>(Ring<T>::size(conv, in, ring_rows())); }
    // Of a filtered row: U1 + U2, and U1 - U2.
    FASTGEN_INLINE int64_t sums_size() const { return how.rows ? pairs_of(conv) * panels() * kPanel<T> : 0; }
    FASTGEN_INLINE int64_t direct_size() const { return how.rows ? direct_depth() * kPanel<T> : 0; }
    FASTGEN_INLINE int64_t thread_size() const { return ring_size() + 2 * sums_size() + direct_size(); }

    void pack_panel(int64_t panel, T* packed, T* direct) const {
        if (!how.rows) return pack_direct(panel, packed);
        pack_direct(panel, direct);
        const auto line = [&](T* lines, int64_t i) { return lines + i * in * kPanel<T>; };
        for (int64_t d = 1; d <= conv.above; ++d) {
            filter_lines(how.rows, line(direct, kernel_row(d)), line(packed, (d - 1) * products_of(how.rows)));
        }
        const T* own = line(direct, own_taps_at());
        T* to = line(packed, own_line(conv));
        if (how.own)
            filter_lines(how.own, own, to);
        else
            copy(own, conv.own_taps * in * kPanel<T>, to);
    }

    // Of direct weights, the first line of the row of the kernel that reads a row at distance d, and of the own row.
    FASTGEN_INLINE int64_t kernel_row(int64_t d) const {
        return reverse ? conv.own_taps + (d - 1) * conv.kernel_w : (conv.above - d) * conv.kernel_w;
    }
    FASTGEN_INLINE int64_t own_taps_at() const { return reverse ? 0 : conv.above * conv.kernel_w; }

    // A row of two or three taps as weights of the points.
    void filter_lines(int64_t taps, const T* from, T* points) const {
        const int64_t line = in * kPanel<T>;
        const Vec<T> half = broadcast(T(0.5));
        for (int64_t i = 0; i < line; i += kLanes<T>) {
            const Vec<T> g0 = load(from + i), g1 = load(from + line + i);
            store(points + i, g0);
            if (taps == 2) {
                store(points + line + i, g0 + g1);
                store(points + 2 * line + i, g1);
                continue;
            }
            const Vec<T> g2 = load(from + 2 * line + i);
            store(points + line + i, half * ((g0 + g2) + g1));
            store(points + 2 * line + i, half * ((g0 + g2) - g1));
            store(points + 3 * line + i, g2);
        }
    }

    void pack_direct(int64_t panel, T* packed) const {
        const int64_t taps = open_taps(conv), area = conv.kernel_h * conv.kernel_w;
        const int64_t column = panel * kPanel<T>, columns = min_of(kPanel<T>, out - column);
        const int64_t channel_step = (reverse ? conv.in_channels : 1) * area,
                      column_step = (reverse ? 1 : conv.in_channels) * area;
        int64_t inputs[kPanel<T>];  // of output channel column + j
        for (int64_t j = 0; j < columns && !reverse; ++j) inputs[j] = readable_inputs(conv, column + j);
        for (int64_t c = 0; c < in; ++c) {
            const T* from = weight + c * channel_step + column * column_step;
            for (int64_t t = 0; t < taps; ++t) {
                T* row = packed + ((reverse ? taps - 1 - t : t) * in + c) * kPanel<T>;
                for (int64_t j = 0; j < columns; ++j) row[j] = from[j * column_step + t];
                for (int64_t j = columns; j < kPanel<T>; ++j) row[j] = T(0);
            }
            T* own = packed + ((reverse ? 0 : taps - 1) * in + c) * kPanel<T>;
            const int64_t reads = reverse ? readable_inputs(conv, c) : 0;
            for (int64_t j = 0; j < columns; ++j) {
                if (reverse ? column + j >= reads : c >= inputs[j]) own[j] = T(0);
            }
        }
    }

    // What the last open tap of a panel covers; panels that agree share a call.
    FASTGEN_INLINE int64_t last_bound(int64_t panel) const {
        return reverse ? panel_first_reader<T>(conv, panel) : panel_inputs<T>(conv, panel);
    }

    // Neighbouring panels whose last tap covers the same channels; output channels `column`, ...
    struct Panels {
        const T* lines;
        int64_t column, cols, bound;
        const T* init;
    };

    // Calls function(panels) for all; `few`: so many at a time that their weights stay in the second-level cache.
    template <class Function>
    void for_panels(const T* packed, bool few, Function function) const {
        const int64_t bytes = depth() * kPanel<T> * int64_t(sizeof(T));
        const int64_t most = few ? max_of(1, kPanelBytes / bytes) : panels();
        for (int64_t panel = 0; panel < panels();) {
            const int64_t bound = last_bound(panel), column = panel * kPanel<T>;
            int64_t end = panel + 1;
            while (end < min_of(panels(), panel + most) && last_bound(end) == bound) ++end;
            function(Panels{packed + panel * depth() * kPanel<T>, column, min_of(end * kPanel<T>, out) - column, bound,
                            bias ? bias + column : nullptr});
            panel = end;
        }
    }

    // The operands of a product of some positions with the panels whose weights begin at `lines`.
    struct Product {
        Product(const RowConvolution& conv, const T* lines) : conv(conv), lines(lines) {}  // leaves taps as they are
        const RowConvolution& conv;
        const T* lines;
        Tap<T> taps[kMaskedConv2dMaxTaps + 2];
        int64_t count = 0;

        // k channels of `from`, those of consecutive positions `step` apart, by the weights from channel c of a line.
        FASTGEN_INLINE void add(const T* from, int64_t step, int64_t line, int64_t c, int64_t k) {
            if (k > 0) taps[count++] = {from + c, step, 1, k, lines + (line * conv.in + c) * kPanel<T>};
        }
        FASTGEN_INLINE void run(int64_t rows, int64_t cols, const T* init, int64_t init_stride, T* to,
                                int64_t to_stride) const {
            tap_gemm({taps, count, conv.depth() * kPanel<T>, kPanel<T>, init, init_stride, to, to_stride, rows, cols});
        }
    };

    // The rows at distance 1, 2, ... from row r of the batch that its image has.
    FASTGEN_INLINE int64_t rows_beside(int64_t r) const {
        const int64_t y = r % conv.height;
        return min_of(conv.above, reverse ? conv.height - 1 - y : y);
    }
    FASTGEN_INLINE int64_t row_beside(int64_t r, int64_t d) const { return reverse ? r + d : r - d; }

    // The own row as it is: `from` on for the first position, every `step` positions; its weights are the lines from
    // `line` on.
    FASTGEN_INLINE void add_own_row(Product& product, const T* from, int64_t step, int64_t line, int64_t bound) const {
        const int64_t whole = (conv.own_taps - 1) * in;  // of the taps that colours do not cut
        if (!reverse) return product.add(from, step * in, line, 0, whole + bound);
        const int64_t part = in / conv.splits;
        for (int64_t split = 0; split < conv.splits; ++split) {
            product.add(from, step * in, line, split * part + bound, part - bound);
        }
        product.add(from + in, step * in, line + 1, 0, whole);
    }

    // Rows first..last-1 of the batch, all of them by a few panels at a time: of a small map one row alone would take its
    // weights from memory faster than that gives them.
    void rows(Ring<T>& ring, const T* packed, T* sums, int64_t first, int64_t last) const {
        if (reverse)
            ring.advance(first, last - 1 + rows_beside(last - 1), kAhead);
        else
            ring.advance(first - rows_beside(first), last - 1, kAhead);
        for_panels(packed, last - first > 1, [&](const Panels& some) {
            for (int64_t r = first; r < last; ++r) {
                T* to = target + r * conv.width * out + some.column;
                if (how.rows)
                    filtered_row(ring, some, sums, r, to);
                else
                    direct_row(ring, some, r, to);
            }
        });
    }

    // Kernels of one element read channels-last images in place.
    FASTGEN_INLINE bool in_place() const {
        return conv.kernel_h == 1 && conv.kernel_w == 1 && source.c == 1 && source.w == in &&
               source.h == conv.width * in && source.n == conv.height * source.h;
    }

    void positions(const T* packed, int64_t first, int64_t last) const {
        for_panels(packed, true, [&](const Panels& some) {
            Product product(*this, some.lines);
            add_own_row(product, source.data + first * in, 1, 0, some.bound);
            product.run(last - first, some.cols, some.init, 0, target + first * out + some.column, out);
        });
    }

    void direct_row(const Ring<T>& ring, const Panels& some, int64_t r, T* to) const {
        Product product(*this, some.lines);
        const auto add_rows = [&] {
            for (int64_t i = 1; i <= rows_beside(r); ++i) {
                const int64_t d = reverse ? i : rows_beside(r) + 1 - i;  // in the order of the taps
                product.add(ring.row(row_beside(r, d)), in, kernel_row(d), 0, conv.kernel_w * in);
            }
        };
        if (!reverse) add_rows();
        add_own_row(product, ring.own_row(r), 1, own_taps_at(), some.bound);
        if (reverse) add_rows();
        product.run(conv.width, some.cols, some.init, 0, to, out);
    }

    // In pairs of positions: the sums U1 and U2 first, from which the others start.
    void filtered_row(const Ring<T>& ring, const Panels& some, T* sums, int64_t r, T* to) const {
        const int64_t cols = some.cols;
        const T* init = some.init;
        const int64_t pairs = pairs_of(conv), stride = panels() * kPanel<T>, own = own_line(conv);
        const auto products = [&](int64_t point) {
            Product product(*this, some.lines);
            for (int64_t d = rows_beside(r); d >= 1 && has_point(how.rows, point); --d) {
                const auto [from, step] = ring.above(row_beside(r, d), point);
                const int64_t line = (d - 1) * products_of(how.rows) + product_of(how.rows, point);
                product.add(from, step, line, 0, in);
            }
            if (has_point(how.own, point)) {
                const auto [from, step] = ring.own(r, point);
                product.add(from, step, own + product_of(how.own, point), 0, in);
            } else if (!how.own && (point == 0 || point == 3)) {
                add_own_row(product, ring.own_row(r) + (point == 3 ? in : 0), 2, own, some.bound);
            }
            return product;
        };
        T* added = sums;
        T* subtracted = sums + sums_size();
        const T *first = init, *second = init;  // what U0 and U3 start from
        int64_t first_stride = 0;
        if (rows_beside(r) > 0 || how.own) {
            products(1).run(pairs, cols, init, 0, added, stride);
            first = second = added;
            first_stride = stride;
        }
        if ((rows_beside(r) > 0 && has_point(how.rows, 2)) || has_point(how.own, 2)) {
            products(2).run(pairs, cols, nullptr, 0, subtracted, stride);
            for (int64_t j = 0; j < pairs; ++j) {
                for (int64_t i = j * stride; i < j * stride + aligned<T>(cols); i += kLanes<T>) {
                    const Vec<T> u1 = load(added + i), u2 = load(subtracted + i);
                    store(added + i, u1 + u2);
                    store(subtracted + i, u1 - u2);
                }
            }
            second = subtracted;
        }
        products(0).run(pairs, cols, first, first_stride, to, 2 * out);
        products(3).run(conv.width / 2, cols, second, first_stride, to + out, 2 * out);
    }

    void run() const {
        const int64_t all = conv.batch * conv.height, block = block_rows();
        if (all == 0) return;
        // Small pieces keep threads busy to the end, but each fetches the rows above it anew.
        const int64_t unit = max_of(1 + kAhead, block), piece = ceil_div(all, conv.threads * 8 * unit) * unit;
        T* packed = scratch + conv.threads * thread_size();
#pragma omp parallel num_threads(conv.threads)
        {
            T* own = scratch + omp_get_thread_num() * thread_size();
            T* sums = own + ring_size();
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels(); ++panel)
                pack_panel(panel, packed + panel * depth() * kPanel<T>, sums + 2 * sums_size());
            if (in_place()) {
#pragma omp for schedule(static)
                for (int64_t first = 0; first < all * conv.width; first += kPositions)
                    positions(packed, first, min_of(first + kPositions, all * conv.width));
            }
            Ring<T> ring(source, conv, in, ring_rows(), reverse, own);
#pragma omp for schedule(dynamic)
            for (int64_t first = in_place() ? all : 0; first < all; first += piece) {
                ring.restart();
                const int64_t last = min_of(first + piece, all);
                for (int64_t r = first; r < last; r += block) rows(ring, packed, sums, r, min_of(r + block, last));
            }
        }
    }

    FASTGEN_INLINE int64_t scratch_size() const {
        return conv.threads * thread_size() + panels() * depth() * kPanel<T>;
    }
};

template <class T>
RowConvolution<T> forward_of(const MaskedConv2d& conv, const Image<T>& input, const T* weight, const T* bias, T* output,
                             T* scratch) {
    return {conv, input, false, conv.in_channels, conv.out_channels, weight, bias, output, scratch};
}

template <class T>
RowConvolution<T> backward_of(const MaskedConv2d& conv, const Image<T>& grad, const T* weight, T* grad_input,
                              T* scratch) {
    return {conv, grad, true, conv.out_channels, conv.in_channels, weight, nullptr, grad_input, scratch};
}

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

template <class T>
MaskedConv2dScratch scratch_of(const MaskedConv2d& conv) {
    const Image<T> none{};
    const T* weight = nullptr;
    T* target = nullptr;
    return {forward_of(conv, none, weight, weight, target, target).scratch_size(),
            backward_of(conv, none, weight, target, target).scratch_size(),
            WeightGradient<T>{conv, none, none, target, target, target}.scratch_size()};
}

}  // namespace

#define FASTGEN_DEFINE_MASKED_CONV2D(T)                                                                              \
    MaskedConv2dScratch masked_conv2d_scratch(const MaskedConv2d& conv, const T*) { return scratch_of<T>(conv); }    \
    void masked_conv2d_forward(const MaskedConv2d& conv, const Image<T>& input, const T* weight, const T* bias,      \
                               T* output, T* scratch) {                                                              \
        forward_of(conv, input, weight, bias, output, scratch).run();                                                \
    }                                                                                                                \
    void masked_conv2d_input_gradient(const MaskedConv2d& conv, const Image<T>& grad_output, const T* weight,        \
                                      T* grad_input, T* scratch) {                                                   \
        backward_of(conv, grad_output, weight, grad_input, scratch).run();                                           \
    }                                                                                                                \
    void masked_conv2d_weight_gradient(const MaskedConv2d& conv, const Image<T>& input, const Image<T>& grad_output, \
                                       T* grad_weight, T* grad_bias, T* scratch) {                                   \
        WeightGradient<T>{conv, input, grad_output, grad_weight, grad_bias, scratch}.run();                          \
    }

FASTGEN_DEFINE_MASKED_CONV2D(float)
FASTGEN_DEFINE_MASKED_CONV2D(double)

}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
// Convolutions that see no later row on the tap-GEMM, forward and the gradient of their input: masked ones, and those over
// a window that ends with the own row.
//
//     out[n, y, x, o]     = bias[o] + sum over open taps (dy, dx), i of  w[o, i, dy, dx] * in[n, y + dy, x + dx, i]
//     grad_in[n, y, x, i] =           sum over open taps (dy, dx), o of  w[o, i, dy, dx] * grad[n, y - dy, x - dx, o]
//
// In reading order the open taps are the first ones of the kernel: rows above the own row whole, and of the own row some
// or all. All are open for all channels but the last one, which in a mask is the pixel itself and open between some
// colour groups. The gradient of the input is the same convolution with the taps in reverse order.
//
// Idea: an image row is copied into a small ring of zero-padded channels-last rows, whatever the layout of the
// source. There the taps of one kernel row are contiguous, so that a whole kernel row is one tap of the GEMM with K =
// kernel_w * channels. Only open taps are multiplied, and of the last one only the colour groups that some column
// of the panel needs. Kernels of 3x3, 2x3 and 2x2 take fewer products (masked_conv2d_ring.h).

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
    static constexpr int64_t kBlockPositions = 32, kBlockBytes = 256 * 1024, kPanelBytes = kL2Bytes / 4;
    // Sums that a product works on at a time: each waits for itself.
    static constexpr int64_t kLeastSums = 8;
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
        const int64_t positions = how.rows ? pairs_of(conv) : conv.width, vectors = kPanel<T> / kLanes<T>;
        const int64_t least = ceil_div(kLeastSums, positions * vectors);
        const int64_t most = few ? max_of(least, kPanelBytes / bytes) : panels();
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

}  // namespace

#define FASTGEN_DEFINE_MASKED_CONV2D(T)                                                                         \
    int64_t masked_conv2d_forward_scratch(const MaskedConv2d& conv, const T*) {                                 \
        return forward_of<T>(conv, {}, nullptr, nullptr, nullptr, nullptr).scratch_size();                      \
    }                                                                                                           \
    int64_t masked_conv2d_input_gradient_scratch(const MaskedConv2d& conv, const T*) {                          \
        return backward_of<T>(conv, {}, nullptr, nullptr, nullptr).scratch_size();                              \
    }                                                                                                           \
    void masked_conv2d_forward(const MaskedConv2d& conv, const Image<T>& input, const T* weight, const T* bias, \
                               T* output, T* scratch) {                                                         \
        forward_of(conv, input, weight, bias, output, scratch).run();                                           \
    }                                                                                                           \
    void masked_conv2d_input_gradient(const MaskedConv2d& conv, const Image<T>& grad_output, const T* weight,   \
                                      T* grad_input, T* scratch) {                                              \
        backward_of(conv, grad_output, weight, grad_input, scratch).run();                                      \
    }

FASTGEN_DEFINE_MASKED_CONV2D(float)
FASTGEN_DEFINE_MASKED_CONV2D(double)

}  // namespace fastgen::FASTGEN_ISA

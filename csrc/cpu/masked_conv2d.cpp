// fastgen: per-isa
// Masked convolution on the tap-GEMM.
//
//     out[n, y, x, o]      = bias[o] + sum over open taps (dy, dx), i of  w[o, i, dy, dx] * in[n, y + dy, x + dx, i]
//     grad_in[n, y, x, i]  =           sum over open taps (dy, dx), o of  w[o, i, dy, dx] * grad[n, y - dy, x - dx, o]
//     grad_w[o, i, dy, dx] =           sum over n, y, x of                in[n, y + dy, x + dx, i] * grad[n, y, x, o]
//
// In reading order the open taps are the first ones of the kernel: taps t = 0 .. centre - 1 whole, tap centre (the
// pixel itself) between some colour groups. The gradient of the input is the same convolution with the taps in
// reverse order, u = centre - t.
//
// Idea: an image row is copied into a small ring of zero-padded channels-last rows, whatever the layout of the
// source. There the taps of one kernel row are contiguous, so that a whole kernel row is one tap of the GEMM with K =
// kernel_w * channels. Only open taps are multiplied, and of the centre tap only the colour groups that some column
// of the panel needs.
//
// The weight gradient is the same product transposed: rows are (tap, input channel), the sum runs over positions.
// Positions are cut into a few chunks that depend on the shape alone; their sums are added in order, so threads do
// not change the bits.

#include "masked_conv2d.h"

#include <omp.h>

#include "integers.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

FASTGEN_INLINE int64_t pad_h(const MaskedConv2d& conv) { return conv.kernel_h / 2; }
FASTGEN_INLINE int64_t pad_w(const MaskedConv2d& conv) { return conv.kernel_w / 2; }

// The centre tap's place in reading order: the number of taps that are wholly open.
FASTGEN_INLINE int64_t centre(const MaskedConv2d& conv) { return pad_h(conv) * conv.kernel_w + pad_w(conv); }

// Through the centre tap, output channel o reads the input channels below this.
FASTGEN_INLINE int64_t readable_inputs(const MaskedConv2d& conv, int64_t o) {
    const int64_t part = conv.out_channels / conv.splits;
    const int64_t color = o % part * conv.colors / part;
    return min_of(conv.in_channels, ceil_div((color + conv.own_color) * conv.in_channels, conv.colors));
}

// Through the centre tap, input channel i reaches the output channels from this on, in each of the splits.
FASTGEN_INLINE int64_t first_reader(const MaskedConv2d& conv, int64_t i) {
    const int64_t part = conv.out_channels / conv.splits;
    const int64_t color = i * conv.colors / conv.in_channels;
    return min_of(part, ceil_div((color + !conv.own_color) * part, conv.colors));
}

// The most that a column of the panel reads. Colours ascend within a split, so it is the last column's, or that of
// the end of a split inside the panel.
template <class T>
FASTGEN_INLINE int64_t panel_inputs(const MaskedConv2d& conv, int64_t panel) {
    if (conv.colors == 1) return conv.own_color ? conv.in_channels : 0;
    const int64_t part = conv.out_channels / conv.splits;
    const int64_t last = min_of((panel + 1) * kPanel<T>, conv.out_channels) - 1;
    const int64_t split_end = (last + 1) / part * part - 1;
    const int64_t reads = readable_inputs(conv, last);
    return split_end >= panel * kPanel<T> ? max_of(reads, readable_inputs(conv, split_end)) : reads;
}

// The first that a column of the panel reaches.
template <class T>
FASTGEN_INLINE int64_t panel_first_reader(const MaskedConv2d& conv, int64_t panel) {
    return first_reader(conv, panel * kPanel<T>);
}

// The zero-padded rows [pad + width + pad][channels] of one image that are in use: row y is in slot y % rows.
template <class T>
struct Ring {
    const Image<T>& source;
    const MaskedConv2d& conv;
    int64_t channels, rows;
    T* slots;
    int64_t image = -1, next = 0;  // the rows before `next` of this image have been fetched

    FASTGEN_INLINE int64_t slot_size() const { return (conv.width + 2 * pad_w(conv)) * channels; }
    FASTGEN_INLINE T* row(int64_t y) const { return slots + y % rows * slot_size(); }
    FASTGEN_INLINE T* at(int64_t y, int64_t c) const { return row(y) + pad_w(conv) * channels + c; }
    FASTGEN_INLINE int64_t step() const { return channels; }
    FASTGEN_INLINE int64_t run() const { return channels; }

    void clear() {
        for (int64_t i = 0; i < rows * slot_size(); ++i) slots[i] = T(0);
    }

    // Makes rows first..last of image n available, and up to `ahead` more; calls go forward within an image.
    void advance(int64_t n, int64_t first, int64_t last, int64_t ahead) {
        if (n != image) {
            image = n;
            next = first;
        }
        if (next > last) return;
        const int64_t end = min_of(last + 1 + ahead, conv.height);
        fetch_rows(source, n, next, end, conv.width, channels, *this);
        next = end;
    }
};

// Both directions of the convolution: K runs over (tap in reading order, channel), reversed for the gradient.
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

    static constexpr int64_t kAhead =
        3;  // rows fetched together with the one that is needed: four use planes' cache lines better

    FASTGEN_INLINE int64_t depth() const { return (centre(conv) + 1) * in; }
    FASTGEN_INLINE int64_t panels() const { return panels_of<T>(out); }
    FASTGEN_INLINE int64_t ring_rows() const { return pad_h(conv) + 1 + kAhead; }
    FASTGEN_INLINE int64_t ring_size() const { return aligned<T>(ring_rows() * (conv.width + 2 * pad_w(conv)) * in); }

    void pack_panel(int64_t panel, T* packed) const {
        const int64_t taps = centre(conv) + 1, area = conv.kernel_h * conv.kernel_w;
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

    // What the centre tap of a panel covers; panels that agree share a call.
    FASTGEN_INLINE int64_t centre_bound(int64_t panel) const {
        return reverse ? panel_first_reader<T>(conv, panel) : panel_inputs<T>(conv, panel);
    }

    // One output row: the taps of each kernel row that lies inside the image.
    void row(Ring<T>& ring, const T* packed, int64_t n, int64_t y) const {
        const int64_t ph = pad_h(conv), pw = pad_w(conv), kw = conv.kernel_w;
        if (reverse)
            ring.advance(n, y, min_of(y + ph, conv.height - 1), kAhead);
        else
            ring.advance(n, max_of(y - ph, 0), y, kAhead);
        T* c = target + (n * conv.height + y) * conv.width * out;
        for (int64_t panel = 0; panel < panels();) {
            const int64_t bound = centre_bound(panel);
            int64_t end = panel + 1;
            while (end < panels() && centre_bound(end) == bound) ++end;

            Tap<T> taps[kMaskedConv2dMaxTaps + 2];
            int64_t count = 0;
            const T* b = packed + panel * depth() * kPanel<T>;
            // k elements from channel c of tap `tap`, which for the first position is at x of row source_y.
            const auto add = [&](int64_t tap, int64_t source_y, int64_t x, int64_t c, int64_t k) {
                if (k > 0)
                    taps[count++] = {ring.row(source_y) + (x + pw) * in + c, in, 1, k, b + (tap * in + c) * kPanel<T>};
            };
            if (reverse) {
                const int64_t part = in / conv.splits;
                for (int64_t split = 0; split < conv.splits; ++split) add(0, y, 0, split * part + bound, part - bound);
                add(1, y, 1, 0, pw * in);
                for (int64_t d = 1; d <= min_of(ph, conv.height - 1 - y); ++d) add(d * kw - pw, y + d, -pw, 0, kw * in);
            } else {
                for (int64_t d = min_of(ph, y); d >= 1; --d) add((ph - d) * kw, y - d, -pw, 0, kw * in);
                add(ph * kw, y, -pw, 0, pw * in + bound);
            }
            const int64_t column = panel * kPanel<T>;
            tap_gemm({taps, count, depth() * kPanel<T>, kPanel<T>, bias ? bias + column : nullptr, 0, c + column, out,
                      conv.width, min_of(end * kPanel<T>, out) - column});
            panel = end;
        }
    }

    void run() const {
        const int64_t rows = conv.batch * conv.height;
        // Small pieces keep threads busy to the end, but each fetches pad_h rows anew.
        const int64_t piece = ceil_div(rows, conv.threads * 8 * (1 + kAhead)) * (1 + kAhead);
        T* packed = scratch + conv.threads * ring_size();
#pragma omp parallel num_threads(conv.threads)
        {
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels(); ++panel) pack_panel(panel, packed + panel * depth() * kPanel<T>);
            Ring<T> ring{source, conv, in, ring_rows(), scratch + omp_get_thread_num() * ring_size()};
            ring.clear();
#pragma omp for schedule(dynamic)
            for (int64_t first = 0; first < rows; first += piece) {
                ring.image = -1;
                for (int64_t r = first; r < min_of(first + piece, rows); ++r)
                    row(ring, packed, r / conv.height, r % conv.height);
            }
        }
    }

    FASTGEN_INLINE int64_t scratch_size() const { return conv.threads * ring_size() + panels() * depth() * kPanel<T>; }
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

// Rows y0 and up of the output's gradient as panels [panel][position][kPanel].
template <class T>
struct GradBlock {
    T* data;
    int64_t width, panel_stride, y0;

    FASTGEN_INLINE T* at(int64_t y, int64_t c) const {
        return data + c / kPanel<T> * panel_stride + (y - y0) * width * kPanel<T> + c % kPanel<T>;
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

    static constexpr int64_t kBlockPositions = 256;  // of a product: they amortise loading and storing the tile
    static constexpr int64_t kMaxChunks = 8;         // partial sums: enough for threads and accuracy, little to add up
    static constexpr int64_t kChunkPositions = 1024;

    FASTGEN_INLINE int64_t depth() const { return (centre(conv) + 1) * conv.in_channels; }
    FASTGEN_INLINE int64_t panels() const { return panels_of<T>(conv.out_channels); }
    FASTGEN_INLINE int64_t padded_out() const { return panels() * kPanel<T>; }
    FASTGEN_INLINE int64_t block_rows() const { return max_of(1, min_of(conv.height, kBlockPositions / conv.width)); }
    FASTGEN_INLINE int64_t blocks_per_image() const { return ceil_div(conv.height, block_rows()); }
    FASTGEN_INLINE int64_t blocks() const { return conv.batch * blocks_per_image(); }
    FASTGEN_INLINE int64_t chunks() const {
        const int64_t wanted = ceil_div(conv.batch * conv.height * conv.width, kChunkPositions);
        return max_of(1, min_of(min_of(wanted, kMaxChunks), blocks()));
    }
    FASTGEN_INLINE int64_t ring_size() const {
        return aligned<T>((block_rows() + pad_h(conv)) * (conv.width + 2 * pad_w(conv)) * conv.in_channels);
    }
    FASTGEN_INLINE int64_t panel_stride() const { return block_rows() * conv.width * kPanel<T>; }
    FASTGEN_INLINE int64_t block_size() const { return panels() * panel_stride(); }
    FASTGEN_INLINE int64_t thread_size() const { return ring_size() + block_size(); }
    FASTGEN_INLINE int64_t partial_size() const { return (depth() + 1) * padded_out(); }  // the last row: the bias
    FASTGEN_INLINE int64_t scratch_size() const { return conv.threads * thread_size() + chunks() * partial_size(); }
    FASTGEN_INLINE T* partial(int64_t chunk) const {
        return scratch + conv.threads * thread_size() + chunk * partial_size();
    }

    // Rows y0..y1-1 of panels p0..p1-1.
    void fetch_grad(T* grads, int64_t n, int64_t y0, int64_t y1, int64_t p0, int64_t p1) const {
        Image<T> columns = grad;
        columns.data += p0 * kPanel<T> * grad.c;
        const int64_t count = min_of(p1 * kPanel<T>, conv.out_channels) - p0 * kPanel<T>;
        fetch_rows(columns, n, y0, y1, conv.width, count,
                   GradBlock<T>{grads + p0 * panel_stride(), conv.width, panel_stride(), y0});
    }

    // Adds the products of rows y0..y1-1 of image n to a partial sum, or starts it.
    void block(Ring<T>& ring, T* grads, T* sum, bool start, int64_t n, int64_t y0, int64_t y1, int64_t p0,
               int64_t p1) const {
        const int64_t ph = pad_h(conv), pw = pad_w(conv), kw = conv.kernel_w, in = conv.in_channels;
        ring.advance(n, max_of(y0 - ph, 0), y1 - 1, 0);
        fetch_grad(grads, n, y0, y1, p0, p1);
        for (int64_t d = ph; d >= 0; --d) {
            for (int64_t panel = p0; panel < p1;) {
                const int64_t bound = panel_inputs<T>(conv, panel);
                int64_t end = panel + 1;
                while (end < p1 && (d > 0 || panel_inputs<T>(conv, end) == bound)) ++end;
                Tap<T> taps[kBlockPositions];
                int64_t count = 0;
                for (int64_t y = max_of(y0, d); y < y1; ++y) {
                    taps[count++] = {ring.row(y - d), 1, in, conv.width,
                                     grads + panel * panel_stride() + (y - y0) * conv.width * kPanel<T>};
                }
                T* c = sum + (ph - d) * kw * in * padded_out() + panel * kPanel<T>;
                tap_gemm({taps, count, panel_stride(), kPanel<T>, start ? nullptr : c, padded_out(), c, padded_out(),
                          d > 0 ? kw * in : pw * in + bound, (end - panel) * kPanel<T>});
                panel = end;
            }
        }
        if (grad_bias) add_bias(grads, sum + depth() * padded_out(), start, (y1 - y0) * conv.width, p0, p1);
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
        ring.image = -1;
        const int64_t first = blocks() * chunk / chunks(), last = blocks() * (chunk + 1) / chunks();
        for (int64_t i = first; i < last; ++i) {
            const int64_t n = i / blocks_per_image(), y0 = i % blocks_per_image() * block_rows();
            block(ring, grads, partial(chunk), i == first, n, y0, min_of(y0 + block_rows(), conv.height), p0, p1);
        }
    }

    // Adds the partial sums in order and writes output channels of one panel in PyTorch's layout.
    void finish(int64_t panel) const {
        const int64_t in = conv.in_channels, area = conv.kernel_h * conv.kernel_w;
        const int64_t column = panel * kPanel<T>, columns = min_of(kPanel<T>, conv.out_channels - column);
        int64_t inputs[kPanel<T>];  // of output channel column + j
        for (int64_t j = 0; j < columns; ++j) inputs[j] = readable_inputs(conv, column + j);
        T total[kPanel<T>];
        const auto add = [&](int64_t row) {
            for (int64_t j = 0; j < kPanel<T>; j += kLanes<T>) {
                Vec<T> sum{};
                for (int64_t s = 0; s < chunks(); ++s) sum += load(partial(s) + row * padded_out() + column + j);
                store(total + j, sum);
            }
        };
        for (int64_t i = 0; i < in; ++i) {
            T* to = grad_weight + (column * in + i) * area;
            for (int64_t t = 0; t <= centre(conv); ++t) {
                if (t == centre(conv) && i >= panel_inputs<T>(conv, panel)) {
                    for (int64_t j = 0; j < columns; ++j) to[j * in * area + t] = T(0);
                    continue;
                }
                add(t * in + i);
                for (int64_t j = 0; j < columns; ++j) {
                    const bool open = t < centre(conv) || i < inputs[j];
                    to[j * in * area + t] = open ? total[j] : T(0);
                }
            }
            for (int64_t j = 0; j < columns; ++j) {
                for (int64_t t = centre(conv) + 1; t < area; ++t) to[j * in * area + t] = T(0);
            }
        }
        if (grad_bias) {
            add(depth());
            for (int64_t j = 0; j < columns; ++j) grad_bias[column + j] = total[j];
        }
    }

    void run() const {
        // Where there are more threads than chunks, the panels of a chunk are shared out as well.
        const int64_t groups = min_of(panels(), ceil_div(conv.threads, chunks()));
#pragma omp parallel num_threads(conv.threads)
        {
            T* own = scratch + omp_get_thread_num() * thread_size();
            Ring<T> ring{input, conv, conv.in_channels, block_rows() + pad_h(conv), own};
            ring.clear();
            T* grads = own + ring_size();
            for (int64_t i = 0; i < block_size(); ++i)
                grads[i] = T(0);  // of the last panel, some columns are never written
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < chunks() * groups; ++item) {
                const int64_t group = item % groups;
                chunk(item / groups, ring, grads, panels() * group / groups, panels() * (group + 1) / groups);
            }
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels(); ++panel) finish(panel);
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

// Convolutions by overlap-add: every input position is multiplied with the weights of all kernel elements, in one plain
// matrix product, and outputs sum what reaches them. For few output channels, whose products by phases would leave most of a
// vector's columns empty.
//
// In the words of a transposed convolution: input x adds to the outputs x * stride - padding + k. Columns of the product are
// (kernel row, kernel column, output channel), with kernel columns up to a multiple of the stride, so that a run of `stride`
// neighbouring outputs, all channels, is a sum of slices of so many columns: slice j of the input j positions to the left.
//
// The work is cut into items of some output lines of an image; lines of inputs that two items need are multiplied twice. An
// output is the sum, kernel row by kernel row and slice by slice, of chains over the input channels, whatever the cut.
#pragma once

#include <omp.h>

#include <type_traits>

#include "conv_products.h"

namespace fastgen::FASTGEN_ISA {

template <class E>
struct OverlapAdd {
    using T = SumOf<E>;

    static constexpr int64_t kProductBytes = 256 << 10;  // of an item: a part of the second-level cache
    static constexpr int64_t kProductRows = 56;          // at once: they and the weights are in the first-level cache
    static constexpr int kRunsAtOnce = 4;

    const ConvPlan& plan;
    const TapConvCall<E>& call;
    T* scratch;

    FASTGEN_INLINE const OverlapAxis& y() const { return plan.overlap_y; }
    FASTGEN_INLINE const OverlapAxis& x() const { return plan.overlap_x; }
    FASTGEN_INLINE int64_t in_width() const { return plan.x.in_size; }
    FASTGEN_INLINE int64_t channels() const { return plan.out_channels; }
    FASTGEN_INLINE int64_t run_size() const { return x().stride * channels(); }
    FASTGEN_INLINE int64_t row_columns() const { return x().slices() * run_size(); }
    FASTGEN_INLINE int64_t columns() const { return y().kernel * row_columns(); }
    FASTGEN_INLINE int64_t panels() const { return panels_of<T>(columns()); }
    FASTGEN_INLINE int64_t width() const { return panels() * kPanel<T>; }
    FASTGEN_INLINE int64_t packed_size() const { return width() * plan.in_channels; }

    void pack(const ConvWeight<E>& weight, E* packed) const {
        for (int64_t i = 0; i < packed_size(); ++i) packed[i] = E{};
        for (int64_t ky = 0; ky < y().kernel; ++ky) {
            for (int64_t kx = 0; kx < x().kernel; ++kx) {
                const E* from = weight.data + y().index(ky) * weight.kernel_y + x().index(kx) * weight.kernel_x;
                for (int64_t o = 0; o < channels(); ++o) {
                    const int64_t column = ky * row_columns() + kx * channels() + o;
                    E* to = packed + column / kPanel<T> * plan.in_channels * kPanel<T>;
                    for (int64_t c = 0; c < plan.in_channels; ++c)
                        to[Products<E>::weight_at(c, column % kPanel<T>)] =
                            from[o * weight.out_channel + c * weight.in_channel];
                }
            }
        }
    }

    // Items: bands of output lines.

    FASTGEN_INLINE int64_t bands() const {
        const int64_t line = in_width() * width() * static_cast<int64_t>(sizeof(T));
        const int64_t at_once = max_of(2 * y().slices(), kProductBytes / line);
        // So that few lines are multiplied twice.
        const int64_t most = max_of(1, plan.y.in_size / (4 * y().slices()));
        const int64_t for_threads =
            call.threads > 1 ? min_of(most, ceil_div(2 * call.threads, max_of(1, call.batch))) : 1;
        return min_of(plan.y.out_size, max_of(ceil_div(plan.y.in_size, at_once), for_threads));
    }
    FASTGEN_INLINE int64_t most_lines() const {  // of inputs
        const int64_t outputs = ceil_div(plan.y.out_size, bands());
        return min_of(plan.y.in_size, (outputs + y().kernel - 2) / y().stride + 2);
    }

    // Scratch: scale and shift of every output of a line; then for each thread the products, a line of sums, and the
    // item's input where its channels are not neighbours. The last vector of each may stick out, by less than a panel.

    FASTGEN_INLINE int64_t line_size() const { return plan.x.out_size * channels(); }
    FASTGEN_INLINE int64_t affine_size() const { return aligned<T>(line_size() + kPanel<T>); }
    FASTGEN_INLINE int64_t products_size() const { return aligned<T>(most_lines() * in_width() * width() + kPanel<T>); }
    FASTGEN_INLINE int64_t sums_size() const {  // runs may stick out at either end
        return aligned<T>((in_width() + x().slices() + x().padding) * run_size() + line_size() + kPanel<T>);
    }
    FASTGEN_INLINE bool staged() const { return call.input.c != 1 && plan.in_channels > 1; }
    FASTGEN_INLINE int64_t staged_size() const {
        return staged() ? lines_for<T, E>(most_lines() * in_width() * plan.in_channels) : 0;
    }
    FASTGEN_INLINE int64_t thread_size() const { return products_size() + sums_size() + staged_size(); }
    FASTGEN_INLINE int64_t scratch_size() const { return 2 * affine_size() + call.threads * thread_size(); }

    void run() const {
        T *scale = scratch, *shift = scale + affine_size();
        for (int64_t i = 0; i < affine_size(); ++i) {
            scale[i] = call.scale ? call.scale[i % channels()] : T(1);
            shift[i] = call.shift ? call.shift[i % channels()] : T(0);
        }
        const int64_t bands = this->bands(), items = call.batch * bands;
#pragma omp parallel num_threads(call.threads)
        {
            T* own = scratch + 2 * affine_size() + omp_get_thread_num() * thread_size();
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < items; ++i) {
                const int64_t band = i % bands;
                item(i / bands, plan.y.out_size * band / bands, plan.y.out_size * (band + 1) / bands, own);
            }
        }
    }

    // Output lines out_begin..out_end-1 of image n.
    void item(int64_t n, int64_t out_begin, int64_t out_end, T* own) const {
        const int64_t reach = out_begin + y().padding - y().kernel + 1;
        const int64_t first = reach > 0 ? ceil_div(reach, y().stride) : 0;
        const int64_t last = min_of(plan.y.in_size, (out_end - 1 + y().padding) / y().stride + 1);
        T *products = own, *sums = own + products_size();
        if (first < last) multiply(n, first, last, products, reinterpret_cast<E*>(sums + sums_size()));
        with_activation(call.activation, [&](auto tag) __attribute__((always_inline)) {
            for (int64_t line = out_begin; line < out_end; ++line) {
                add(products, first, last, line, sums);
                finish<decltype(tag)::value>(sums + x().padding * channels(), n, line);
            }
        });
    }

    // Of the input lines first..last-1.
    void multiply(int64_t n, int64_t first, int64_t last, T* products, E* stage) const {
        Image<E> source = call.input;
        const E* from = source.data + n * source.n + first * source.h;
        if (staged()) {
            fetch_rows(source, n, first, last, in_width(), plan.in_channels,
                       DenseLines<E>{stage, first, in_width(), plan.in_channels});
            from = stage;
            source.w = plan.in_channels;
            source.h = in_width() * source.w;
        }
        // Lines that follow on each other are one.
        const bool dense = source.h == in_width() * source.w;
        const int64_t lines = dense ? 1 : last - first, rows = dense ? (last - first) * in_width() : in_width();
        for (int64_t line = 0; line < lines; ++line, products += rows * width()) {
            const int64_t pieces = ceil_div(rows, kProductRows);
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t begin = rows * piece / pieces, end = rows * (piece + 1) / pieces;
                const auto term = Products<E>::term(from + line * source.h + begin * source.w, source.w,
                                                    plan.in_channels, call.packed);
                Products<E>::run(&term, 1, plan.in_channels * kPanel<T>, products + begin * width(), width(),
                                 end - begin, panels(), nullptr);
            }
        }
    }

    // The sums of an output line, from output -padding on.
    void add(const T* products, int64_t first, int64_t last, int64_t line, T* sums) const {
        const int64_t slices = x().slices(), run = run_size(), width = this->width(), in_width = this->in_width();
        int64_t offsets[kMaxOverlapKernel], count = 0;  // of slice 0 of the kernel rows that reach the line
        for (int64_t k = 0; k < y().kernel; ++k) {
            const int64_t at = line + y().padding - k;
            if (at < first * y().stride || at >= last * y().stride || at % y().stride != 0) continue;
            offsets[count++] = (at / y().stride - first) * in_width * width + k * row_columns();
        }
        // Runs from i on, from the slices that lie inside the image; several at a time, as a sum waits for itself.
        const auto add_runs = [&](auto runs, int64_t i, int64_t begin, int64_t end) __attribute__((always_inline)) {
            for (int64_t c = 0; c < run; c += kLanes<T>) {
                Vec<T> sum[runs.value] = {};
                for (int64_t k = 0; k < count; ++k) {
                    const T* from = products + offsets[k] + i * width + c;
                    for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 4
                        for (int r = 0; r < runs.value; ++r)
                            sum[r] = sum[r] + load(from + r * width + j * (run - width));
                    }
                }
#pragma GCC unroll 4
                for (int r = 0; r < runs.value; ++r) {
                    // What is beyond a run's end, the next one replaces, unless it was there before.
                    T* to = sums + (i + r) * run + c;
                    if (c + kLanes<T> <= run || run <= kLanes<T> || r + 1 == runs.value)
                        store(to, sum[r]);
                    else
                        store_n(to, sum[r], static_cast<int>(run - c));
                }
            }
        };
        const int64_t runs = in_width + slices;
        for (int64_t i = 0; i < runs;) {
            if (i + 1 >= slices && i + kRunsAtOnce <= in_width) {
                add_runs(std::integral_constant<int, kRunsAtOnce>{}, i, 0, slices);
                i += kRunsAtOnce;
            } else {
                add_runs(std::integral_constant<int, 1>{}, i, max_of(0, i - in_width + 1), min_of(slices, i + 1));
                ++i;
            }
        }
        for (int64_t i = runs * run; i < x().padding * channels() + line_size(); ++i) sums[i] = T(0);
    }

    template <Activation A>
    FASTGEN_INLINE void finish(const T* sums, int64_t n, int64_t line) const {
        const T *scale = scratch, *shift = scale + affine_size();
        const Vec<T> parameter = broadcast(call.parameter);
        E* to = call.output + (n * plan.y.out_size + line) * line_size();
        for (int64_t i = 0; i < line_size(); i += kLanes<T>) {
            const Vec<T> value = activate<A>(fma(load(sums + i), load(scale + i), load(shift + i)), parameter);
            store_some(to + i, value, min_of(kLanes<T>, line_size() - i));
        }
    }
};

}  // namespace fastgen::FASTGEN_ISA

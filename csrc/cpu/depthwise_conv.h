// Convolutions of each channel by itself, with channels as lanes of vectors.
//
// A tile of neighbouring outputs and a vector of channels or two stays in registers while all kernel elements are added.
// Where neighbouring lines read the same ones, it has two of them, and what is loaded serves both: it is loads that bound
// the sums otherwise. Tiles go by positions, then channels, as they lie in memory: images of many channels would meet in
// few sets of the cache otherwise. Elements outside the image are left out.
//
// The work is cut into items of some output lines of an image. Every output is summed in the order of the kernel's elements,
// whatever the cut. Packed weights are [kernel rows][kernel columns][channels].
#pragma once

#include <omp.h>

#include <type_traits>

#include "integers.h"
#include "tap_conv.h"

namespace fastgen::FASTGEN_ISA {

template <class T>
struct DepthwiseConv {
    static constexpr int kLongRun = 6, kShortRun = 4;              // outputs of a line in a tile
    static constexpr int kPairVecs = kVecRegisters == 32 ? 2 : 1;  // of channels, in a tile of two lines
    static constexpr int64_t kItems = 4;                           // of a thread, where there are lines enough
    static constexpr int64_t kStagedBytes = 512 << 10;  // of an item: the more, the fewer lines are copied twice

    template <int N>
    using Count = std::integral_constant<int, N>;

    const ConvPlan& plan;
    const TapConvCall<T>& call;
    T* scratch;

    FASTGEN_INLINE const ConvAxis& y() const { return plan.depthwise_y; }
    FASTGEN_INLINE const ConvAxis& x() const { return plan.depthwise_x; }
    FASTGEN_INLINE int64_t channels() const { return plan.groups; }
    FASTGEN_INLINE int64_t packed_size() const { return y().kernel * x().kernel * channels(); }

    void pack(const ConvWeight<T>& weight, T* packed) const {
        for (int64_t ky = 0; ky < y().kernel; ++ky) {
            for (int64_t kx = 0; kx < x().kernel; ++kx) {
                const T* from = weight.data + ky * weight.kernel_y + kx * weight.kernel_x;
                for (int64_t c = 0; c < channels(); ++c) *packed++ = from[c * weight.group];
            }
        }
    }

    // Items, and the input of each thread's, where its channels are not neighbours.

    FASTGEN_INLINE bool staged() const { return call.input.c != 1; }
    FASTGEN_INLINE int64_t line_size() const { return x().in_size * channels(); }
    FASTGEN_INLINE int64_t input_lines(int64_t lines) const {
        return min_of(y().in_size, (lines - 1) * y().stride + (y().kernel - 1) * y().dilation + 1);
    }
    FASTGEN_INLINE int64_t item_lines() const {
        int64_t lines = max_of(2, ceil_div(call.batch * y().out_size, kItems * call.threads) / 2 * 2);
        const int64_t bytes = line_size() * static_cast<int64_t>(sizeof(T));
        while (staged() && lines > 2 && input_lines(lines) * bytes > kStagedBytes) lines -= 2;
        return min_of(lines, y().out_size);
    }
    FASTGEN_INLINE int64_t staged_size() const { return staged() ? input_lines(item_lines()) * line_size() : 0; }
    FASTGEN_INLINE int64_t scratch_size() const { return call.threads * staged_size(); }

    void run() const {
        const int64_t lines = item_lines(), bands = ceil_div(y().out_size, lines);
#pragma omp parallel for schedule(dynamic) num_threads(call.threads)
        for (int64_t i = 0; i < call.batch * bands; ++i) {
            const int64_t begin = i % bands * lines;
            item(i / bands, begin, min_of(y().out_size, begin + lines), scratch + omp_get_thread_num() * staged_size());
        }
    }

    void item(int64_t image, int64_t begin, int64_t end, T* own) const {
        const int64_t first = max_of(0, begin * y().stride - y().padding);
        Image<T> source = call.input;
        if (staged()) {
            const int64_t last =
                min_of(y().in_size, (end - 1) * y().stride - y().padding + (y().kernel - 1) * y().dilation + 1);
            const DenseLines<T> target{own, first, x().in_size, channels()};
            if (first < last) fetch_rows(call.input, image, first, last, x().in_size, channels(), target);
            source = {own - first * line_size(), 0, 1, line_size(), channels()};
        } else {
            source.data += image * source.n;
        }
        T* output = call.output + image * y().out_size * x().out_size * channels();
        const bool in_pairs = y().stride == 1 && y().dilation == 1;
        for (int64_t oy = begin; oy < end;) {
            const bool pair = in_pairs && oy + 1 < end;
            if (pair)
                lines<2>(source, oy, output);
            else
                lines<1>(source, oy, output);
            oy += pair ? 2 : 1;
        }
    }

    // Output lines y, y + 1, ...
    struct Band {
        Image<T> source;     // at line y * stride - padding, which may lie outside
        int64_t begin, end;  // kernel lines of output line y, beyond its own ones for the others, that meet the image
        T* output;
    };

    template <int Lines>
    void lines(Image<T> source, int64_t oy, T* output) const {
        const int64_t first = oy * y().stride - y().padding, width = x().out_size, size = width * channels();
        source.data += first * source.h;
        const Band band{source, first < 0 ? ceil_div(-first, y().dilation) : 0,
                        min_of(y().kernel + Lines - 1, ceil_div(y().in_size - first, y().dilation)),
                        output + oy * size};
        for (int64_t ox = 0; ox < width;) {
            const int64_t rest = width - ox, left = rest % kLongRun;
            // Short runs where long ones would leave two or three outputs.
            if (rest >= kLongRun && (left < 2 || left >= kShortRun || rest < 2 * kShortRun))
                ox += run_of<Lines, kLongRun>(band, ox);
            else
                ox += rest >= kShortRun ? run_of<Lines, kShortRun>(band, ox) : run_of<Lines, 1>(band, ox);
        }
        activate_in_place(band.output, Lines * size);
    }

    // While they are in the cache.
    void activate_in_place(T* values, int64_t size) const {
        const Vec<T> parameter = broadcast(call.parameter);
        with_activation(call.activation, [&](auto tag) {
            constexpr Activation kind = decltype(tag)::value;
            if constexpr (kind != Activation::none) {
                for (int64_t i = 0; i < size; i += kLanes<T>) {
                    const int64_t count = min_of(kLanes<T>, size - i);
                    store_some(values + i, activate<kind>(load_some(values + i, count), parameter), count);
                }
            }
        });
    }

    // Of `Run` outputs of each of `Lines` lines; all is in local variables, as a store might change what is not. A kernel
    // line of the first output line is the one before it of the second.
    template <int Lines, int Run, int Vecs, bool Inside, bool Whole>
    FASTGEN_INLINE void tile(const Band& band, int64_t ox, int64_t c) const {
        const int64_t channels = this->channels(), kernel = x().kernel, width = x().in_size, stride = x().stride,
                      dilation = x().dilation, first = ox * stride - x().padding;
        const int64_t step = stride * band.source.w, across = dilation * band.source.w, row = kernel * channels;
        const int64_t down = y().dilation * band.source.h, line_size = x().out_size * channels;
        const int rest = static_cast<int>(channels - c);  // of the last vector, where it is not whole
        const auto get = [rest](const T* from)
                             __attribute__((always_inline)) { return Whole ? load(from) : load_n(from, rest); };
        Vec<T> sum[Lines][Run][Vecs];
        for (auto& line : sum) {
            for (auto& output : line) {
                for (Vec<T>& value : output) value = Vec<T>{};
            }
        }
        const T* from_line = band.source.data + band.begin * down + first * band.source.w + c;
        const T* weight_line = call.packed + band.begin * row + c;
        // Adds what output lines `begin` to `end` - 1 have of a line of the input, and goes on to the next.
        const auto add = [&](auto begin, auto end) __attribute__((always_inline)) {
            const T *from = from_line, *weights = weight_line;
            int64_t at = first;
            for (int64_t j = 0; j < kernel; ++j) {
                Vec<T> weight[Lines][Vecs];
                for (int l = begin; l < end; ++l) {
                    for (int v = 0; v < Vecs; ++v) weight[l][v] = get(weights - l * row + v * kLanes<T>);
                }
                const auto multiply = [&](int r) __attribute__((always_inline)) {
                    for (int v = 0; v < Vecs; ++v) {
                        Vec<T> value = get(from + r * step + v * kLanes<T>);
                        if (end - begin > 1) keep_in_register(value);
                        for (int l = begin; l < end; ++l) sum[l][r][v] = fma(weight[l][v], value, sum[l][r][v]);
                    }
                };
                if (Inside || (at >= 0 && at + (Run - 1) * stride < width)) {
                    for (int r = 0; r < Run; ++r) multiply(r);
                } else {
                    for (int r = 0; r < Run; ++r) {
                        if (at + r * stride >= 0 && at + r * stride < width) multiply(r);
                    }
                }
                at += dilation;
                from += across;
                weights += channels;
            }
            from_line += down;
            weight_line += row;
        };
        int64_t i = band.begin;
        if constexpr (Lines == 1) {
            for (; i < band.end; ++i) add(Count<0>{}, Count<1>{});
        } else {
            const int64_t both = min_of(band.end, y().kernel);
            if (i == 0 && i < band.end) add(Count<0>{}, Count<1>{}), ++i;
            for (; i < both; ++i) add(Count<0>{}, Count<2>{});
            if (i < band.end) add(Count<1>{}, Count<2>{});
        }
        T* to = band.output + ox * channels + c;
        for (int v = 0; v < Vecs; ++v) {
            const Vec<T> scale = call.scale ? get(call.scale + c + v * kLanes<T>) : broadcast(T(1));
            const Vec<T> shift = call.shift ? get(call.shift + c + v * kLanes<T>) : Vec<T>{};
            for (int l = 0; l < Lines; ++l) {
                for (int r = 0; r < Run; ++r)
                    store_some(to + l * line_size + r * channels + v * kLanes<T>, fma(scale, sum[l][r][v], shift),
                               Whole ? kLanes<T> : rest);
            }
        }
    }

    template <int Lines, int Run, bool Inside>
    void tiles(const Band band, int64_t ox) const {
        constexpr int kVecs = Lines == 1 ? 2 : kPairVecs;
        const int64_t channels = this->channels();
        int64_t c = 0;
        for (; c + kVecs * kLanes<T> <= channels; c += kVecs * kLanes<T>)
            tile<Lines, Run, kVecs, Inside, true>(band, ox, c);
        if (kVecs > 1 && c + kLanes<T> <= channels) {
            tile<Lines, Run, 1, Inside, true>(band, ox, c);
            c += kLanes<T>;
        }
        if (c < channels) tile<Lines, Run, 1, Inside, false>(band, ox, c);
    }

    template <int Lines, int Run>
    FASTGEN_INLINE int64_t run_of(const Band& band, int64_t ox) const {
        const int64_t first = ox * x().stride - x().padding;
        const int64_t last = first + (Run - 1) * x().stride + (x().kernel - 1) * x().dilation;
        if (first >= 0 && last < x().in_size)
            tiles<Lines, Run, true>(band, ox);
        else
            tiles<Lines, Run, false>(band, ox);
        return Run;
    }
};

}  // namespace fastgen::FASTGEN_ISA

// What masked_conv2d.cpp and its weight gradient share: the geometry of the mask, and the ring of image rows, as they
// are and as minimal filtering wants them.
//
// Kernels of 3x3 are filtered in pairs of positions x = 2j and 2j + 1 (minimal_filter.h). Above the centre row
//
//     points     d0 - d2,  d1 + d2,                d2 - d1,                d3 - d1      of  d_i = in[2j - 1 + i]
//     weights    g0,       (g0 + g1 + g2) / 2,     (g0 - g1 + g2) / 2,     g2
//
// four products stand for six, and in the centre row, where colours do not cut it, three for four:
//
//     points     d0 - d1,  d1,                                             d2 - d1      from the first tap on
//     weights    g0,       g0 + g1,                                        g1
//
// With the sums U of products with points 0 to 3 over channels and kernel rows, out[2j] = U0 + (U1 + U2) and
// out[2j + 1] = U3 + (U1 - U2). The sums for the weights' gradient take out[2j], out[2j] + out[2j + 1], out[2j] -
// out[2j + 1] and out[2j + 1] in the place of weights. No position depends, not even by rounding, on what its mask hides.
#pragma once

#include "image.h"
#include "integers.h"
#include "masked_conv2d.h"
#include "minimal_filter.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {

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

// Whether a convolution is filtered, and its centre row with it. The batch has no say in it, and so changes no bit.
// Errors grow by a third: more than twice those of plain PyTorch with one image row or with taller kernels.
struct Filtered {
    bool rows, centre;
};

FASTGEN_INLINE Filtered filtered(const MaskedConv2d& conv) {
    constexpr int64_t kLeastWidth = 6, kLeastChannels = 32;  // from there on making the points costs less than it saves
    const bool rows = conv.kernel_h == 3 && conv.kernel_w == 3 && conv.height > 1 && conv.width >= kLeastWidth &&
                      min_of(conv.in_channels, conv.out_channels) >= kLeastChannels;
    return {rows, rows && conv.own_color && conv.colors == 1};
}

FASTGEN_INLINE int64_t pairs_of(const MaskedConv2d& conv) { return ceil_div(conv.width, 2); }

// Lines of channels that take part in the products of a kernel: those of a filtered one belong to the points of its
// rows, nearest to the centre first, and then to the centre row.
FASTGEN_INLINE int64_t lines_of(const MaskedConv2d& conv) {
    return filtered(conv).rows ? kPoints * pad_h(conv) + 3 : centre(conv) + 1;
}

// The zero-padded rows [pad + width + pad][channels] of one image that are in use: row y is in slot y % rows. Where the
// convolution is filtered, a row's points follow as lines [pairs][channels]: four, and the centre row's first and last.
template <class T>
class Ring {
public:
    // first_tap: of the centre row, -1, or 0 where taps are reversed.
    Ring(const Image<T>& source, const MaskedConv2d& conv, int64_t channels, int64_t rows, int64_t first_tap, T* slots)
        : source_(source),
          conv_(conv),
          how_(filtered(conv)),
          channels_(channels),
          rows_(rows),
          first_tap_(first_tap),
          line_(aligned<T>(pairs_of(conv) * channels)),
          lines_at_(row_size(conv, channels)),
          slot_(slot_size(conv, channels)),
          slots_(slots) {
        for (int64_t i = 0; i < rows * slot_; ++i) slots[i] = T(0);
    }

    static FASTGEN_INLINE int64_t size(const MaskedConv2d& conv, int64_t channels, int64_t rows) {
        return rows * slot_size(conv, channels);
    }

    FASTGEN_INLINE T* row(int64_t y) const { return slots_ + y % rows_ * slot_; }
    FASTGEN_INLINE T* at(int64_t y, int64_t c) const { return row(y) + pad_w(conv_) * channels_ + c; }
    FASTGEN_INLINE T* line(int64_t y, int64_t i) const { return row(y) + lines_at_ + i * line_; }
    FASTGEN_INLINE int64_t step() const { return channels_; }
    FASTGEN_INLINE int64_t run() const { return channels_; }

    // The next rows are of another place.
    void restart() { image_ = -1; }

    // Makes rows first..last of image n available, and up to `ahead` more; calls go forward within an image.
    void advance(int64_t n, int64_t first, int64_t last, int64_t ahead) {
        if (n != image_) {
            image_ = n;
            next_ = first;
        }
        if (next_ > last) return;
        const int64_t end = min_of(last + 1 + ahead, conv_.height);
        fetch_rows(source_, n, next_, end, conv_.width, channels_, *this);
        for (int64_t y = next_; y < end && how_.rows; ++y) make_points(y);
        next_ = end;
    }

private:
    static FASTGEN_INLINE int64_t row_size(const MaskedConv2d& conv, int64_t channels) {
        const bool pairs = filtered(conv).rows;
        const int64_t positions = conv.width + 2 * pad_w(conv) + (pairs ? conv.width % 2 : 0);
        return pairs ? aligned<T>(positions * channels) : positions * channels;
    }
    static FASTGEN_INLINE int64_t slot_size(const MaskedConv2d& conv, int64_t channels) {
        const int64_t lines = filtered(conv).rows ? kPoints + 2 : 0;
        return row_size(conv, channels) + lines * aligned<T>(pairs_of(conv) * channels);
    }

    void make_points(int64_t y) const {
        const T* from = at(y, 0) - channels_;
        T* first = line(y, 0);
        for (int64_t j = 0; j < pairs_of(conv_); ++j, from += 2 * channels_, first += channels_) {
            for (int64_t c = 0; c < channels_; c += kLanes<T>) {
                const int64_t count = min_of(kLanes<T>, channels_ - c);
                Vec<T> d[kPoints];
                for (int64_t i = 0; i < kPoints; ++i) d[i] = some(from + i * channels_ + c, count);
                if (how_.centre) {
                    const Vec<T> d0 = first_tap_ < 0 ? d[0] : d[1], d1 = first_tap_ < 0 ? d[1] : d[2],
                                 d2 = first_tap_ < 0 ? d[2] : d[3];
                    keep(first + kPoints * line_ + c, d0 - d1, count);
                    keep(first + (kPoints + 1) * line_ + c, d2 - d1, count);
                }
                input_points<true>(d, 1);
                for (int64_t i = 0; i < kPoints; ++i) keep(first + i * line_ + c, d[i], count);
            }
        }
    }

    static FASTGEN_INLINE Vec<T> some(const T* from, int64_t count) {
        return count == kLanes<T> ? load(from) : load_n(from, static_cast<int>(count));
    }
    static FASTGEN_INLINE void keep(T* to, Vec<T> v, int64_t count) {
        if (count == kLanes<T>)
            store(to, v);
        else
            store_n(to, v, static_cast<int>(count));
    }

    const Image<T>& source_;
    const MaskedConv2d& conv_;
    const Filtered how_;
    const int64_t channels_, rows_, first_tap_;
    const int64_t line_, lines_at_, slot_;  // elements
    T* const slots_;
    int64_t image_ = -1, next_ = 0;  // the rows before `next_` of this image have been fetched
};

}  // namespace fastgen::FASTGEN_ISA

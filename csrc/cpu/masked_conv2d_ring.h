// What masked_conv2d.cpp and its weight gradient share: the geometry of the mask, and the ring of image rows, as they
// are and as minimal filtering wants them.
//
// Kernels with one row above the pixel's own are filtered in pairs of positions x = 2j and 2j + 1 (minimal_filter.h),
// row by row. A row of three taps takes four products for six, where its first tap reads l columns to the left:
//
//     points     d0 - d2,  d1 + d2,                d2 - d1,                d3 - d1      of  d_i = in[2j - l + i]
//     weights    g0,       (g0 + g1 + g2) / 2,     (g0 - g1 + g2) / 2,     g2
//
// and one of two taps, which the pixel's own row is in a mask of 3x3, three for four:
//
//     points     d0 - d1,  d1,                                             d2 - d1
//     weights    g0,       g0 + g1,                                        g1
//
// With the sums U of products with points 0 to 3 over channels and kernel rows, out[2j] = U0 + (U1 + U2) and
// out[2j + 1] = U3 + (U1 - U2). The sums for the weights' gradient take out[2j], out[2j] + out[2j + 1], out[2j] -
// out[2j + 1] and out[2j + 1] in the place of weights. No position depends, not even by rounding, on what it does not see.
#pragma once

#include "image.h"
#include "integers.h"
#include "masked_conv2d.h"
#include "minimal_filter.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {

// Columns to the right that rows above, and that the pixel's own row reaches.
FASTGEN_INLINE int64_t right(const MaskedConv2d& conv) { return conv.kernel_w - 1 - conv.left; }
FASTGEN_INLINE int64_t own_right(const MaskedConv2d& conv) { return conv.own_taps - 1 - conv.left; }

// In reading order the first ones of the kernel; of the last one colours may hide channels.
FASTGEN_INLINE int64_t open_taps(const MaskedConv2d& conv) { return conv.above * conv.kernel_w + conv.own_taps; }

// Through the last open tap, output channel o reads the input channels below this.
FASTGEN_INLINE int64_t readable_inputs(const MaskedConv2d& conv, int64_t o) {
    const int64_t part = conv.out_channels / conv.splits;
    const int64_t color = o % part * conv.colors / part;
    return min_of(conv.in_channels, ceil_div((color + conv.own_color) * conv.in_channels, conv.colors));
}

// Through the last open tap, input channel i reaches the output channels from this on, in each of the splits.
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

// The taps of a filtered row: three or two; none where rows are multiplied as they are.
struct Filtered {
    int64_t rows, own;  // of the rows above, of the pixel's own row
};

// The batch has no say in it, and so changes no bit. Errors grow by a third: more than twice those of plain PyTorch with
// one image row or with taller kernels. Colours that cut the own row leave it as it is.
FASTGEN_INLINE Filtered filtered(const MaskedConv2d& conv) {
    constexpr int64_t kLeastWidth = 6, kLeastChannels = 32;  // from there on making the points costs less than it saves
    const bool rows = conv.above == 1 && (conv.kernel_w == 3 || conv.kernel_w == 2) && conv.height > 1 &&
                      conv.width >= kLeastWidth && min_of(conv.in_channels, conv.out_channels) >= kLeastChannels;
    if (!rows) return {0, 0};
    return {conv.kernel_w, conv.own_color && conv.colors == 1 ? conv.own_taps : 0};
}

FASTGEN_INLINE int64_t pairs_of(const MaskedConv2d& conv) { return ceil_div(conv.width, 2); }

// Of a filtered row of `taps`: its products and their order.
FASTGEN_INLINE int64_t products_of(int64_t taps) { return taps == 3 ? kPoints : taps == 2 ? 3 : 0; }
FASTGEN_INLINE bool has_point(int64_t taps, int64_t point) { return taps == 3 || (taps == 2 && point != 2); }
FASTGEN_INLINE int64_t product_of(int64_t taps, int64_t point) { return taps == 2 && point == 3 ? 2 : point; }

// Of weights and their gradients: lines of channels, those of the rows nearest to the pixel's own first, then its own.
// An own row that is not filtered has a line for each tap.
FASTGEN_INLINE int64_t own_line(const MaskedConv2d& conv) {
    return conv.above * (filtered(conv).rows ? products_of(filtered(conv).rows) : conv.kernel_w);
}
FASTGEN_INLINE int64_t lines_of(const MaskedConv2d& conv) {
    return own_line(conv) + (filtered(conv).own ? products_of(filtered(conv).own) : conv.own_taps);
}

// The zero-padded rows that are in use, of all images one after the other: row r, which is row r % height of its image, is
// in slot r % rows, as [positions][channels] from the first that a tap reads. Where the convolution is filtered, a row's
// points follow as lines [pairs][channels]: of a row above, and of the pixel's own row where that has fewer taps.
template <class T>
class Ring {
public:
    Ring(const Image<T>& source, const MaskedConv2d& conv, int64_t channels, int64_t rows, bool reverse, T* slots)
        : source_(source),
          conv_(conv),
          how_(filtered(conv)),
          channels_(channels),
          rows_(rows),
          before_(reverse ? right(conv) : conv.left),
          own_before_(reverse ? own_right(conv) : conv.left),
          pair_(pair_size(channels)),
          line_(pairs_of(conv) * pair_),
          lines_at_(row_size(conv, channels)),
          slot_(slot_size(conv, channels)),
          slots_(slots) {
        for (int64_t y = 0; y < rows; ++y) {  // what is outside the image; all else is written before it is read
            const int64_t begin = before_ * channels, end = begin + conv.width * channels;
            for (int64_t i = 0; i < begin; ++i) row(y)[i] = T(0);
            for (int64_t i = end; i < lines_at_; ++i) row(y)[i] = T(0);
        }
    }

    static FASTGEN_INLINE int64_t size(const MaskedConv2d& conv, int64_t channels, int64_t rows) {
        return rows * slot_size(conv, channels);
    }

    FASTGEN_INLINE T* row(int64_t y) const { return slots_ + y % rows_ * slot_; }
    FASTGEN_INLINE T* own_row(int64_t y) const { return row(y) + (before_ - own_before_) * channels_; }

    // A point of the pairs of row y, and how far one pair is from the next: of a row above, of the pixel's own row.
    struct Points {
        const T* first;
        int64_t step;
    };
    FASTGEN_INLINE Points above(int64_t y, int64_t point) const { return points(row(y) + lines_at_, how_.rows, point); }
    FASTGEN_INLINE Points own(int64_t y, int64_t point) const {
        return points(row(y) + own_lines_at(), how_.own, point);
    }

    // The next rows are of another place.
    void restart() { next_ = -1; }

    // Makes rows first..last available, and up to `ahead` more; calls go forward.
    void advance(int64_t first, int64_t last, int64_t ahead) {
        if (next_ < 0) next_ = first;
        if (next_ > last) return;
        const int64_t end = min_of(last + 1 + ahead, conv_.batch * conv_.height);
        while (next_ < end) {
            const int64_t n = next_ / conv_.height, top = n * conv_.height;
            const int64_t bottom = min_of(end, top + conv_.height);
            fetch_rows(source_, n, next_ - top, bottom - top, conv_.width, channels_, OfImage{*this, top});
            for (; next_ < bottom; ++next_) {
                if (how_.rows) make_points(next_);
            }
        }
    }

private:
    // A target of fetch_rows: where the rows of an image go whose first one is row `top`.
    struct OfImage {
        const Ring& ring;
        int64_t top;
        FASTGEN_INLINE T* at(int64_t y, int64_t c) const {
            return ring.row(top + y) + ring.before_ * ring.channels_ + c;
        }
        FASTGEN_INLINE int64_t step() const { return ring.channels_; }
        FASTGEN_INLINE int64_t run() const { return ring.channels_; }
    };

    static FASTGEN_INLINE int64_t row_size(const MaskedConv2d& conv, int64_t channels) {
        const bool pairs = filtered(conv).rows;
        const int64_t positions = conv.width + conv.kernel_w - 1 + (pairs ? conv.width % 2 : 0);
        return pairs ? aligned<T>(positions * channels) : positions * channels;
    }
    // An odd number of cache lines: the weights' gradient reads one channel of many pairs, which must not share few sets
    // of the cache.
    static FASTGEN_INLINE int64_t pair_size(int64_t channels) {
        return aligned<T>(channels) + (panels_of<T>(channels) % 2 ? 0 : kPanel<T>);
    }
    static FASTGEN_INLINE int64_t slot_size(const MaskedConv2d& conv, int64_t channels) {
        const Filtered how = filtered(conv);
        const int64_t lines = products_of(how.rows) + (how.own == how.rows ? 0 : products_of(how.own));
        return row_size(conv, channels) + lines * pairs_of(conv) * pair_size(channels);
    }
    FASTGEN_INLINE int64_t own_lines_at() const {
        return lines_at_ + (how_.own == how_.rows ? 0 : products_of(how_.rows)) * line_;
    }
    FASTGEN_INLINE Points points(const T* lines, int64_t taps, int64_t point) const {
        return {lines + product_of(taps, point) * line_, pair_};
    }

    void make_points(int64_t y) const {
        if (how_.rows == 3)
            make_lines<3>(row(y), row(y) + lines_at_, row(y) + own_lines_at());
        else
            make_lines<2>(row(y), row(y) + lines_at_, row(y) + own_lines_at());
    }

    // Of a row above, and where an own row has fewer taps of that, too: both are made of the same inputs.
    template <int kTaps>
    void make_lines(const T* from, T* to, T* own) const {
        const bool both = how_.own == 2 && kTaps == 3, later = own_before_ < before_;
        for (int64_t j = 0; j < pairs_of(conv_); ++j, from += 2 * channels_, to += pair_, own += pair_) {
            for (int64_t c = 0; c < channels_; c += kLanes<T>) {
                const int64_t count = min_of(kLanes<T>, channels_ - c);
                Vec<T> d[kTaps + 1];
                for (int64_t i = 0; i <= kTaps; ++i) d[i] = load_some<T>(from + i * channels_ + c, count);
                if constexpr (kTaps == 3) {
                    if (both) {
                        const Vec<T> d0 = later ? d[1] : d[0], d1 = later ? d[2] : d[1], d2 = later ? d[3] : d[2];
                        keep_pair(own + c, d0, d1, d2, count);
                    }
                    input_points<true>(d, 1);
                    for (int64_t i = 0; i < kPoints; ++i) store_some<T>(to + i * line_ + c, d[i], count);
                } else {
                    keep_pair(to + c, d[0], d[1], d[2], count);
                }
            }
        }
    }

    FASTGEN_INLINE void keep_pair(T* to, Vec<T> d0, Vec<T> d1, Vec<T> d2, int64_t count) const {
        store_some<T>(to, d0 - d1, count);
        store_some<T>(to + line_, d1, count);
        store_some<T>(to + 2 * line_, d2 - d1, count);
    }

    const Image<T>& source_;
    const MaskedConv2d& conv_;
    const Filtered how_;
    const int64_t channels_, rows_;
    const int64_t before_, own_before_;            // columns before a pixel that a row above, and its own row reads
    const int64_t pair_, line_, lines_at_, slot_;  // elements
    T* const slots_;
    int64_t next_ = -1;  // the rows before it have been fetched
};

}  // namespace fastgen::FASTGEN_ISA

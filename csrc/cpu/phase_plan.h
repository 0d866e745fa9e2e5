// How a convolution or transposed convolution is cut into products that multiply no zeros.
//
// Along one axis, output y and kernel element k meet at one input position, if any:
//
//     convolution              y * stride - padding + k * dilation
//     transposed convolution   (y + padding - k * dilation) / stride, where that divides
//
// Outputs are grouped into cells of out_step neighbours: cell Y has the outputs Y * out_step + base + j. What its output
// j reads lies at fixed offsets from Y * in_step. A slot is a set of such outputs that are computed together:
//
//     one phase per slot           a slot for every y mod stride, with just the taps that land there
//     all phases side by side      one slot; its outputs are further columns of one product, its taps those of all. Worth
//                                  it for few output channels, which fill no vector: of 3 channels, kernel 4, stride 2,
//                                  padding 1, the outputs 2Y+1 and 2Y+2 read exactly the inputs Y and Y+1
//     all outputs side by side     the same of a map of one pixel, which a transposed convolution spreads over a larger one:
//                                  a linear layer, whose weights are then read in one run
//
// Which base and how many outputs to a cell: whatever multiplies least, counted in whole vectors. At the borders, cells
// that read the same of the taps form a span, so that taps outside the image are skipped rather than multiplied.
//
// Slots of two by two or three by three neighbouring taps (of a strided convolution: so many in each of its interleaved
// filters) may be computed by minimal filtering instead, minimal_filter.h: fewer products, but transforms, and up to four
// times the weights where products do not make their points themselves. Layers of few output channels may do without
// phases, by overlap-add, overlap_add.h. Whether it is done depends on the layer and the size of one image, never on the
// batch: it changes the bits. Ordinary convolutions of each channel by itself have no products at all, depthwise_conv.h.
//
// Weights are packed slot by slot, panel by panel, tap by tap: as products read them. Where a layer spreads single pixels,
// or could, they are packed by kernel elements, so that images of one pixel and larger ones share them: all outputs of a
// pixel side by side are the kernel's elements in order.
#pragma once

#include <cstdint>
#include <memory>

namespace fastgen {

struct AxisSpan {
    int64_t first, last;         // cells first..last-1
    int64_t tap_begin, tap_end;  // read these taps; they lie inside the image
};

struct AxisSlot {
    int64_t base;  // output 0 of cell 0
    int64_t taps;
    const int64_t* offsets;  // [taps], ascending
    const int64_t* kernel;   // [taps][phases]: the kernel element through which the output reads the tap, or -1
    const AxisSpan* spans;
    int64_t num_spans;
};

struct AxisPlan {
    int64_t in_size, out_size;
    int64_t in_step, out_step;
    int64_t phases;  // outputs of a cell in one slot: out_step or 1
    const AxisSlot* slots;
    int64_t num_slots;
};

// An axis of overlap-add, as of a transposed convolution: input x adds to the outputs x * stride - padding + k.
struct OverlapAxis {
    int64_t kernel, stride, padding;
    bool flipped;  // of an ordinary convolution, whose kernel runs the other way

    constexpr int64_t slices() const { return (kernel + stride - 1) / stride; }
    constexpr int64_t index(int64_t k) const { return flipped ? kernel - 1 - k : k; }  // of the weight
};

inline constexpr int64_t kMaxOverlapKernel = 32;  // along either axis

struct ConvAxis {
    int64_t in_size, out_size, kernel, stride, padding, dilation;
};

struct ConvPlan {
    int64_t groups, in_channels, out_channels;  // channels of one group
    AxisPlan y, x;
    bool minimal;         // filtering, in the slots that allow it
    bool overlap_add;     // instead of products by phases
    int64_t element_row;  // kernel elements in a row, where weights are packed by them; else 0
    OverlapAxis overlap_y, overlap_x;
    bool depthwise;  // instead of all that: each channel by itself
    ConvAxis depthwise_y, depthwise_x;
};

inline constexpr int kPoints = 4;      // of minimal filtering along one axis
inline constexpr int kExtraPoint = 2;  // that of full tiles alone

// Tiles of minimal filtering for the cells first..first+cells-1 of an axis: full ones, then short ones; the last may
// stick out.
struct AxisTiles {
    int64_t first, cells, taps;

    constexpr int64_t full() const {
        if (taps == 3) return (cells + 1) / 2;
        return cells % 3 == 1 ? (cells > 1 ? cells / 3 - 1 : 0) : cells / 3;
    }
    constexpr int64_t count() const {
        if (taps == 3) return full();
        return cells % 3 == 1 && cells > 1 ? full() + 2 : full() + (cells % 3 != 0);
    }
    constexpr int64_t begin(int64_t tile) const {
        const int64_t before = tile < full() ? tile : full();
        return first + before * (kPoints + 1 - taps) + (tile - before) * 2;
    }
    constexpr int64_t last() const { return first + cells; }
    constexpr int64_t products() const { return kPoints * full() + (kPoints - 1) * (count() - full()); }
};

// Of a plan's steps through the input, each of which starts a filter of its own: their products are summed as if they were
// further channels.
inline int64_t interleaved_filters(const ConvPlan& plan) { return plan.y.in_step * plan.x.in_step; }

inline int64_t first_cell(const AxisSlot& slot) { return slot.num_spans ? slot.spans[0].first : 0; }
inline int64_t last_cell(const AxisSlot& slot) { return slot.num_spans ? slot.spans[slot.num_spans - 1].last : 0; }

// Whether a pair of slots is computed by minimal filtering.
bool is_minimal(const ConvPlan& plan, const AxisSlot& y, const AxisSlot& x);

struct ConvShape {
    bool transposed;
    int64_t groups, in_channels, out_channels;  // channels of one group
    ConvAxis y, x;
    bool minimal;  // whether the plan may choose minimal filtering
};

struct ConvElement {
    int64_t lanes;      // columns of a vector of products
    bool sums_filters;  // products make the points of minimal filtering by two taps themselves
    bool by_channel;    // convolutions of each channel by itself are computed so
};

// The arrays live as long as the result.
std::shared_ptr<const ConvPlan> make_conv_plan(const ConvShape& shape, const ConvElement& element);

}  // namespace fastgen

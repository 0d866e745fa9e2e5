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
//
// Which base and how many outputs to a cell: whatever multiplies least, counted in whole vectors. At the borders, cells
// that read the same of the taps form a span, so that taps outside the image are skipped rather than multiplied.
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

struct ConvPlan {
    int64_t groups, in_channels, out_channels;  // channels of one group
    AxisPlan y, x;
};

struct ConvAxis {
    int64_t in_size, out_size, kernel, stride, padding, dilation;
};

struct ConvShape {
    bool transposed;
    int64_t groups, in_channels, out_channels;  // channels of one group
    ConvAxis y, x;
};

// The plan for products whose vectors have `lanes` columns; the arrays live as long as the result.
std::shared_ptr<const ConvPlan> make_conv_plan(const ConvShape& shape, int64_t lanes);

}  // namespace fastgen

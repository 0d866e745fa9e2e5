// A sampling plan (fastgen/sampling/plan.py) as tables, for executors on the host and on a GPU, and a batch of it.
//
// A plane is rows x (left + width + right) x batch x pitch floats, its channels first in each pitch; row y lies at y
// mod rows and everything outside [0, width) is zero; planes that pixel steps alone use may lie otherwise (PlanLayout).
// For a row step the (x, sample) pairs of a row, or where planes of several strides come together the x of one sample,
// are the rows of one product with a uniform stride; for a pixel step the samples are.
//
// The product of a step has `groups` values for each of its `width` output channels. Its columns are packed in panels
// of 16: panel j * groups + g holds group g of channels 16j..16j+15, so that whatever range of channels a thread takes,
// it has all groups of them in consecutive panels.
#pragma once

#include <cstdint>
#include <limits>

#include "common/philox.h"  // FASTGEN_HOST_DEVICE

namespace fastgen {

constexpr int64_t kPlanPanel = 16;

FASTGEN_HOST_DEVICE int64_t mod(int64_t a, int64_t n) {
    const int64_t r = a % n;
    return r < 0 ? r + n : r;
}

FASTGEN_HOST_DEVICE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

FASTGEN_HOST_DEVICE int64_t div_down(int64_t a, int64_t n) { return n == 1 ? a : (a - mod(a, n)) / n; }

// The position of a step's frame at a pixel of the image, -1 if there is none.
FASTGEN_HOST_DEVICE int64_t frame_position(int64_t pixel, int64_t stride, int64_t size, int64_t period, int64_t phase) {
    if (pixel < 0) return -1;
    int64_t position = pixel;
    if (stride > 1) {
        if (pixel % stride != 0) return -1;
        position = pixel / stride;
    }
    if (position >= size || (period > 1 && position % period != phase)) return -1;
    return position;
}

enum class PlanLayout : int64_t {
    together,  // the samples of a position side by side
    apart,     // the positions of a sample: attention reads them one after the other
    moment,    // only the position at hand, which nothing reads later
    shared     // one copy for all samples, in `PlanTables::shared`
};

struct PlanPlane {
    int64_t channels, pitch, width, height, rows, left, right;
    int64_t offset;     // of its first float: of shared ones, else of the workspace, per sample of the batch
    int64_t broadcast;  // one pixel, read at every position
    PlanLayout layout;
};

// Channels of a plane as a step sees them: position p of the step's frame is position (p * num + shift) / den, rounded
// down, of the plane.
struct PlanAddress {
    int64_t plane, channel;
    int64_t dy, num_y, den_y;
    int64_t dx, num_x, den_x;
};

struct PlanTap {
    int64_t address, count;
};

enum class PlanOp : int64_t {
    acc,
    load,
    constant,
    copy,
    neg,
    abs,
    relu,
    elu,
    expm1_of_minus_abs,
    exp,
    expm1,
    log,
    sqrt,
    erf,
    tanh,
    sigmoid,
    add,
    sub,
    mul,
    div,
    max,
    min,
    positive_or  // a where a > 0, else b
};

struct PlanInstr {
    PlanOp op;
    int64_t a, b;    // instructions of the same step; for acc, a is the group, for constant an index into the constants
    int64_t buffer;  // scratch tile that takes the result
    int64_t address;  // of a load
    int64_t store;    // of the step's stores, the one that takes the result in place of the scratch tile; -1: none
};

struct PlanStore {
    int64_t address, instr;
};

// Of a weight: csrc/cpu/tap_gemm.h.
enum class PlanPacking : int64_t { floats, bfloat16, int8 };

struct PlanStep {
    int64_t row_stage, rank, lag_y, lag_x;
    int64_t height, width, stride_y, stride_x;  // of the frame
    int64_t period_y, period_x, phase_y, phase_x;
    int64_t channels, groups;
    int64_t first_address, num_addresses;  // of all its taps, loads and stores, of `init` and of a query
    int64_t first_tap, num_taps, first_instr, num_instrs, first_store, num_stores;
    int64_t first_source, num_sources;  // steps before it in the same stage and rank that write what it reads
    int64_t weight, inner;              // offset of the packed weight in elements of 4 bytes, rows of 16 of them
    // Minimal filtering (fastgen/sampling/executors/winograd.py): the taps each filter has, 0 for none; how many of the
    // step's taps stand for filters, by their first column, the others following. The weight is one of `inner` rows for
    // each product, then one for the other taps.
    int64_t filter_size, num_filters;
    int64_t bias;       // offset in floats, -1: none
    int64_t init;       // address of the values, packed like the columns, that the product starts from; -1: none
    int64_t uniform;    // a whole row, all samples, has one stride in each of its addresses
    int64_t cycle;      // columns that lie this many apart have one stride in each of its addresses
    int64_t attention;  // its index, in place of a product; -1: none
    int64_t equal;      // all columns of the product are equal, and the weight is one panel of them
    PlanPacking packing;
};

// fastgen.sampling.plan.Attention. Keys and values are channels of all of a plane, positions in raster order.
struct PlanAttention {
    int64_t query;                                       // address
    int64_t keys, keys_channel, values, values_channel;  // planes
    int64_t heads, depth, width;
    int64_t spans;    // index of the pair of the frame's position 0
    int64_t scale;    // index of the scale in `attention_floats`, which the cap and the bias follow
    int64_t biases;   // 0: no bias; 1: the same for all heads; else one for each, [biases][positions][keys]
    int64_t softmax;  // else scores are weights themselves
    int64_t of_keys, of_keys_channel;  // plane of what is added to the score of each key; -1: none
    int64_t each_query;                // position p of the frame adds channel p, from that one on
};

struct PlanDraw {
    int64_t plane, channel, count;
    int64_t first_colour, num_colours, first_uniform, num_uniforms;
};

// Level l of a colour is encoded as `count` floats, from offset + l * count on.
struct PlanEncoding {
    int64_t plane, channel, colour, count, offset;
};

constexpr int64_t kMaxJointColours = 3;  // that a head draws together

enum class PlanHead : int64_t { categorical, bernoulli, logistic_mixture };

struct PlanTables {
    const PlanPlane* planes;
    const PlanAddress* addresses;
    const PlanStep* steps;  // row steps first, then pixel steps by rank
    const PlanTap* taps;
    const PlanInstr* instrs;
    const PlanStore* stores;
    const int64_t* sources;
    const PlanAttention* attentions;
    const int64_t* spans;
    const float* attention_floats;
    const PlanDraw* draws;  // one per group of colours
    const PlanEncoding* encodings;
    const void* weights;  // each step's in its packing
    const float* biases;
    const float* constants;  // each one 16 times
    const float* tables;     // of the encodings
    const float* shared;     // planes
    const float* levels;     // logistic mixture: the value in [-1, 1] of each level
    int64_t num_planes, num_addresses, num_steps, row_steps, num_draws, num_encodings;
    int64_t colours, height, width, num_levels, components;
    int64_t first_column, end_column;
    int64_t workspace;                         // floats per sample
    int64_t buffers;                           // scratch tiles needed
    int64_t max_taps, max_instrs, max_groups;  // of a step
    int64_t max_keys;                          // of attention
    int64_t max_filtered;                      // channels that filters read, each filter's rounded up to panels
    PlanHead head;
};

// One group of samples and the threads that share it.
struct PlanBatch {
    int64_t count;    // rows: as many for each sample as there are streams
    int64_t streams;  // 2 with guidance, the second one of what is led away from; else 1
    float guidance;   // the scale
    uint64_t seed, start;
    double inverse_temperature;
    int64_t top_k;  // 0: all levels may be drawn
    double top_p;
    float* workspace;      // count * PlanTables::workspace floats
    int32_t* levels;       // [samples, colours, height, width]
    const int32_t* known;  // the same, or null
    const uint8_t* mask;   // [samples, height, width]: 1 where the pixel is given; or null
    float* params;         // [samples, parameters, height, width] takes what the levels are drawn from; or null
    int64_t num_params;
};

// Finite, so that times the zero of the likeliest level it is zero.
inline double plan_inverse_temperature(double temperature) {
    const double most = std::numeric_limits<float>::max();
    return 1.0 / temperature < most ? 1.0 / temperature : most;
}

}  // namespace fastgen

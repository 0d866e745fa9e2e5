// Runs a sampling plan (fastgen/sampling/plan.py) for a batch of images: the tables, and the worker that every thread
// of a team runs.
//
// A plane is rows x (left + width + right) x batch x pitch floats, its channels first in each pitch; row y lies at y
// mod rows and everything outside [0, width) is zero. For a row step the (x, sample) pairs of a row, or where planes of
// several strides come together the x of one sample, are the rows of one product with a uniform stride; for a pixel
// step the samples are.
//
// The product of a step has `groups` values for each of its `width` output channels. Its columns are packed in panels
// of 16: panel j * groups + g holds group g of channels 16j..16j+15, so that whatever range of channels a thread takes,
// it has all groups of them in consecutive panels.
#pragma once

#include <chrono>
#include <cstdint>

#include "fastgen_build.h"

namespace fastgen {

constexpr int64_t kPlanPanel = 16;

struct PlanPlane {
    int64_t channels, pitch, width, height, rows, left, right;
    int64_t offset;      // of its first float in the workspace, per sample of the batch
    int64_t broadcast;   // one pixel, read at every position
    int64_t per_sample;  // 0: the same for all samples
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

struct PlanStep {
    int64_t row_stage, rank, lag_y, lag_x;
    int64_t height, width, stride_y, stride_x;  // of the frame
    int64_t period_y, period_x, phase_y, phase_x;
    int64_t channels, groups;
    int64_t first_address, num_addresses;  // of all its taps, loads and stores and of `init`
    int64_t first_tap, num_taps, first_instr, num_instrs, first_store, num_stores;
    int64_t first_source, num_sources;  // steps before it in the same stage and rank that write what it reads
    int64_t weight, inner;              // offset of the packed weight in elements of 4 bytes, rows of 16 of them
    // Minimal filtering (fastgen/sampling/executors/winograd.py): the taps each filter has, 0 for none; how many of the
    // step's taps stand for filters, by their first column, the others following. The weight is one of `inner` rows for
    // each product, then one for the other taps.
    int64_t filter_size, num_filters;
    int64_t bias;     // offset in floats, -1: none
    int64_t init;     // address of the values, packed like the columns, that the product starts from; -1: none
    int64_t uniform;  // a whole row, all samples, has one stride in each of its addresses
    int64_t cycle;    // columns that lie this many apart have one stride in each of its addresses
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
    const PlanDraw* draws;  // one per group of colours
    const PlanEncoding* encodings;
    const void* weights;  // float, or bfloat16 in pairs
    const float* biases;
    const float* constants;  // each one 16 times
    const float* tables;     // of the encodings
    const float* levels;     // logistic mixture: the value in [-1, 1] of each level
    int64_t num_planes, num_addresses, num_steps, row_steps, num_draws, num_encodings;
    int64_t colours, height, width, num_levels, components;
    int64_t first_column, end_column;
    int64_t workspace;                         // floats per sample
    int64_t buffers;                           // scratch tiles needed
    int64_t max_taps, max_instrs, max_groups;  // of a step
    int64_t max_filtered;                      // channels that filters read, each filter's rounded up to panels
    bool bfloat16;
    PlanHead head;
};

// One group of samples and the threads that share it.
struct PlanBatch {
    int64_t count;
    uint64_t seed, start;
    double inverse_temperature;
    float* workspace;      // count * PlanTables::workspace floats
    int32_t* levels;       // [count, colours, height, width]
    const int32_t* known;  // the same, or null
    const uint8_t* mask;   // [count, height, width]: 1 where the pixel is given; or null
    float* params;         // [count, parameters, height, width] takes what the levels are drawn from; or null
    int64_t num_params;
};

// The rounds in which a member has come to the barrier; a cache line for each, so that one transfer between two cores
// tells one of them that the other has come.
struct alignas(64) PlanArrival {
    int64_t rounds = 0;
};

// The threads of a group, with an arrival for each. wait() returns when all members have called it.
//
// A team works as long as all its threads run at the same time. Where they do not, because something else wants the
// processors, a barrier costs a time slice of the scheduler, a thousand times what a step costs, and one thread alone
// is faster. So waits of such a length are added up; once a pixel, before a barrier, member 0 decides whether they take
// a large part of the time, and after the barrier all members find the answer in disbanded(): then member 0 goes on
// alone.
class PlanTeam {
public:
    PlanTeam(int size, PlanArrival* arrivals) : size_(size), arrivals_(arrivals) {}
    int size() const { return size_; }
    void wait(int member);
    void decide();  // by member 0 alone, between barriers
    bool disbanded() const { return disbanded_; }

private:
    const int size_;
    PlanArrival* const arrivals_;
    const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
    alignas(64) std::chrono::steady_clock::rep late_ = 0;  // time spent in long waits
    bool disbanded_ = false;
};

// A tile of the results that are computed while they are in the cache; the tile of their product is as large, but for
// a step with so many groups that a single panel of all of them is wider.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 160;
constexpr int64_t kTileFloats = kTileRows * kTileColumns;

// Bytes of scratch memory that each thread needs, all rounded up to cache lines.
struct PlanScratch {
    int64_t product, shared, filtered, buffers, rows, taps, values, active, ran, probabilities;
    int64_t total() const {
        return product + shared + filtered + buffers + rows + taps + values + active + ran + probabilities;
    }
};

constexpr int64_t kScratchRecord = 64;  // room for the address of a tap or an operand

inline PlanScratch plan_scratch(const PlanTables& plan) {
    const auto cache_lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t panel = plan.max_groups * kPlanPanel;
    PlanScratch sizes{};
    sizes.product = cache_lines(kTileRows * (panel > kTileColumns ? panel : kTileColumns) * sizeof(float));
    sizes.shared = plan.max_filtered > 0 ? 2 * sizes.product : 0;
    sizes.filtered = cache_lines(kTileRows * plan.max_filtered * sizeof(float));
    sizes.buffers = cache_lines(plan.buffers * kTileFloats * sizeof(float));
    sizes.rows = cache_lines(plan.num_addresses * sizeof(void*));
    sizes.taps = plan.max_taps * kScratchRecord;
    sizes.values = plan.max_instrs * kScratchRecord;
    sizes.active = cache_lines(plan.num_steps * sizeof(int64_t));
    sizes.ran = cache_lines(plan.num_steps * sizeof(int64_t));
    sizes.probabilities = cache_lines(plan.num_levels * sizeof(float));
    return sizes;
}

using PlanWorker = void (*)(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, char* scratch,
                            int64_t row_begin, int64_t row_end);

#define FASTGEN_DECLARE_PLAN_WORKER(ISA)                                                            \
    namespace ISA {                                                                                 \
    void plan_worker(const PlanTables&, const PlanBatch&, PlanTeam&, int, char*, int64_t, int64_t); \
    }
FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_PLAN_WORKER)
#undef FASTGEN_DECLARE_PLAN_WORKER

}  // namespace fastgen

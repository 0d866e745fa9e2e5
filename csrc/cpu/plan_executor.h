// Runs a sampling plan (fastgen/sampling/plan.py) for a batch of images: the tables, and the worker that every thread
// of a team runs.
//
// A plane is rows x (left + width + right) x batch x pitch floats, its channels first in each pitch; row y lies at y
// mod rows and everything outside [0, width) is zero. For a row step the (x, sample) pairs of a row are the rows of one
// product with a uniform stride, for a pixel step the samples are.
//
// The product of a step has `groups` values for each of its `width` output channels. Its columns are packed in panels
// of 16: panel j * groups + g holds group g of channels 16j..16j+15, so that whatever range of channels a thread takes,
// it has all groups of them in consecutive panels.
#pragma once

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

struct PlanRead {
    int64_t plane, dy, dx, channel;
};

struct PlanTap {
    PlanRead read;
    int64_t count;
};

enum class PlanOp : int64_t {
    acc,
    load,
    constant,
    copy,
    neg,
    abs,
    relu,
    exp,
    expm1,
    log,
    sqrt,
    tanh,
    sigmoid,
    add,
    sub,
    mul,
    div,
    max,
    min
};

struct PlanInstr {
    PlanOp op;
    int64_t a, b;    // instructions of the same step; for acc, a is the group, for constant an index into the constants
    int64_t buffer;  // scratch tile that takes the result
    PlanRead read;
};

struct PlanStep {
    int64_t row_stage, lag_y, lag_x, rank;
    int64_t out, out_channel, width, groups;
    int64_t first_tap, num_taps, first_instr, num_instrs;
    int64_t weight, inner;  // offset of the packed weight in floats, rows of it
    int64_t bias;           // offset in floats, -1: none
    int64_t init;           // plane whose rows, packed like the columns, the product starts from; -1: none
    int64_t barrier;        // reads what a step since the last barrier wrote
};

struct PlanDraw {
    int64_t plane, channel, count;
};

enum class PlanHead : int64_t { categorical, bernoulli };

struct PlanTables {
    const PlanPlane* planes;
    const PlanStep* steps;  // row steps first, then pixel steps by rank
    const PlanTap* taps;
    const PlanInstr* instrs;
    const PlanDraw* draws;  // one per colour
    const float* weights;
    const float* biases;
    const float* constants;  // each one 16 times
    const float* encoding;   // network input of each level
    int64_t num_planes, num_steps, row_steps, colours, height, width, image, levels;
    int64_t first_row, first_column, end_column;
    int64_t workspace;                         // floats per sample
    int64_t buffers;                           // scratch tiles needed
    int64_t max_taps, max_instrs, max_groups;  // of a step
    PlanHead head;
};

// One group of samples and the threads that share it.
struct PlanBatch {
    int64_t count;
    uint64_t seed, start;
    float inverse_temperature;
    float* workspace;      // count * PlanTables::workspace floats
    uint8_t* levels;       // [count, colours, height, width]
    const uint8_t* known;  // the same, or null
    const uint8_t* mask;   // [count, height, width]: 1 where the pixel is given; or null
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
// is faster. So waits of such a length are counted; once a pixel, before a barrier, member 0 decides whether there were
// a few, and after the barrier all members find the answer in disbanded(): then member 0 goes on alone.
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
    alignas(64) int late_ = 0;
    bool disbanded_ = false;
};

// A tile of the results that are computed while they are in the cache; the tile of their product is as large, but for
// a step with so many groups that a single panel of all of them is wider.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 128;
constexpr int64_t kTileFloats = kTileRows * kTileColumns;

// Floats of scratch memory that each thread needs: the product's tile, one for each buffer, and room for the addresses
// of a step's taps and operands.
constexpr int64_t kAddressFloats = 16;
inline int64_t plan_product_floats(const PlanTables& plan) {
    const int64_t panel = plan.max_groups * kPlanPanel;
    return kTileRows * (panel > kTileColumns ? panel : kTileColumns);
}
inline int64_t plan_scratch(const PlanTables& plan) {
    return plan_product_floats(plan) + plan.buffers * kTileFloats +
           (2 * plan.max_taps + plan.max_instrs) * kAddressFloats;
}

using PlanWorker = void (*)(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, float* scratch,
                            int64_t row_begin, int64_t row_end);

#define FASTGEN_DECLARE_PLAN_WORKER(ISA)                                                             \
    namespace ISA {                                                                                  \
    void plan_worker(const PlanTables&, const PlanBatch&, PlanTeam&, int, float*, int64_t, int64_t); \
    }
FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_PLAN_WORKER)
#undef FASTGEN_DECLARE_PLAN_WORKER

}  // namespace fastgen

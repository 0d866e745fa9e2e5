// The pixel stage of a sampling plan: what comes one pixel after the other, steps and draws, for one image row.
//
// A cluster of blocks draws some samples of the batch, all pixels of the row without a launch in between; clusters know
// nothing of each other. What there is to do is a list of actions (fastgen/sampling/executors/pixel_tables.py), the same
// for all samples: steps, which the blocks of a cluster share by channels, and draws, which they share by samples. Where
// an action reads what another block wrote, the cluster waits for itself before. With guidance a sample is two rows of
// the workspace; only draws know.
//
// Workspace, `where` and operands are those of kernels/sample_plan.py. A step's product runs over blocks of 16 channels
// of its taps and over tiles of 16 columns, packed as tensor cores want them: see PixelStage::weights. It is summed in
// kPixelParts parts, then over these, so that neither batch nor cluster changes a bit.
//
// The code is a template over a Team, so that tests run it on threads of the host. A Team has
//
//     int rank(), size()      this block, and how many the cluster has
//     int lane(), lanes()     this lane, and how many a block has
//     void sync()             returns when all lanes of this block have called it
//     void arrive(), wait()   the latter returns when all lanes of all blocks have called the former; what they wrote
//                             before is seen
//     float* partial()        PixelScratch::partial floats that the block shares; likewise values(), doubles()
//     void fetch(stage, step, tiles)      may begin to load the weights of the product that comes next
//     void locate(stage, batch, step, column)             what comes before `multiply` and needs nobody else's results
//     void multiply(stage, batch, step, tiles, rows, column)     writes the parts of a product, see `partial_at`
#pragma once

#include <cstdint>

#include "common/logistic_mixture.h"
#include "common/philox.h"
#include "common/plan_math.h"
#include "common/plan_tables.h"

#if defined(__CUDA_ARCH__)
#define FASTGEN_UNROLL _Pragma("unroll")
#else
#define FASTGEN_UNROLL
#endif

namespace fastgen {

constexpr int32_t kPixelRows = 8;        // of the batch, that are multiplied at a time
constexpr int32_t kPixelDepth = 16;      // channels of a block of the product
constexpr int32_t kPixelColumns = 16;    // of a tile: `per_tile` channels of each group
constexpr int32_t kPixelParts = 8;       // of a sum
constexpr int32_t kPixelDraw = 0x8000;   // above all steps: draws in a PixelAction
constexpr int32_t kPixelSegments = 256;  // of the levels of a draw: about as many as a block has lanes
constexpr int32_t kPixelGroups = 16;     // of these segments
constexpr int32_t kPixelPitch = 9;       // floats from a column of a part to the next: rows that share no memory bank

struct PixelAction {
    int32_t what;  // 65536 * column, of the step's frame or of the image, + step, or of a draw kPixelDraw + its rank
    int32_t how;   // 65536 * waits, for the cluster, + the step whose weights come next, or kPixelDraw
    FASTGEN_HOST_DEVICE int32_t column() const { return what >> 16; }
    FASTGEN_HOST_DEVICE int32_t step() const { return what & 0xffff; }
    FASTGEN_HOST_DEVICE bool draws() const { return step() >= kPixelDraw; }
    FASTGEN_HOST_DEVICE bool waits() const { return how >> 16; }
    FASTGEN_HOST_DEVICE int32_t fetches() const { return how & 0xffff; }
};

// What lies where in a column of a frame, as in kernels/sample_plan.py.
struct PixelOperand {
    int32_t numerator, denominator, shift, width, pitch, channel, count, more, colour;
};

struct PixelStep {
    int32_t channels, groups, per_tile;
    int32_t operand;           // the first one; instructions and stores count from it
    int32_t init;              // operand that the sum starts from; -1: none
    int32_t bias;              // offset of the values that it starts from otherwise
    int32_t constant, weight;  // offsets; that of weights counts blocks of a tile
    int32_t first_block, num_blocks, first_instr, num_instrs, first_store, num_stores;
};

// Channels [channel, channel + count) of a tap. fast: 16 of them, at a multiple of 4.
struct PixelBlock {
    int32_t operand, channel, count, fast;
};

// a: register, or group of acc, or which of the loads; operand: or constant.
struct PixelInstr {
    uint8_t op, a, b, operand;
    FASTGEN_HOST_DEVICE bool is(PlanOp other) const { return op == static_cast<uint8_t>(other); }
};

struct PixelStore {
    int16_t reg, operand;
};

struct PixelDraw {
    int32_t operand, count, first_colour, num_colours, first_uniform, num_uniforms;
};

// Of a plan. weights [tiles][blocks][lane of 32][2][4], float or bfloat16, of each step: lane 4 * c + t holds rows 4 * t
// to 4 * t + 3 of the block, of columns c and c + 8 of the tile. Column g * per_tile + i of tile j is group g of channel
// j * per_tile + i.
struct PixelStage {
    const PixelOperand* operands;
    const PixelStep* steps;
    const PixelBlock* blocks;
    const PixelInstr* instrs;
    const PixelStore* stores;
    const PixelDraw* draws;
    const void* weights;
    const float* biases;
    const float* constants;
    const float* encoded;                                     // tables of the encodings
    const float* values;                                      // logistic mixture: the value in [-1, 1] of each level
    int64_t first_operand;                                    // that is used
    int64_t num_operands, num_steps, num_instrs, num_stores;  // rows of tables
    int64_t registers;                                        // most that a step has
    int64_t first_encoding, num_encodings;                    // operands
    int64_t colours, height, width, num_levels, components;
    int64_t bfloat16;
    int64_t head;  // PlanHead
};

// An operand in the row that is drawn.
struct PixelPlaced {
    int64_t first;  // float of the workspace: its first channel in column 0 of its plane, first row; -1: outside
    int16_t numerator, denominator, shift, width;
    int32_t pitch;
};

// Of a batch: where its memory lies.
struct PixelBatch {
    const PixelAction* actions;
    int64_t num_actions;
    int64_t count;    // rows of the workspace
    int64_t streams;  // of them, for each sample: 2 with guidance, the second of what is led away from; else 1
    float* workspace;
    const int64_t* where;               // floats per sample before the row of each operand; -1: outside
    const int64_t* state;               // image row, seed, index of the first sample
    const double* inverse_temperature;  // at most the largest float
    const int32_t* top_k;               // 0: all levels of a draw
    const double* top_p;                // 1: all of them
    const float* guidance;              // the scale, with two streams
    int32_t* levels;                    // [samples, colours, height, width]
    const int32_t* known;               // the same
    const uint8_t* mask;                // [samples, height, width]: 1 where the pixel is given
    const PixelPlaced* placed;          // of each operand, by `pixel_placed`
};

// Calls f(name, pointer) for each table of the plan.
template <class F>
void for_each_pixel_table(PixelStage& stage, F f) {
    f("operands", stage.operands);
    f("steps", stage.steps);
    f("blocks", stage.blocks);
    f("instrs", stage.instrs);
    f("stores", stage.stores);
    f("draws", stage.draws);
    f("weights", stage.weights);
    f("biases", stage.biases);
    f("constants", stage.constants);
    f("encoded", stage.encoded);
    f("values", stage.values);
}

template <class F>
void for_each_pixel_size(PixelStage& stage, F f) {
    f("first_operand", stage.first_operand);
    f("num_operands", stage.num_operands);
    f("num_steps", stage.num_steps);
    f("num_instrs", stage.num_instrs);
    f("num_stores", stage.num_stores);
    f("registers", stage.registers);
    f("first_encoding", stage.first_encoding);
    f("num_encodings", stage.num_encodings);
    f("colours", stage.colours);
    f("height", stage.height);
    f("width", stage.width);
    f("num_levels", stage.num_levels);
    f("components", stage.components);
    f("bfloat16", stage.bfloat16);
    f("head", stage.head);
}

// [begin, end)
struct PixelRange {
    int32_t begin, end;
    FASTGEN_HOST_DEVICE int32_t size() const { return end - begin; }
};

// The share of one of `size`.
FASTGEN_HOST_DEVICE PixelRange pixel_share(int64_t all, int32_t rank, int32_t size) {
    return {static_cast<int32_t>(all * rank / size), static_cast<int32_t>(all * (rank + 1) / size)};
}

// The rows of a cluster's share of the samples.
FASTGEN_HOST_DEVICE PixelRange pixel_rows(const PixelBatch& batch, int32_t cluster, int32_t clusters) {
    const PixelRange samples = pixel_share(batch.count / batch.streams, cluster, clusters);
    const auto streams = static_cast<int32_t>(batch.streams);
    return {samples.begin * streams, samples.end * streams};
}

FASTGEN_HOST_DEVICE int32_t pixel_tiles(const PixelStep& step) {
    return (step.channels + step.per_tile - 1) / step.per_tile;
}

// Elements of the memory that a block shares.
struct PixelScratch {
    int64_t partial, values, doubles;
};

// steps: on the host.
inline PixelScratch pixel_scratch(const PixelStage& stage, const PixelStep* steps, int64_t lanes, int64_t size) {
    int64_t most = 0;
    for (int64_t s = 0; s < stage.num_steps; ++s) {
        const int64_t tiles = steps[s].num_blocks ? div_up(pixel_tiles(steps[s]), size) : 0;
        most = tiles > most ? tiles : most;
    }
    const int64_t of_levels = kPixelSegments + kPixelGroups + div_up(stage.num_levels, 2);
    const int64_t of_mixture = 2 * stage.components + 3 * kMaxJointColours;
    return {kPixelParts * kPixelColumns * most * kPixelPitch, stage.registers * lanes,
            of_levels > of_mixture ? of_levels : of_mixture};
}

// Element of a product's parts, of a column of the block's tiles.
FASTGEN_HOST_DEVICE int32_t partial_at(int32_t part, int32_t row, int32_t column, PixelRange tiles) {
    return (part * tiles.size() * kPixelColumns + column) * kPixelPitch + row;
}

// The channels of an operand in a column, for the first row of the batch; null outside, where all is zero.
struct PixelPlace {
    float* first;
    int32_t pitch;
    FASTGEN_HOST_DEVICE float* of(int32_t row) const { return first + int64_t{row} * pitch; }
};

FASTGEN_HOST_DEVICE PixelPlaced pixel_placed(const PixelStage& stage, const PixelBatch& batch, int64_t operand) {
    const PixelOperand& at = stage.operands[operand];
    const int64_t row = batch.where[operand];
    return {row < 0 ? -1 : row * batch.count + at.channel,
            static_cast<int16_t>(at.numerator),
            static_cast<int16_t>(at.denominator),
            static_cast<int16_t>(at.shift),
            static_cast<int16_t>(at.width),
            at.pitch};
}

FASTGEN_HOST_DEVICE PixelPlace pixel_place(const PixelBatch& batch, int32_t operand, int32_t column) {
    const PixelPlaced& at = batch.placed[operand];
    int32_t x = column * at.numerator + at.shift;
    if (at.denominator != 1) {
        const int32_t rest = x % at.denominator;
        x = x / at.denominator - (rest < 0);
    }
    if (at.first < 0 || x < 0 || x >= at.width) return {nullptr, 0};
    return {batch.workspace + at.first + int64_t{x} * at.pitch * batch.count, at.pitch};
}

// A float that another block may have written.
FASTGEN_HOST_DEVICE float pixel_load(const float* from) {
#if defined(__CUDA_ARCH__)
    return __ldcg(from);  // not from the cache of this multiprocessor, which does not see the others' writes
#else
    return *from;
#endif
}

FASTGEN_HOST_DEVICE float pixel_apply(PlanOp op, float a, float b) {
    switch (op) {
        case PlanOp::copy:
            return a;
        case PlanOp::neg:
            return -a;
        case PlanOp::abs:
            return scalar::abs(a);
        case PlanOp::relu:
            return 0.0f > a ? 0.0f : a;
        case PlanOp::elu:
            return scalar::positive_or(a, scalar::expm1_of_minus_abs(a));
        case PlanOp::expm1_of_minus_abs:
            return scalar::expm1_of_minus_abs(a);
        case PlanOp::exp:
            return scalar::exp(a);
        case PlanOp::expm1:
            return scalar::expm1(a);
        case PlanOp::log:
            return __builtin_logf(a);
        case PlanOp::sqrt:
            return __builtin_sqrtf(a);
        case PlanOp::erf:
            return __builtin_erff(a);
        case PlanOp::tanh:
            return scalar::tanh(a);
        case PlanOp::sigmoid:
            return scalar::sigmoid(a);
        case PlanOp::add:
            return a + b;
        case PlanOp::sub:
            return a - b;
        case PlanOp::mul:
            return a * b;
        case PlanOp::div:
            return a / b;
        case PlanOp::max:
            return a > b ? a : b;
        case PlanOp::min:
            return a < b ? a : b;
        case PlanOp::positive_or:
            return scalar::positive_or(a, b);
        case PlanOp::acc:
        case PlanOp::load:
        case PlanOp::constant:
            break;
    }
    return 0.0f;
}

template <class Team>
class PixelSchedule {
public:
    FASTGEN_HOST_DEVICE PixelSchedule(const PixelStage& stage, const PixelBatch& batch, PixelRange rows, Team& team)
        : stage_(stage), batch_(batch), rows_(rows), team_(team) {}

    FASTGEN_HOST_DEVICE void run() {
        PixelAction next = batch_.actions[0];
        for (int32_t i = 0; i < batch_.num_actions; ++i) {
            const PixelAction action = next;
            if (i + 1 < batch_.num_actions) next = batch_.actions[i + 1];
            if (action.waits()) team_.arrive();
            Lane lane{};
            if (!action.draws()) lane = prepare(stage_.steps[action.step()], action.column());
            if (action.waits()) {
                team_.wait();
            } else {
                team_.sync();  // nobody reads the scratch memory of the action before any more
            }
            if (action.draws()) {
                draw(stage_.draws[action.step() - kPixelDraw], action.column());
            } else {
                run_step(action, lane);
            }
        }
    }

private:
    static constexpr int32_t kEarly = 2;

    // What a lane finishes of the first rows, and what it reads for that besides the product: the first loads of the
    // program and what the first groups of the sum start from. Addresses are found before the cluster has met, values
    // are on their way while it multiplies.
    struct Lane {
        const float *load_from[kEarly], *start_from[kEarly];
        float load[kEarly], start[kEarly];
    };

    FASTGEN_HOST_DEVICE PixelPlace place(int32_t operand, int32_t column) const {
        return pixel_place(batch_, operand, column);
    }

    FASTGEN_HOST_DEVICE PixelRange share(const PixelStep& step) const {
        return pixel_share(pixel_tiles(step), team_.rank(), team_.size());
    }

    // Channels of the step that are the block's.
    FASTGEN_HOST_DEVICE static PixelRange channels_of(const PixelStep& step, PixelRange tiles) {
        const int32_t end = tiles.end * step.per_tile;
        return {tiles.begin * step.per_tile, end < step.channels ? end : step.channels};
    }

    FASTGEN_HOST_DEVICE PixelRange rows_from(int32_t row) const {
        return {row, row + kPixelRows < rows_.end ? row + kPixelRows : rows_.end};
    }

    FASTGEN_HOST_DEVICE Lane prepare(const PixelStep& step, int32_t column) {
        if (step.num_blocks) team_.locate(stage_, batch_, step, column);
        const PixelRange channels = channels_of(step, share(step)), rows = rows_from(rows_.begin);
        Lane lane{};
        if (team_.lane() >= rows.size() * channels.size()) return lane;
        const int32_t row = rows.begin + team_.lane() / channels.size();
        const int32_t channel = channels.begin + team_.lane() % channels.size();
        FASTGEN_UNROLL
        for (int32_t g = 0; g < kEarly; ++g) {
            if (g < step.groups) lane.start_from[g] = start_of(step, row, channel, g, column);
        }
        const PixelInstr* instr = stage_.instrs + step.first_instr;
        for (int32_t k = 0; k < step.num_instrs; ++k, ++instr) {
            if (!instr->is(PlanOp::load)) continue;
            FASTGEN_UNROLL
            for (int32_t e = 0; e < kEarly; ++e) {
                if (instr->a == e) lane.load_from[e] = loaded_of(step, *instr, row, channel, column);
            }
        }
        return lane;
    }

    // Null: zero.
    FASTGEN_HOST_DEVICE const float* start_of(const PixelStep& step, int32_t row, int32_t channel, int32_t group,
                                              int32_t column) const {
        const int32_t of_step = group * step.channels + channel;
        if (step.init < 0) return stage_.biases + step.bias + of_step;
        const PixelPlace from = place(step.init, column);
        return from.first ? from.of(row) + of_step : nullptr;
    }

    FASTGEN_HOST_DEVICE const float* loaded_of(const PixelStep& step, const PixelInstr& instr, int32_t row,
                                               int32_t channel, int32_t column) const {
        const PixelPlace from = place(step.operand + instr.operand, column);
        return from.first ? from.of(row) + channel : nullptr;
    }

    FASTGEN_HOST_DEVICE static float value_at(const float* from) { return from ? pixel_load(from) : 0.0f; }

    FASTGEN_HOST_DEVICE void run_step(const PixelAction& action, Lane& lane) {
        const PixelStep& step = stage_.steps[action.step()];
        const PixelRange tiles = share(step);
        FASTGEN_UNROLL
        for (int32_t e = 0; e < kEarly; ++e) {
            lane.load[e] = value_at(lane.load_from[e]);
            lane.start[e] = value_at(lane.start_from[e]);
        }
        for (int32_t row = rows_.begin; row < rows_.end; row += kPixelRows) {
            const PixelRange rows = rows_from(row);
            if (row > rows_.begin) team_.sync();
            if (step.num_blocks) team_.multiply(stage_, batch_, step, tiles, rows, action.column());
            if (rows.end == rows_.end && action.fetches() != kPixelDraw) {
                const PixelStep& next = stage_.steps[action.fetches()];
                team_.fetch(stage_, next, share(next));
            }
            if (step.num_blocks) team_.sync();
            finish(step, tiles, rows, action.column(), lane);
        }
    }

    // The step's program and its stores, a lane for each row and channel.
    FASTGEN_HOST_DEVICE void finish(const PixelStep& step, PixelRange tiles, PixelRange rows, int32_t column,
                                    const Lane& lane) {
        const PixelRange channels = channels_of(step, tiles);
        float* values = team_.values() + team_.lane();
        for (int32_t i = team_.lane(); i < rows.size() * channels.size(); i += team_.lanes()) {
            const bool early = i == team_.lane() && rows.begin == rows_.begin;
            const int32_t of_rows = i / channels.size(), of_block = i % channels.size();
            const int32_t row = rows.begin + of_rows, channel = channels.begin + of_block;
            const PixelInstr* instr = stage_.instrs + step.first_instr;
            for (int32_t k = 0; k < step.num_instrs; ++k, ++instr) {
                float value;
                if (instr->is(PlanOp::acc)) {
                    const int32_t g = instr->a;
                    value = early && g < kEarly ? (g == 0 ? lane.start[0] : lane.start[1])
                                                : value_at(start_of(step, row, channel, g, column));
                    if (step.num_blocks) value = add_parts(value, step, tiles, of_rows, of_block, g);
                } else if (instr->is(PlanOp::load)) {
                    value = early && instr->a < kEarly ? (instr->a == 0 ? lane.load[0] : lane.load[1])
                                                       : value_at(loaded_of(step, *instr, row, channel, column));
                } else if (instr->is(PlanOp::constant)) {
                    value = stage_.constants[step.constant + instr->operand];
                } else {
                    value = pixel_apply(static_cast<PlanOp>(instr->op), values[instr->a * team_.lanes()],
                                        values[instr->b * team_.lanes()]);
                }
                values[k * team_.lanes()] = value;
            }
            for (int32_t s = step.first_store; s < step.first_store + step.num_stores; ++s) {
                const PixelStore& store = stage_.stores[s];
                const PixelPlace to = place(step.operand + store.operand, column);
                to.of(row)[channel] = values[store.reg * team_.lanes()];
            }
        }
    }

    FASTGEN_HOST_DEVICE float add_parts(float total, const PixelStep& step, PixelRange tiles, int32_t row,
                                        int32_t channel, int32_t group) const {
        const int32_t packed =
            channel / step.per_tile * kPixelColumns + group * step.per_tile + channel % step.per_tile;
        FASTGEN_UNROLL
        for (int32_t part = 0; part < kPixelParts; ++part) {
            total += team_.partial()[partial_at(part, row, packed, tiles)];
        }
        return total;
    }

    // The blocks of a cluster share the samples; the lanes of a block work on one after the other.
    FASTGEN_HOST_DEVICE void draw(const PixelDraw& source, int32_t x) {
        const PixelPlace from = place(source.operand, x);
        const auto streams = static_cast<int32_t>(batch_.streams), first = rows_.begin / streams;
        for (int32_t n = first + team_.rank(); n * streams < rows_.end; n += team_.size()) {
            if (n >= first + team_.size()) team_.sync();  // the sample before is drawn
            const float* params = from.of(n * streams);
            const float* null = streams == 2 ? params + from.pitch : nullptr;
            if (stage_.head == static_cast<int64_t>(PlanHead::categorical)) {
                draw_categorical(source, params, null, x, n);
            } else if (stage_.head == static_cast<int64_t>(PlanHead::logistic_mixture)) {
                draw_mixture(source, params, x, n);
            } else if (team_.lane() == 0) {
                const double logit = guided(params, null, 0);
                const double odds = __builtin_exp(-__builtin_fabs(logit) * *batch_.inverse_temperature);
                const int32_t drawn = (logit < 0 ? 1.0 : odds) / (1.0 + odds) < uniform(source.first_uniform, x, n);
                keep(source, x, n, &drawn);
            }
        }
    }

    // Logit k, led away from that of `null`: fastgen/sampling/guidance.py. What the latter forbids stays forbidden.
    FASTGEN_HOST_DEVICE float guided(const float* logits, const float* null, int32_t k) const {
        const float own = pixel_load(logits + k);
        if (!null) return own;
        const float other = pixel_load(null + k);
        return other == -__builtin_inff() ? other : other + *batch_.guidance * (own - other);
    }

    // The smallest level whose cumulative probability is at least the uniform. Levels are summed in segments, these in
    // groups.
    FASTGEN_HOST_DEVICE void draw_categorical(const PixelDraw& source, const float* logits, const float* null,
                                              int32_t x, int32_t n) {
        double* totals = team_.doubles();  // of segments, then of groups; before, their largest logits
        float* odds = reinterpret_cast<float*>(totals + kPixelSegments + kPixelGroups);
        for (int32_t k = team_.lane(); k < source.count; k += team_.lanes()) odds[k] = guided(logits, null, k);
        const auto largest_of = [odds](PixelRange own) -> double {
            float most = own.size() > 0 ? odds[own.begin] : odds[0];
            for (int32_t k = own.begin; k < own.end; ++k) most = odds[k] > most ? odds[k] : most;
            return most;
        };
        const auto larger = [](double a, double b) { return b > a ? b : a; };
        const double top = gather(totals, source.count, largest_of, larger);
        const float scale = static_cast<float>(*batch_.inverse_temperature);
        for (int32_t k = team_.lane(); k < source.count; k += team_.lanes()) {
            odds[k] = scalar::exp((odds[k] - static_cast<float>(top)) * scale);
        }
        team_.sync();
        float least = 0;
        if (*batch_.top_k > 0) least = threshold(odds, totals, source.count, least, *batch_.top_k, true);
        if (*batch_.top_p < 1) {
            const double wanted = *batch_.top_p * sum_from(odds, totals, source.count, least, false);
            least = threshold(odds, totals, source.count, least, wanted, false);
        }
        if (least > 0) {
            for (int32_t k = team_.lane(); k < source.count; k += team_.lanes())
                odds[k] = odds[k] < least ? 0 : odds[k];
            team_.sync();
        }
        const double all = sum_from(odds, totals, source.count, 0, false);
        if (team_.lane() != 0) return;
        double sum = 0;
        const double target = uniform(source.first_uniform, x, n) * all;
        const double* groups = totals + kPixelSegments;
        const int32_t length = segment_length(source.count);
        int32_t g = 0;
        for (; (g + 1) * kGroup * length < source.count && sum + groups[g] < target; ++g) sum += groups[g];
        int32_t s = g * kGroup;
        const int32_t last = s + kGroup - 1;
        for (; s < last && (s + 1) * length < source.count && sum + totals[s] < target; ++s) sum += totals[s];
        int32_t level = s * length;
        for (; level < source.count - 1; ++level) {
            sum += odds[level];
            if (sum >= target) break;
        }
        keep(source, x, n, &level);
    }

    static constexpr int32_t kGroup = kPixelSegments / kPixelGroups;  // segments

    // What all lanes find of all levels: that of each segment, which `totals` keeps, joined in groups, which it keeps
    // behind these.
    template <class OfSegment, class Join>
    FASTGEN_HOST_DEVICE double gather(double* totals, int32_t count, OfSegment of_segment, Join join) {
        const int32_t length = segment_length(count);
        double* groups = totals + kPixelSegments;
        team_.sync();  // the levels are written, the totals of before are read
        for (int32_t s = team_.lane(); s < kPixelSegments; s += team_.lanes()) {
            totals[s] = of_segment(segment(s, length, count));
        }
        team_.sync();
        for (int32_t g = team_.lane(); g < kPixelGroups; g += team_.lanes()) {
            double total = totals[g * kGroup];
            for (int32_t s = g * kGroup + 1; s < (g + 1) * kGroup; ++s) total = join(total, totals[s]);
            groups[g] = total;
        }
        team_.sync();
        double all = groups[0];
        for (int32_t g = 1; g < kPixelGroups; ++g) all = join(all, groups[g]);
        return all;
    }

    // The sum of the odds that are at least `least`, or the number of those above 0; `totals` keeps those of `gather`.
    FASTGEN_HOST_DEVICE double sum_from(const float* odds, double* totals, int32_t count, float least, bool counted) {
        const auto total_of = [odds, least, counted](PixelRange own) {
            double total = 0;
            for (int32_t k = own.begin; k < own.end; ++k) {
                if (!(odds[k] < least)) total += counted ? static_cast<double>(odds[k] > 0) : odds[k];
            }
            return total;
        };
        return gather(totals, count, total_of, [](double a, double b) { return a + b; });
    }

    // The largest float, at least `least`, that leaves enough of the levels whose odds are no smaller: `wanted` of them,
    // or a sum of so much. Positive floats have the order of their bits.
    FASTGEN_HOST_DEVICE float threshold(const float* odds, double* totals, int32_t count, float least, double wanted,
                                        bool counted) {
        int32_t low = 0, high = 0x3f800001;  // above 1, the odds of the likeliest
        while (high - low > 1) {
            const int32_t middle = low + (high - low) / 2;
            const float bound = scalar::as_float(middle);
            const double found = sum_from(odds, totals, count, bound > least ? bound : least, counted);
            (found >= wanted ? low : high) = middle;
        }
        const float bound = scalar::as_float(low);
        return bound > least ? bound : least;
    }

    // Odd: lanes that read a level of each share no memory bank.
    FASTGEN_HOST_DEVICE static int32_t segment_length(int32_t count) {
        return (count + kPixelSegments - 1) / kPixelSegments | 1;
    }

    FASTGEN_HOST_DEVICE static PixelRange segment(int32_t index, int32_t length, int32_t count) {
        const int32_t begin = index * length, end = begin + length;
        return {begin < count ? begin : count, end < count ? end : count};
    }

    // As `logistic_mixture_draw`, operation by operation, what depends on nothing else side by side.
    FASTGEN_HOST_DEVICE void draw_mixture(const PixelDraw& source, const float* from, int32_t x, int32_t n) {
        const auto components = static_cast<int32_t>(stage_.components), colours = source.num_colours;
        const auto block = static_cast<int32_t>(logistic_mixture_kinds(colours)) * components;
        const double scale = *batch_.inverse_temperature;
        double* shares = team_.doubles();
        double* odds = shares + components;
        double* spreads = odds + components;
        double* slopes = spreads + kMaxJointColours;
        double* means = slopes + kMaxJointColours;
        for (int32_t k = team_.lane(); k < components; k += team_.lanes()) shares[k] = pixel_load(from + k) * scale;
        team_.sync();
        for (int32_t k = team_.lane(); k < components; k += team_.lanes()) {
            double most = shares[0];
            for (int32_t i = 1; i < components; ++i) most = shares[i] > most ? shares[i] : most;
            odds[k] = __builtin_exp(shares[k] - most);
        }
        team_.sync();
        for (int32_t k = team_.lane(); k < components; k += team_.lanes()) {
            double total = 0;
            for (int32_t i = 0; i < components; ++i) total += odds[i];
            shares[k] = odds[k] / total;
        }
        team_.sync();
        const double which = uniform(source.first_uniform, x, n);
        double sum = 0;
        int32_t chosen = 0;
        for (; chosen < components - 1; ++chosen) {
            sum += shares[chosen];
            if (sum >= which) break;
        }
        const float* own = from + components + chosen;
        for (int32_t i = team_.lane(); i < 2 * kMaxJointColours; i += team_.lanes()) {
            const int32_t c = i % kMaxJointColours;
            if (i < kMaxJointColours && c < colours) {
                const double scale_of = logistic_mixture_scale(pixel_load(own + c * block + components));
                spreads[c] = scale_of / scale * logistic_mixture_noise(uniform(source.first_uniform + 1 + c, x, n));
                means[c] = pixel_load(own + c * block);
            } else if (i >= kMaxJointColours && c < colours * (colours - 1) / 2) {
                slopes[c] = __builtin_tanh(pixel_load(own + c * block + 2 * components));
            }
        }
        team_.sync();
        if (team_.lane() != 0) return;
        int32_t drawn[kMaxJointColours];
        FASTGEN_UNROLL
        for (int32_t c = 0; c < kMaxJointColours; ++c) {
            if (c >= colours) break;
            double mean = means[c];
            FASTGEN_UNROLL
            for (int32_t i = 0; i < c; ++i) mean += slopes[i + c - 1] * stage_.values[drawn[i]];
            drawn[c] = logistic_mixture_level(mean + spreads[c], stage_.num_levels);
        }
        keep(source, x, n, drawn);
    }

    // Of a pixel in its image.
    FASTGEN_HOST_DEVICE int64_t position(int32_t x) const { return batch_.state[0] * stage_.width + x; }

    FASTGEN_HOST_DEVICE float uniform(int32_t index, int32_t x, int32_t n) const {
        uint32_t bits[4];
        philox_draw(static_cast<uint64_t>(batch_.state[1]), static_cast<uint32_t>(index / 4),
                    static_cast<uint32_t>(position(x)),
                    static_cast<uint64_t>(batch_.state[2]) + static_cast<uint64_t>(n), bits);
        return philox_uniform(index % 4 == 0 ? bits[0] : index % 4 == 1 ? bits[1] : index % 4 == 2 ? bits[2] : bits[3]);
    }

    // Writes the levels of a group of colours, drawn or given, and their encodings: the next input of all its streams.
    FASTGEN_HOST_DEVICE void keep(const PixelDraw& source, int32_t x, int32_t n, const int32_t* drawn) {
        const int64_t pixels = stage_.height * stage_.width, position = this->position(x);
        const bool given = batch_.mask[n * pixels + position];
        for (int32_t c = 0; c < source.num_colours; ++c) {
            const int32_t colour = source.first_colour + c;
            const int64_t element = (n * stage_.colours + colour) * pixels + position;
            const int32_t level = given ? batch_.known[element] : drawn[c];
            batch_.levels[element] = level;
            for (int64_t e = stage_.first_encoding; e < stage_.first_encoding + stage_.num_encodings; ++e) {
                const PixelOperand& at = stage_.operands[e];
                if (at.colour != colour) continue;
                const float* code = stage_.encoded + at.more + level * at.count;
                for (int64_t s = 0; s < batch_.streams; ++s) {
                    float* to = place(static_cast<int32_t>(e), x).of(static_cast<int32_t>(n * batch_.streams + s));
                    for (int32_t i = 0; i < at.count; ++i) to[i] = code[i];
                }
            }
        }
    }

    const PixelStage& stage_;
    const PixelBatch& batch_;
    const PixelRange rows_;  // of this cluster, all of each sample
    Team& team_;
};

}  // namespace fastgen

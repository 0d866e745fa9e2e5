// Runs a sampling plan (common/plan_tables.h) for a batch of images on a team of workers that stay until the batch is
// done: the blocks of a persistent kernel (cuda/plan_executor.cu), or groups of threads on the host, with which tests
// prove the order of reads and writes (tests/sampling/plan_host.cpp).
//
// Every lane of every worker runs through the same time loop. A step is cut into tiles of one panel of channels and some
// rows; a worker takes a share of them and its lanes share a tile. All workers meet at a barrier where a step reads what
// another wrote since the last one. A Team has
//
//     int rank(), size()      this worker, and how many there are
//     int lane(), lanes()     this lane, and how many a worker has
//     void sync()             returns when all lanes of this worker have called it
//     void barrier()          returns when all lanes of all workers have called it; what was written before is seen
//     char* scratch()         plan_space(...).total() bytes, aligned to 16, which the lanes of a worker share
//
// Neither team, batch nor strategy changes the bits of an image: sums follow the contract of cpu/tap_gemm.h, chunks of
// kTapGemmChunk products, each one chain of fused multiply-adds from zero, which are added in order to what the product
// starts from. Chunks are independent, so where there are few rows they are computed by different lanes.
#pragma once

#include <cstdint>

#include "common/logistic_mixture.h"
#include "common/philox.h"
#include "common/plan_math.h"
#include "common/plan_tables.h"
#include "cpu/tap_gemm.h"

#if defined(__CUDA_ARCH__)
#define FASTGEN_UNROLL _Pragma("unroll")
#else
#define FASTGEN_UNROLL
#endif

namespace fastgen {

// How a step is cut. latency: few rows a tile, and a lane for each chunk of a sum: many lanes work on few samples.
// throughput: many rows a tile, so that weights are read for as many as possible. automatic: throughput for each step
// that has such a tile for every other worker.
enum class PlanStrategy : int64_t { automatic, latency, throughput };

constexpr int64_t kLatencyRows = 4;
constexpr int64_t kThroughputRows = 64;
constexpr int64_t kLaneRows = 4;  // that a lane multiplies by the weights it has read

// Rows of a tile in a plane, from a channel on; null outside, where all is zero.
struct PlanOperand {
    float* first;
    int64_t row_stride;
};

// A tap that is not outside: rows [begin, end) of the weight that is left, and where it begins in the weight as packed.
struct PlanSource {
    const float* first;
    int64_t row_stride, begin, end, weight;
};

// Bytes of scratch memory of a worker.
struct PlanSpace {
    int64_t operands, sources, product, values, probabilities;
    int64_t total() const { return operands + sources + product + values + probabilities; }
};

// For tables on the host.
inline PlanSpace plan_space(const PlanTables& plan, int64_t lanes) {
    const auto aligned = [](int64_t bytes) { return div_up(bytes, 16) * 16; };
    int64_t addresses = 0, taps = 0, product = 0;
    for (const PlanStep *step = plan.steps, *end = step + plan.num_steps; step != end; ++step) {
        int64_t inner = 0;
        for (int64_t i = step->first_tap; i < step->first_tap + step->num_taps; ++i) inner += plan.taps[i].count;
        const int64_t parts = div_up(inner, kTapGemmChunk);
        const int64_t rows = parts * kLatencyRows > kThroughputRows ? parts * kLatencyRows : kThroughputRows;
        const int64_t floats = rows * step->groups * kPlanPanel;
        if (floats > product) product = floats;
        if (step->num_addresses > addresses) addresses = step->num_addresses;
        if (step->num_taps > taps) taps = step->num_taps;
    }
    PlanSpace space{};
    space.operands = aligned(addresses * int64_t{sizeof(PlanOperand)});
    space.sources = aligned(taps * int64_t{sizeof(PlanSource)});
    space.product = aligned(product * int64_t{sizeof(float)});
    space.values = aligned(plan.buffers * lanes * int64_t{sizeof(float)});
    space.probabilities = aligned(plan.num_levels * int64_t{sizeof(float)});
    return space;
}

FASTGEN_HOST_DEVICE float plan_apply(PlanOp op, float a, float b) {
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
class PlanSchedule {
public:
    // sizes: plan_space of the plan and of the team's lanes.
    FASTGEN_HOST_DEVICE PlanSchedule(const PlanTables& plan, const PlanBatch& batch, PlanStrategy strategy,
                                     const PlanSpace& space, Team& team)
        : plan_(plan), batch_(batch), strategy_(strategy), team_(team) {
        char* next = team.scratch();
        operands_ = reinterpret_cast<PlanOperand*>(next);
        sources_ = reinterpret_cast<PlanSource*>(next += space.operands);
        product_ = reinterpret_cast<float*>(next += space.sources);
        values_ = reinterpret_cast<float*>(next += space.product);
        probabilities_ = reinterpret_cast<float*>(next += space.values);
    }

    // Draws rows [row_begin, row_end) of the images.
    FASTGEN_HOST_DEVICE void run(int64_t row_begin, int64_t row_end) {
        for (y_ = row_begin; y_ < row_end; ++y_) {
            pixel_stage_ = false;
            unseen_ = 0;
            for (int64_t s = 0; s < plan_.row_steps; ++s) run_step(s);
            team_.barrier();
            pixel_stage_ = true;
            for (x_ = plan_.first_column; x_ < plan_.end_column; ++x_) run_pixel();
        }
    }

private:
    // Where a tile's rows are: at a column of the frame, for samples `row`... of the batch, or (a whole row) for the pairs
    // of column and sample.
    struct Tile {
        const PlanStep& step;
        int64_t frame_row, column, row, rows, panel, parts;
        bool samples;
    };

    FASTGEN_HOST_DEVICE void run_pixel() {
        int64_t s = plan_.row_steps;
        for (int64_t d = 0; d < plan_.num_draws; ++d) {
            unseen_ = s;
            for (; s < plan_.num_steps && plan_.steps[s].rank == d; ++s) run_step(s);
            team_.barrier();
            if (y_ < 0 || x_ < 0 || x_ >= plan_.width) continue;
            draw(plan_.draws[d]);
            team_.barrier();
        }
    }

    FASTGEN_HOST_DEVICE int64_t row_of(const PlanStep& step) const {
        return frame_position(y_ - step.lag_y, step.stride_y, step.height, step.period_y, step.phase_y);
    }

    FASTGEN_HOST_DEVICE int64_t column_of(const PlanStep& step) const {
        return frame_position(x_ - step.lag_x, step.stride_x, step.width, step.period_x, step.phase_x);
    }

    FASTGEN_HOST_DEVICE bool active(const PlanStep& step) const {
        return row_of(step) >= 0 && (!pixel_stage_ || column_of(step) >= 0);
    }

    // Whether a step reads what another wrote since the last barrier: steps from unseen_ on ran since then, if they had
    // work at this time.
    FASTGEN_HOST_DEVICE bool must_wait(const PlanStep& step) const {
        for (int64_t i = step.first_source; i < step.first_source + step.num_sources; ++i) {
            if (plan_.sources[i] >= unseen_ && active(plan_.steps[plan_.sources[i]])) return true;
        }
        return false;
    }

    FASTGEN_HOST_DEVICE void run_step(int64_t s) {
        const PlanStep& step = plan_.steps[s];
        if (!active(step)) return;
        if (must_wait(step)) {
            team_.barrier();
            unseen_ = s;
        }
        // As many runs of rows with one stride as there are columns, or one of all.
        int64_t runs = 1, rows = batch_.count;
        if (!pixel_stage_ && step.uniform) rows *= step.width;
        if (!pixel_stage_ && !step.uniform) runs = div_up(step.width - step.phase_x, step.period_x);
        const int64_t panels = div_up(step.channels, kPlanPanel);
        const int64_t most = panels * runs * div_up(rows, kThroughputRows);
        const bool throughput =
            strategy_ == PlanStrategy::throughput || (strategy_ == PlanStrategy::automatic && 2 * most >= team_.size());
        const int64_t tile_rows = throughput ? kThroughputRows : kLatencyRows, row_tiles = div_up(rows, tile_rows);
        // Panels are split between workers before rows, so that a worker reads the same weights again and again.
        const int64_t tiles = panels * runs * row_tiles;
        const int64_t begin = tiles * team_.rank() / team_.size(), end = tiles * (team_.rank() + 1) / team_.size();
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i % row_tiles * tile_rows, run = i / row_tiles % runs;
            const int64_t column = pixel_stage_   ? column_of(step)
                                   : step.uniform ? 0
                                                  : step.phase_x + run * step.period_x;
            const int64_t left = rows - row;
            Tile tile{step,
                      row_of(step),
                      column,
                      row,
                      left < tile_rows ? left : tile_rows,
                      i / row_tiles / runs,
                      throughput ? 1 : 0,
                      pixel_stage_ || !step.uniform};
            run_tile(tile);
        }
    }

    FASTGEN_HOST_DEVICE void run_tile(Tile tile) {
        const PlanStep& step = tile.step;
        team_.sync();  // nobody reads the tile before any more
        for (int64_t i = team_.lane(); i < step.num_addresses; i += team_.lanes()) {
            operands_[i] = locate(tile, plan_.addresses[step.first_address + i]);
        }
        team_.sync();
        if (step.groups > 0) {
            const int64_t inner = collect(tile);
            team_.sync();
            const int64_t chunks = div_up(inner, kTapGemmChunk);
            tile.parts = tile.parts == 1 || chunks < 2 ? 1 : chunks;
            multiply(tile, inner);
            team_.sync();
        }
        finish(tile);
    }

    // Where the rows of a tile are in a plane.
    FASTGEN_HOST_DEVICE PlanOperand locate(const Tile& tile, const PlanAddress& address) const {
        const PlanPlane& plane = plan_.planes[address.plane];
        if (plane.broadcast) {
            const int64_t stride = tile.samples && plane.per_sample ? plane.pitch : 0;
            return {at(address.plane, 0, 0) + address.channel + tile.row * stride, stride};
        }
        const int64_t row = div_down(tile.frame_row * address.num_y + address.dy, address.den_y);
        const int64_t column = div_down(tile.column * address.num_x + address.dx, address.den_x);
        if (row < 0 || row >= plane.height) return {nullptr, 0};
        if (pixel_stage_ && (column < 0 || column >= plane.width)) return {nullptr, 0};  // a row step finds zeros there
        return {at(address.plane, row, column) + address.channel + tile.row * plane.pitch, plane.pitch};
    }

    FASTGEN_HOST_DEVICE float* at(int64_t index, int64_t row, int64_t column) const {
        const PlanPlane& plane = plan_.planes[index];
        const int64_t pixel = mod(row, plane.rows) * (plane.left + plane.width + plane.right) + plane.left + column;
        return batch_.workspace + (plane.offset + pixel * plane.pitch) * batch_.count;
    }

    // The taps that are not outside, in order, a lane for each; the rows of the weight that are left.
    FASTGEN_HOST_DEVICE int64_t collect(const Tile& tile) {
        const PlanStep& step = tile.step;
        const PlanTap* taps = plan_.taps + step.first_tap;
        const int64_t depth = plan_.bfloat16 ? 2 : 1;
        int64_t index = 0, begin = 0, weight = 0;
        for (int64_t i = 0; i < step.num_taps; ++i) {
            const PlanOperand& operand = operands_[taps[i].address - step.first_address];
            if (operand.first) {
                if (i % team_.lanes() == team_.lane()) {
                    sources_[index] = {operand.first, operand.row_stride, begin, begin + taps[i].count, weight};
                }
                ++index;
                begin += taps[i].count;
            }
            weight += div_up(taps[i].count, depth) * kPlanPanel;
        }
        return begin;
    }

    FASTGEN_HOST_DEVICE void multiply(const Tile& tile, int64_t inner) {
        if (plan_.bfloat16) {
            tile.rows == 1 ? multiply_by<uint32_t, 1>(tile, inner) : multiply_by<uint32_t, kLaneRows>(tile, inner);
        } else {
            tile.rows == 1 ? multiply_by<float, 1>(tile, inner) : multiply_by<float, kLaneRows>(tile, inner);
        }
    }

    // product_ [parts, rows, columns] = the chunks of the sums, or in one part the sums.
    template <class W, int64_t kRows>
    FASTGEN_HOST_DEVICE void multiply_by(const Tile& tile, int64_t inner) {
        const PlanStep& step = tile.step;
        const int64_t columns = step.groups * kPlanPanel, row_groups = div_up(tile.rows, kRows);
        const int64_t chunks = div_up(inner, kTapGemmChunk);
        for (int64_t i = team_.lane(); i < tile.parts * row_groups * columns; i += team_.lanes()) {
            const int64_t column = i % columns, part = i / columns / row_groups;
            const int64_t row = i / columns % row_groups * kRows;
            const int64_t packed = tile.panel * columns + column;  // of the step
            const W* weight = static_cast<const W*>(plan_.weights) + step.weight +
                              packed / kPlanPanel * step.inner * kPlanPanel + packed % kPlanPanel;
            float sum[kRows] = {};
            if (tile.parts > 1) {
                add_chunk<W, kRows>(tile, weight, part, inner, row, sum);
            } else {
                FASTGEN_UNROLL
                for (int64_t r = 0; r < kRows; ++r) {
                    if (row + r < tile.rows) sum[r] = start(tile, row + r, column);
                }
                for (int64_t c = 0; c < chunks; ++c) add_chunk<W, kRows>(tile, weight, c, inner, row, sum);
            }
            FASTGEN_UNROLL
            for (int64_t r = 0; r < kRows; ++r) {
                if (row + r < tile.rows) product_[(part * tile.rows + row + r) * columns + column] = sum[r];
            }
        }
    }

    // sum[r] += rows [kTapGemmChunk * chunk, ...) of the weight that is left, times rows [row, row + kRows) of the tile.
    template <class W, int64_t kRows>
    FASTGEN_HOST_DEVICE void add_chunk(const Tile& tile, const W* weight, int64_t chunk, int64_t inner, int64_t row,
                                       float* sum) const {
        float chain[kRows] = {};
        int64_t k = chunk * kTapGemmChunk;
        const int64_t end = k + kTapGemmChunk < inner ? k + kTapGemmChunk : inner;
        const PlanSource* source = sources_;
        while (source->end <= k) ++source;
        for (; k < end; ++source) {
            const int64_t stop = source->end < end ? source->end : end;
            const int64_t first = k - source->begin, last = stop - source->begin;
            const float* a[kRows];
            FASTGEN_UNROLL
            for (int64_t r = 0; r < kRows; ++r) {  // those past the last row are not used
                const int64_t own = row + r < tile.rows ? row + r : row;
                a[r] = source->first + own * source->row_stride;
            }
            const W* w = weight + source->weight;
            for (int64_t i = first; i < last; ++i) {
                const float factor = weight_at(w, i);
                FASTGEN_UNROLL
                for (int64_t r = 0; r < kRows; ++r) chain[r] = scalar::fma(a[r][i], factor, chain[r]);
            }
            k = stop;
        }
        FASTGEN_UNROLL
        for (int64_t r = 0; r < kRows; ++r) sum[r] += chain[r];
    }

    FASTGEN_HOST_DEVICE static float weight_at(const float* w, int64_t k) { return w[k * kPlanPanel]; }

    // Two bfloat16 in a word, that of the even k in its low half.
    FASTGEN_HOST_DEVICE static float weight_at(const uint32_t* w, int64_t k) {
        const uint32_t pair = w[k / 2 * kPlanPanel];
        return scalar::as_float(static_cast<int32_t>(k % 2 ? pair & 0xffff0000u : pair << 16));
    }

    // What the product starts from.
    FASTGEN_HOST_DEVICE float start(const Tile& tile, int64_t row, int64_t column) const {
        const PlanStep& step = tile.step;
        const int64_t packed = tile.panel * step.groups * kPlanPanel + column;
        if (step.init >= 0) {
            const PlanOperand& init = operands_[step.init - step.first_address];
            return init.first ? init.first[row * init.row_stride + packed] : 0.0f;
        }
        return step.bias >= 0 ? plan_.biases[step.bias + packed] : 0.0f;
    }

    // The step's program and its stores, a lane for each row and channel.
    FASTGEN_HOST_DEVICE void finish(const Tile& tile) {
        const PlanStep& step = tile.step;
        float* values = values_ + team_.lane();
        for (int64_t i = team_.lane(); i < tile.rows * kPlanPanel; i += team_.lanes()) {
            const int64_t row = i / kPlanPanel, channel = tile.panel * kPlanPanel + i % kPlanPanel;
            if (channel >= step.channels) continue;
            const PlanInstr* program = plan_.instrs + step.first_instr;
            for (const PlanInstr *instr = program, *end = program + step.num_instrs; instr != end; ++instr) {
                values[instr->buffer * team_.lanes()] = evaluate(tile, *instr, program, values, row, channel);
            }
            for (int64_t s = step.first_store; s < step.first_store + step.num_stores; ++s) {
                const PlanStore& store = plan_.stores[s];
                const PlanOperand& to = operands_[store.address - step.first_address];
                to.first[row * to.row_stride + channel] = values[program[store.instr].buffer * team_.lanes()];
            }
        }
    }

    FASTGEN_HOST_DEVICE float evaluate(const Tile& tile, const PlanInstr& instr, const PlanInstr* program,
                                       const float* values, int64_t row, int64_t channel) const {
        if (instr.op == PlanOp::constant) return plan_.constants[instr.a * kPlanPanel];
        if (instr.op == PlanOp::acc) return sum(tile, row, instr.a * kPlanPanel + channel % kPlanPanel);
        if (instr.op == PlanOp::load) {
            const PlanOperand& from = operands_[instr.address - tile.step.first_address];
            return from.first ? from.first[row * from.row_stride + channel] : 0.0f;
        }
        const float a = values[program[instr.a].buffer * team_.lanes()];
        return plan_apply(instr.op, a, instr.b < 0 ? 0.0f : values[program[instr.b].buffer * team_.lanes()]);
    }

    FASTGEN_HOST_DEVICE float sum(const Tile& tile, int64_t row, int64_t column) const {
        const int64_t columns = tile.step.groups * kPlanPanel;
        if (tile.parts == 1) return product_[row * columns + column];
        float total = start(tile, row, column);
        for (int64_t part = 0; part < tile.parts; ++part) {
            total += product_[(part * tile.rows + row) * columns + column];
        }
        return total;
    }

    // Samples are split between workers; the lanes of one share the levels of a sample, or its samples.
    FASTGEN_HOST_DEVICE void draw(const PlanDraw& source) {
        const int64_t begin = batch_.count * team_.rank() / team_.size();
        const int64_t end = batch_.count * (team_.rank() + 1) / team_.size();
        if (plan_.head == PlanHead::categorical) {
            for (int64_t n = begin; n < end; ++n) draw_categorical(source, n);
            return;
        }
        for (int64_t n = begin + team_.lane(); n < end; n += team_.lanes()) {
            int32_t drawn[kMaxJointColours];
            const float* params = params_of(source, n);
            float uniforms[1 + kMaxJointColours];
            for (int64_t i = 0; i < source.num_uniforms; ++i) uniforms[i] = uniform(source.first_uniform + i, n);
            if (plan_.head == PlanHead::bernoulli) {
                const double odds = __builtin_exp(-__builtin_fabs(params[0] * batch_.inverse_temperature));
                drawn[0] = (params[0] < 0 ? 1.0 : odds) / (1.0 + odds) < uniforms[0];
            } else {
                logistic_mixture_draw(params, plan_.components, source.num_colours, plan_.num_levels, uniforms,
                                      batch_.inverse_temperature, plan_.levels, drawn);
            }
            keep(source, n, drawn);
        }
    }

    // The smallest level whose cumulative probability is at least the uniform.
    FASTGEN_HOST_DEVICE void draw_categorical(const PlanDraw& source, int64_t n) {
        const float* params = params_of(source, n);
        float top = params[0];
        for (int64_t k = 1; k < source.count; ++k) top = params[k] > top ? params[k] : top;
        const float scale = static_cast<float>(batch_.inverse_temperature);
        team_.sync();  // the sample before is drawn
        for (int64_t k = team_.lane(); k < source.count; k += team_.lanes()) {
            probabilities_[k] = scalar::exp((params[k] - top) * scale);
        }
        team_.sync();
        if (team_.lane() != 0) return;
        double total = 0, sum = 0;
        for (int64_t k = 0; k < source.count; ++k) total += probabilities_[k];
        const double target = uniform(source.first_uniform, n) * total;
        int32_t level = 0;
        for (; level < source.count - 1; ++level) {
            sum += probabilities_[level];
            if (sum >= target) break;
        }
        keep(source, n, &level);
    }

    FASTGEN_HOST_DEVICE const float* params_of(const PlanDraw& source, int64_t n) const {
        return at(source.plane, y_, x_) + n * plan_.planes[source.plane].pitch + source.channel;
    }

    FASTGEN_HOST_DEVICE float uniform(int64_t index, int64_t n) const {
        uint32_t bits[4];
        philox_draw(batch_.seed, static_cast<uint32_t>(index / 4), static_cast<uint32_t>(y_ * plan_.width + x_),
                    batch_.start + static_cast<uint64_t>(n), bits);
        return philox_uniform(index % 4 == 0 ? bits[0] : index % 4 == 1 ? bits[1] : index % 4 == 2 ? bits[2] : bits[3]);
    }

    // Writes the levels of a group of colours, drawn or given, and their encodings: the next input.
    FASTGEN_HOST_DEVICE void keep(const PlanDraw& source, int64_t n, const int32_t* drawn) {
        const int64_t pixels = plan_.height * plan_.width, position = y_ * plan_.width + x_;
        const bool given = batch_.mask && batch_.mask[n * pixels + position];
        for (int64_t c = 0; c < source.num_colours; ++c) {
            const int64_t colour = source.first_colour + c;
            const int64_t element = (n * plan_.colours + colour) * pixels + position;
            const int32_t level = given ? batch_.known[element] : drawn[c];
            batch_.levels[element] = level;
            for (const PlanEncoding *e = plan_.encodings, *end = e + plan_.num_encodings; e != end; ++e) {
                if (e->colour != colour) continue;
                float* to = at(e->plane, y_, x_) + n * plan_.planes[e->plane].pitch + e->channel;
                for (int64_t i = 0; i < e->count; ++i) to[i] = plan_.tables[e->offset + level * e->count + i];
            }
        }
    }

    const PlanTables& plan_;
    const PlanBatch& batch_;
    const PlanStrategy strategy_;
    Team& team_;
    PlanOperand* operands_;  // of the step's addresses, for the tile at hand
    PlanSource* sources_;    // of its product
    float* product_;
    float* values_;         // of the program at hand: [buffers, lanes]
    float* probabilities_;  // of the levels
    int64_t y_ = 0, x_ = 0;
    int64_t unseen_ = 0;  // the first step since the last barrier
    bool pixel_stage_ = false;
};

}  // namespace fastgen

// fastgen: per-isa
// The worker of the plan executor: every thread of a team runs through the same time loop, does its share of each
// step's tiles, and meets the others at barriers where one step reads what another wrote. Which thread computes an
// element does not change its bits.
//
// A step is a product (plan_linear.h, plan_winograd.h) or attention (plan_attention.h), and then a program of what is
// elementwise (plan_elementwise.h).
#include "plan_executor.h"

#include "plan_attention.h"
#include "plan_draws.h"
#include "plan_elementwise.h"
#include "plan_linear.h"
#include "plan_thread.h"
#include "plan_winograd.h"

namespace fastgen::FASTGEN_ISA {
namespace {

class Worker : PlanThread {
public:
    Worker(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, char* scratch)
        : PlanThread(plan, batch, team.size(), member, scratch), team_(team) {
        for (int64_t s = 0; s < plan.num_steps; ++s) ran[s] = -1;
    }

    void run(int64_t row_begin, int64_t row_end) {
        for (y = row_begin; y < row_end; ++y) {
            locate_rows(0, plan.row_steps);
            for (int64_t i = 0; i < num_active_; ++i) {
                following_ = i + 1 < num_active_ ? &plan.steps[active[i + 1]] : nullptr;
                run_row_step(active[i]);
            }
            wait(false);
            locate_rows(plan.row_steps, plan.num_steps);
            for (int64_t x = plan.first_column; x < plan.end_column && members > 0; ++x) run_pixel(x);
            if (members == 0) return;
        }
    }

private:
    void wait(bool brief) {
        if (members > 1 && !team_.wait(member, brief)) members = member == 0 ? 1 : 0;
        ++epoch_;
    }

    // The steps among [begin, end) that have work in image row y, and where their rows are.
    void locate_rows(int64_t begin, int64_t end) {
        num_active_ = 0;
        for (int64_t s = begin; s < end; ++s) {
            const PlanStep& step = plan.steps[s];
            const int64_t row = frame_position(y - step.lag_y, step.stride_y, step.height, step.period_y, step.phase_y);
            if (row < 0) continue;
            active[num_active_++] = s;
            for (int64_t i = step.first_address; i < step.first_address + step.num_addresses; ++i) {
                const PlanAddress& address = plan.addresses[i];
                const PlanPlane& plane = plan.planes[address.plane];
                const int64_t source = plane.broadcast ? 0 : div_down(row * address.num_y + address.dy, address.den_y);
                const bool inside = plane.broadcast || (source >= 0 && source < plane.height);
                rows[i] = inside ? at(address.plane, source, 0) + address.channel : nullptr;
            }
        }
    }

    void run_pixel(int64_t x) {
        int64_t i = 0;
        for (int64_t d = 0; d < plan.num_draws; ++d) {
            int64_t column = -1;
            for (i = next_in_pixel(i, x, &column); i < num_active_ && plan.steps[active[i]].rank == d;) {
                const int64_t here = i;
                const PlanRun run{column, 0, batch.count, true};
                i = next_in_pixel(i + 1, x, &column);
                following_ = i < num_active_ ? &plan.steps[active[i]] : nullptr;
                begin_step(active[here]);
                run_tiles(plan.steps[active[here]], 1, [&](int64_t) { return run; }, batch.count);
            }
            wait(true);
            if (y < 0 || x < 0 || x >= plan.width) continue;
            if (members > 0) draw(*this, plan.draws[d], x);
            wait(false);
        }
    }

    // The first of the active steps, from `i` on, that has work at column x of the image, and the column of its frame.
    int64_t next_in_pixel(int64_t i, int64_t x, int64_t* column) const {
        for (; i < num_active_; ++i) {
            const PlanStep& step = plan.steps[active[i]];
            *column = frame_position(x - step.lag_x, step.stride_x, step.width, step.period_x, step.phase_x);
            if (*column >= 0) break;
        }
        return i;
    }

    void run_row_step(int64_t s) {
        const PlanStep& step = plan.steps[s];
        begin_step(s);
        if (step.uniform) {
            const int64_t rows = step.width * batch.count;
            return run_tiles(step, 1, [&](int64_t) { return PlanRun{0, 0, rows, false}; }, rows);
        }
        // All samples of a column, if that makes the longer runs.
        const int64_t every = step.filter_size > 0 ? 2 : step.period_x;
        const int64_t columns = div_up(step.width - step.phase_x, every);
        const int64_t residues = step.cycle / every;
        if (batch.count * residues >= columns) {
            const auto run_of = [&](int64_t i) { return PlanRun{step.phase_x + i * every, 0, batch.count, true}; };
            return run_tiles(step, columns, run_of, batch.count);
        }
        // For each sample, the columns of each residue modulo the cycle that belong to the phase.
        const auto run_of = [&](int64_t i) {
            const int64_t column = step.phase_x + i % residues * every;
            return PlanRun{column, i / residues, div_up(step.width - column, step.cycle), false};
        };
        run_tiles(step, residues * batch.count, run_of, div_up(step.width - step.phase_x, step.cycle));
    }

    // Waits for the other members if the step reads what a step since the last barrier wrote.
    void begin_step(int64_t s) {
        const PlanStep& step = plan.steps[s];
        for (int64_t i = step.first_source; i < step.first_source + step.num_sources; ++i) {
            if (ran[plan.sources[i]] == epoch_) {
                wait(!step.row_stage);
                break;
            }
        }
        ran[s] = epoch_;
    }

    // Splits runs x rows x channels into tiles and does the tiles of this member. Channels are split between members
    // before rows, so that a thread always multiplies by the same part of the weights, which then stays in its cache.
    template <class RunOf>
    void run_tiles(const PlanStep& step, int64_t runs, RunOf run_of, int64_t most_rows) {
        if (most_rows <= 0 || members == 0) return;
        const int64_t panels = div_up(step.channels, kPanelColumns);
        const int64_t column_tiles = column_tiles_of(step);
        int64_t row_tiles = div_up(most_rows, kTileRows);
        if (attends_whole(step) && row_tiles < members) row_tiles = min_of(most_rows, members);
        const int64_t tiles = column_tiles * runs * row_tiles;
        int64_t loaded = -1;
        PlanRun run{};
        for (int64_t i = tiles * member / members, end = tiles * (member + 1) / members; i < end; ++i) {
            next_weights = {};
            if (i + 1 < end && (i + 1) % (runs * row_tiles) == 0)
                next_weights = weights_of(step, (i + 1) / (runs * row_tiles));
            if (i + 1 == end && following_)
                next_weights = weights_of(*following_, column_tiles_of(*following_) * member / members);
            const int64_t ct = i / (runs * row_tiles), r = i / row_tiles % runs, rt = i % row_tiles;
            if (r != loaded) run = run_of(loaded = r);
            const int64_t first_row = most_rows * rt / row_tiles;
            const int64_t end_row = min_of(most_rows * (rt + 1) / row_tiles, run.rows);
            if (first_row >= end_row) continue;
            const int64_t first_panel = panels * ct / column_tiles, end_panel = panels * (ct + 1) / column_tiles;
            compute(PlanTile{step, run, first_row, end_row - first_row, first_panel, end_panel - first_panel});
        }
    }

    // Into how many tiles the panels of a step are split: as many for each member.
    int64_t column_tiles_of(const PlanStep& step) const {
        const int64_t panels = div_up(step.channels, kPanelColumns);
        const int64_t fitting = max_of(1, kTileColumns / (max_of(1, step.groups) * kPanelColumns));
        const int64_t shares = min_of(panels, members);
        if (attends_whole(step)) return batch.count < members ? shares : 1;
        return shares * div_up(div_up(panels, shares), fitting);
    }

    // The weights of a column tile of a step.
    PlanSpan weights_of(const PlanStep& step, int64_t tile) const {
        const int64_t panels = div_up(step.channels, kPanelColumns), tiles = column_tiles_of(step);
        const int64_t panel_bytes = step.groups * step.inner * kPanelColumns * 4;
        if (step.equal) return {static_cast<const char*>(plan.weights) + step.weight * 4, panel_bytes};
        const int64_t first = panels * tile / tiles, end = panels * (tile + 1) / tiles;
        return {static_cast<const char*>(plan.weights) + step.weight * 4 + first * panel_bytes,
                (end - first) * panel_bytes};
    }

    void compute(const PlanTile& tile) {
        if (tile.step.filter_size > 0) return compute_pairs(tile);
        finish(tile, [&](float* to, int64_t stride, int64_t columns) {
            if (tile.step.attention >= 0) {
                attend(*this, tile, plan.attentions[tile.step.attention], to, stride, columns);
            } else {
                multiply(*this, tile, to, stride, columns);
            }
        });
    }

    void compute_pairs(const PlanTile& tile) {
        const PairProducts pairs(*this, tile);
        for (int side = 0; side < 2; ++side) {
            PlanTile half = tile;
            half.run.column += side;
            finish(half, [&](float* to, int64_t stride, int64_t columns) {
                pairs.multiply(half, side, to, stride, columns);
            });
        }
    }

    // Attention to one tile of all channels, where rows are enough for all members: the more heads are read at once,
    // and no head's scores are computed twice.
    bool attends_whole(const PlanStep& step) const { return step.attention >= 0 && result_is_product(step); }

    // Whether the product need not be kept beside the result.
    bool result_is_product(const PlanStep& step) const {
        return step.num_instrs == 1 && plan.instrs[step.first_instr].op == PlanOp::acc && step.num_stores == 1 &&
               !step.equal;
    }

    // The step's program, and its stores. multiply(to, row stride, columns) computes the product.
    template <class Multiply>
    void finish(const PlanTile& tile, Multiply multiply) {
        const PlanStep& step = tile.step;
        const int64_t channels = tile.channels(), room = tile.room();
        const PlanInstr* program = plan.instrs + step.first_instr;
        const PlanStore* stores = plan.stores + step.first_store;
        const auto target = [&](const PlanStore& store) { return operand(tile, store.address, tile.first_channel()); };
        if (result_is_product(step)) {
            const PlanValue result = target(stores[0]);
            multiply(const_cast<float*>(result.p), result.row_stride, channels);
            return;
        }
        fetch_operands(tile);
        const int64_t columns = step.equal ? kPanelColumns : tile.columns();
        if (step.groups > 0) multiply(product, columns, columns);
        for (int64_t i = 0; i < step.num_instrs; ++i) {
            const PlanInstr& instr = program[i];
            if (instr.op == PlanOp::acc) {
                const int64_t panel_stride = step.equal ? 0 : step.groups * kPanelColumns;
                values[i] = {product + instr.a * kPanelColumns, columns, panel_stride};
            } else if (instr.op == PlanOp::constant) {
                values[i] = {plan.constants + instr.a * kPanelColumns, 0, 0};
            } else if (instr.op == PlanOp::load) {
                values[i] = operand(tile, instr.address, tile.first_channel());
            } else {
                PlanValue result{buffers + instr.buffer * kTileFloats, room, kPanelColumns};
                if (instr.store >= 0 && channels == room) result = target(stores[instr.store]);
                apply(instr.op, const_cast<float*>(result.p), result.row_stride, tile.rows, tile.panels,
                      values[instr.a], instr.b < 0 ? PlanValue{} : values[instr.b]);
                values[i] = result;
            }
        }
        for (int64_t i = 0; i < step.num_stores; ++i) {
            const PlanValue& value = values[stores[i].instr];
            const PlanValue result = target(stores[i]);
            if (value.p != result.p) write(value, const_cast<float*>(result.p), result.row_stride, tile.rows, channels);
        }
    }

    // What the program reads and writes arrives while the product is computed.
    void fetch_operands(const PlanTile& tile) const {
        const PlanStep& step = tile.step;
        const auto fetch = [&](int64_t address) {
            const PlanValue value = operand(tile, address, tile.first_channel());
            for (int64_t r = 0; r < tile.rows; ++r) {
                for (int64_t j = 0; j < tile.panels; ++j) {
                    __builtin_prefetch(value.p + r * value.row_stride + j * value.panel_stride, 0, 2);
                }
            }
        };
        for (int64_t i = step.first_instr; i < step.first_instr + step.num_instrs; ++i) {
            if (plan.instrs[i].op == PlanOp::load) fetch(plan.instrs[i].address);
        }
        for (int64_t i = step.first_store; i < step.first_store + step.num_stores; ++i) fetch(plan.stores[i].address);
    }

    PlanTeam& team_;
    int64_t num_active_ = 0;
    const PlanStep* following_ = nullptr;  // the step after the one at hand
    int64_t epoch_ = 0;                    // number of barriers passed
};

}  // namespace

void plan_worker(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, char* scratch,
                 int64_t row_begin, int64_t row_end) {
    Worker(plan, batch, team, member, scratch).run(row_begin, row_end);
}

}  // namespace fastgen::FASTGEN_ISA

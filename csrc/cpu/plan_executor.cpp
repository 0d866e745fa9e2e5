// fastgen: per-isa
// The worker of the plan executor: every thread of a team runs through the same time loop, does its share of each
// step's tiles, and meets the others at barriers where one step reads what another wrote. Which thread computes an
// element does not change its bits.
#include "plan_executor.h"

#include "../common/logistic_mixture.h"
#include "../common/philox.h"
#include "attention.h"
#include "tap_gemm.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kPanelColumns = kPlanPanel;
static_assert(kPanelColumns == kPanel<float>);

// An operand of the elementwise program: rows x panels of 16 floats.
struct Value {
    const float* p;
    int64_t row_stride, panel_stride;
};

static_assert(sizeof(Value) <= kScratchRecord && sizeof(Tap<float>) <= kScratchRecord);

// What the rows of one product are: columns first, first + cycle, ... of a row, for one sample or (uniform) for all, or
// one column for all samples.
struct Run {
    int64_t column, sample, rows;
    bool samples;
};

FASTGEN_INLINE Vec<float> each_lane(Vec<float> x, float (*f)(float)) {
    for (int i = 0; i < kLanes<float>; ++i) x[i] = f(x[i]);
    return x;
}
float sqrt_of(float x) { return __builtin_sqrtf(x); }

FASTGEN_INLINE Vec<float> expm1_of_minus_abs(Vec<float> x) {
    Vec<float> lack;
    exp_flushed(-abs(x), lack);
    return -lack;
}

// Above zero as e^x (1 - e^-x), which does not cancel.
FASTGEN_INLINE Vec<float> expm1(Vec<float> x) {
    const Vec<float> below = expm1_of_minus_abs(x);
    return where(x > Vec<float>{}, exp(x) * -below, below);
}

FASTGEN_INLINE Vec<float> positive_or(Vec<float> x, Vec<float> other) { return where(x > Vec<float>{}, x, other); }

template <class F>
FASTGEN_INLINE void map(float* dst, int64_t dst_row_stride, int64_t rows, int64_t panels, Value a, F f) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < panels; ++j) {
            const float* x = a.p + r * a.row_stride + j * a.panel_stride;
            float* out = dst + r * dst_row_stride + j * kPanelColumns;
            for (int v = 0; v < kPanelColumns; v += kLanes<float>) store(out + v, f(load(x + v)));
        }
    }
}

template <class F>
FASTGEN_INLINE void map(float* dst, int64_t dst_row_stride, int64_t rows, int64_t panels, Value a, Value b, F f) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < panels; ++j) {
            const float* x = a.p + r * a.row_stride + j * a.panel_stride;
            const float* y = b.p + r * b.row_stride + j * b.panel_stride;
            float* out = dst + r * dst_row_stride + j * kPanelColumns;
            for (int v = 0; v < kPanelColumns; v += kLanes<float>) store(out + v, f(load(x + v), load(y + v)));
        }
    }
}

using V = Vec<float>;

void apply(PlanOp op, float* dst, int64_t stride, int64_t rows, int64_t panels, Value a, Value b) {
    switch (op) {
        case PlanOp::copy:
            return map(dst, stride, rows, panels, a, [](V x) { return x; });
        case PlanOp::neg:
            return map(dst, stride, rows, panels, a, [](V x) { return -x; });
        case PlanOp::abs:
            return map(dst, stride, rows, panels, a, [](V x) { return abs(x); });
        case PlanOp::relu:
            return map(dst, stride, rows, panels, a, [](V x) { return max(V{}, x); });
        case PlanOp::elu:
            return map(dst, stride, rows, panels, a, [](V x) { return positive_or(x, expm1_of_minus_abs(x)); });
        case PlanOp::expm1_of_minus_abs:
            return map(dst, stride, rows, panels, a, [](V x) { return expm1_of_minus_abs(x); });
        case PlanOp::exp:
            return map(dst, stride, rows, panels, a, [](V x) { return exp(x); });
        case PlanOp::expm1:
            return map(dst, stride, rows, panels, a, [](V x) { return expm1(x); });
        case PlanOp::log:
            return map(dst, stride, rows, panels, a, [](V x) { return log(x); });
        case PlanOp::sqrt:
            return map(dst, stride, rows, panels, a, [](V x) { return each_lane(x, sqrt_of); });
        case PlanOp::erf:
            return map(dst, stride, rows, panels, a, [](V x) { return erf(x); });
        case PlanOp::tanh:
            return map(dst, stride, rows, panels, a, [](V x) { return tanh(x); });
        case PlanOp::sigmoid:
            return map(dst, stride, rows, panels, a, [](V x) { return sigmoid(x); });
        case PlanOp::add:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return x + y; });
        case PlanOp::sub:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return x - y; });
        case PlanOp::mul:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return x * y; });
        case PlanOp::div:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return x / y; });
        case PlanOp::max:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return max(x, y); });
        case PlanOp::min:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return min(x, y); });
        case PlanOp::positive_or:
            return map(dst, stride, rows, panels, a, b, [](V x, V y) { return positive_or(x, y); });
        case PlanOp::acc:
        case PlanOp::load:
        case PlanOp::constant:
            break;
    }
}

class Worker {
public:
    Worker(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, char* scratch)
        : plan_(plan), batch_(batch), team_(team), members_(team.size()), member_(member) {
        const PlanScratch sizes = plan_scratch(plan);
        char* next = scratch;
        const auto take = [&next](int64_t bytes) {
            char* p = next;
            next += bytes;
            return p;
        };
        product_ = reinterpret_cast<float*>(take(sizes.product));
        shared_ = reinterpret_cast<float*>(take(sizes.shared));
        filtered_ = reinterpret_cast<float*>(take(sizes.filtered));
        buffers_ = reinterpret_cast<float*>(take(sizes.buffers));
        rows_ = reinterpret_cast<float**>(take(sizes.rows));
        taps_ = take(sizes.taps);
        values_ = reinterpret_cast<Value*>(take(sizes.values));
        active_ = reinterpret_cast<int64_t*>(take(sizes.active));
        ran_ = reinterpret_cast<int64_t*>(take(sizes.ran));
        probabilities_ = reinterpret_cast<float*>(take(sizes.probabilities));
        scores_ = reinterpret_cast<float*>(take(sizes.scores));
        for (int64_t s = 0; s < plan.num_steps; ++s) ran_[s] = -1;
    }

    void run(int64_t row_begin, int64_t row_end) {
        for (y_ = row_begin; y_ < row_end; ++y_) {
            locate_rows(0, plan_.row_steps);
            for (int64_t i = 0; i < num_active_; ++i) {
                following_ = i + 1 < num_active_ ? &plan_.steps[active_[i + 1]] : nullptr;
                run_row_step(active_[i]);
            }
            wait();
            locate_rows(plan_.row_steps, plan_.num_steps);
            for (int64_t x = plan_.first_column; x < plan_.end_column; ++x) {
                run_pixel(x);
                if (members_ > 1 && team_.disbanded()) {
                    if (member_ != 0) return;
                    members_ = 1;
                }
            }
        }
    }

private:
    void wait() {
        if (members_ > 1) team_.wait(member_);
        ++epoch_;
    }

    // The steps among [begin, end) that have work in image row y_, and where their rows are.
    void locate_rows(int64_t begin, int64_t end) {
        num_active_ = 0;
        for (int64_t s = begin; s < end; ++s) {
            const PlanStep& step = plan_.steps[s];
            const int64_t row =
                frame_position(y_ - step.lag_y, step.stride_y, step.height, step.period_y, step.phase_y);
            if (row < 0) continue;
            active_[num_active_++] = s;
            for (int64_t i = step.first_address; i < step.first_address + step.num_addresses; ++i) {
                const PlanAddress& address = plan_.addresses[i];
                const PlanPlane& plane = plan_.planes[address.plane];
                const int64_t source = plane.broadcast ? 0 : div_down(row * address.num_y + address.dy, address.den_y);
                const bool inside = plane.broadcast || (source >= 0 && source < plane.height);
                rows_[i] = inside ? at(address.plane, source, 0) + address.channel : nullptr;
            }
        }
    }

    void run_pixel(int64_t x) {
        int64_t i = 0;
        for (int64_t d = 0; d < plan_.num_draws; ++d) {
            int64_t column = -1;
            for (i = next_in_pixel(i, x, &column); i < num_active_ && plan_.steps[active_[i]].rank == d;) {
                const int64_t here = i;
                const Run run{column, 0, batch_.count, true};
                i = next_in_pixel(i + 1, x, &column);
                following_ = i < num_active_ ? &plan_.steps[active_[i]] : nullptr;
                begin_step(active_[here]);
                run_tiles(plan_.steps[active_[here]], 1, [&](int64_t) { return run; }, batch_.count);
            }
            wait();
            if (y_ < 0 || x < 0 || x >= plan_.width) continue;
            draw(plan_.draws[d], x);
            if (members_ > 1 && member_ == 0) team_.decide();
            wait();
        }
    }

    // The first of the active steps, from `i` on, that has work at column x of the image, and the column of its frame.
    int64_t next_in_pixel(int64_t i, int64_t x, int64_t* column) const {
        for (; i < num_active_; ++i) {
            const PlanStep& step = plan_.steps[active_[i]];
            *column = frame_position(x - step.lag_x, step.stride_x, step.width, step.period_x, step.phase_x);
            if (*column >= 0) break;
        }
        return i;
    }

    void run_row_step(int64_t s) {
        const PlanStep& step = plan_.steps[s];
        begin_step(s);
        if (step.uniform) {
            const int64_t rows = step.width * batch_.count;
            return run_tiles(step, 1, [&](int64_t) { return Run{0, 0, rows, false}; }, rows);
        }
        // All samples of a column, if that makes the longer runs.
        const int64_t every = step.filter_size > 0 ? 2 : step.period_x;
        const int64_t columns = div_up(step.width - step.phase_x, every);
        const int64_t residues = step.cycle / every;
        if (batch_.count * residues >= columns) {
            const auto run_of = [&](int64_t i) { return Run{step.phase_x + i * every, 0, batch_.count, true}; };
            return run_tiles(step, columns, run_of, batch_.count);
        }
        // For each sample, the columns of each residue modulo the cycle that belong to the phase.
        const auto run_of = [&](int64_t i) {
            const int64_t column = step.phase_x + i % residues * every;
            return Run{column, i / residues, div_up(step.width - column, step.cycle), false};
        };
        run_tiles(step, residues * batch_.count, run_of, div_up(step.width - step.phase_x, step.cycle));
    }

    // Waits for the other members if the step reads what a step since the last barrier wrote.
    void begin_step(int64_t s) {
        const PlanStep& step = plan_.steps[s];
        for (int64_t i = step.first_source; i < step.first_source + step.num_sources; ++i) {
            if (ran_[plan_.sources[i]] == epoch_) {
                wait();
                break;
            }
        }
        ran_[s] = epoch_;
    }

    // Splits runs x rows x channels into tiles and does the tiles of this member. Channels are split between members
    // before rows, so that a thread always multiplies by the same part of the weights, which then stays in its cache.
    template <class RunOf>
    void run_tiles(const PlanStep& step, int64_t runs, RunOf run_of, int64_t most_rows) {
        if (most_rows <= 0) return;
        const int64_t panels = div_up(step.channels, kPanelColumns);
        const int64_t column_tiles = column_tiles_of(step);
        int64_t row_tiles = div_up(most_rows, kTileRows);
        if (attends_whole(step) && row_tiles < members_) row_tiles = most_rows < members_ ? most_rows : members_;
        const int64_t tiles = column_tiles * runs * row_tiles;
        int64_t loaded = -1;
        Run run{};
        for (int64_t i = tiles * member_ / members_, end = tiles * (member_ + 1) / members_; i < end; ++i) {
            hint_ = {};
            if (i + 1 < end && (i + 1) % (runs * row_tiles) == 0)
                hint_ = weights_of(step, (i + 1) / (runs * row_tiles));
            if (i + 1 == end && following_)
                hint_ = weights_of(*following_, column_tiles_of(*following_) * member_ / members_);
            const int64_t ct = i / (runs * row_tiles), r = i / row_tiles % runs, rt = i % row_tiles;
            if (r != loaded) run = run_of(loaded = r);
            const int64_t first_row = most_rows * rt / row_tiles;
            int64_t end_row = most_rows * (rt + 1) / row_tiles;
            if (end_row > run.rows) end_row = run.rows;
            if (first_row >= end_row) continue;
            const int64_t first_panel = panels * ct / column_tiles, end_panel = panels * (ct + 1) / column_tiles;
            compute(Tile{step, run, first_row, end_row - first_row, first_panel, end_panel - first_panel});
        }
    }

    // Of the weight of a step.
    static int64_t panels_of(const PlanStep& step) { return div_up(step.channels, kPanelColumns) * step.groups; }

    // Into how many tiles the panels of a step are split: as many for each member.
    int64_t column_tiles_of(const PlanStep& step) const {
        const int64_t panels = div_up(step.channels, kPanelColumns);
        const int64_t groups = step.groups > 0 ? step.groups : 1;
        const int64_t fitting = kTileColumns / (groups * kPanelColumns);
        const int64_t shares = panels < members_ ? panels : members_;
        if (attends_whole(step)) return batch_.count < members_ ? shares : 1;
        return shares * div_up(div_up(panels, shares), fitting > 0 ? fitting : 1);
    }

    struct Span {
        const void* first;
        int64_t bytes;
    };

    // The weights of a column tile of a step.
    Span weights_of(const PlanStep& step, int64_t tile) const {
        const int64_t panels = div_up(step.channels, kPanelColumns), tiles = column_tiles_of(step);
        const int64_t panel_bytes = step.groups * step.inner * kPanelColumns * 4;
        if (step.equal) return {static_cast<const char*>(plan_.weights) + step.weight * 4, panel_bytes};
        const int64_t first = panels * tile / tiles, end = panels * (tile + 1) / tiles;
        return {static_cast<const char*>(plan_.weights) + step.weight * 4 + first * panel_bytes,
                (end - first) * panel_bytes};
    }

    // Part of the work of a step: rows of a run, and panels of its channels.
    struct Tile {
        const PlanStep& step;
        Run run;
        int64_t first_row, rows, first_panel, panels;
        int64_t first_channel() const { return first_panel * kPanelColumns; }
        int64_t room() const { return panels * kPanelColumns; }
        int64_t channels() const {
            const int64_t left = step.channels - first_channel();
            return left < room() ? left : room();
        }
        int64_t columns() const { return room() * step.groups; }  // of the product
    };

    void compute(const Tile& tile) {
        if (tile.step.filter_size > 0) return compute_pair(tile);
        finish(tile, [&](float* product, int64_t stride, int64_t columns) {
            if (tile.step.attention >= 0) {
                attend(tile, plan_.attentions[tile.step.attention], product, stride, columns);
            } else {
                multiply(tile, product, stride, columns);
            }
        });
    }

    // Attention to one tile of all channels, where rows are enough for all members: the more heads are read at once,
    // and no head's scores are computed twice.
    bool attends_whole(const PlanStep& step) const { return step.attention >= 0 && result_is_product(step); }

    // Whether the product need not be kept beside the result.
    bool result_is_product(const PlanStep& step) const {
        return step.num_instrs == 1 && plan_.instrs[step.first_instr].op == PlanOp::acc && step.num_stores == 1 &&
               !step.equal;
    }

    // The step's program, and its stores. multiply(to, row stride, columns) computes the product.
    template <class Multiply>
    void finish(const Tile& tile, Multiply multiply) {
        const PlanStep& step = tile.step;
        const int64_t channels = tile.channels(), room = tile.room();
        const PlanInstr* program = plan_.instrs + step.first_instr;
        const PlanStore* stores = plan_.stores + step.first_store;
        const auto target = [&](const PlanStore& store) { return operand(tile, store.address, tile.first_channel()); };
        if (result_is_product(step)) {
            const Value result = target(stores[0]);
            multiply(const_cast<float*>(result.p), result.row_stride, channels);
            return;
        }
        fetch_operands(tile);
        const int64_t columns = step.equal ? kPanelColumns : tile.columns();
        if (step.groups > 0) multiply(product_, columns, columns);
        for (int64_t i = 0; i < step.num_instrs; ++i) {
            const PlanInstr& instr = program[i];
            if (instr.op == PlanOp::acc) {
                const int64_t panel_stride = step.equal ? 0 : step.groups * kPanelColumns;
                values_[i] = {product_ + instr.a * kPanelColumns, columns, panel_stride};
            } else if (instr.op == PlanOp::constant) {
                values_[i] = {plan_.constants + instr.a * kPanelColumns, 0, 0};
            } else if (instr.op == PlanOp::load) {
                values_[i] = operand(tile, instr.address, tile.first_channel());
            } else {
                Value result{buffers_ + instr.buffer * kTileFloats, room, kPanelColumns};
                if (instr.store >= 0 && channels == room) result = target(stores[instr.store]);
                apply(instr.op, const_cast<float*>(result.p), result.row_stride, tile.rows, tile.panels,
                      values_[instr.a], instr.b < 0 ? Value{} : values_[instr.b]);
                values_[i] = result;
            }
        }
        for (int64_t i = 0; i < step.num_stores; ++i) {
            const Value& value = values_[stores[i].instr];
            const Value result = target(stores[i]);
            if (value.p != result.p) write(value, const_cast<float*>(result.p), result.row_stride, tile.rows, channels);
        }
    }

    // The tile's channels of what attention gives for its rows; zeros in columns beyond.
    void attend(const Tile& tile, const PlanAttention& of, float* to, int64_t stride, int64_t columns) {
        const Value query = operand(tile, of.query, 0);
        const PlanPlane& keys = plan_.planes[of.keys];
        const int64_t num_keys = keys.height * keys.width;
        const float* floats = plan_.attention_floats + of.scale;
        const int64_t positions = tile.step.height * tile.step.width, pitch = plan_attention_pitch(num_keys);
        float factors[kPlanHeads];
        const int64_t first_channel = tile.first_channel(), end_channel = first_channel + tile.channels();
        for (int64_t r = 0; r < tile.rows; ++r) {
            const Place place = place_of(tile, tile.first_row + r);
            const int64_t position = row_of(tile.step) * tile.step.width + place.column;
            const int64_t* span = plan_.spans + of.spans + 2 * position;
            const Positions all_keys = all_positions(of.keys, of.keys_channel, place.sample);
            const Positions all_values = all_positions(of.values, of.values_channel, place.sample);
            for (int64_t c = first_channel; c < end_channel;) {
                const int64_t head = c / of.width, heads_end = (head + kPlanHeads) * of.width;
                const int64_t end = heads_end < end_channel ? heads_end : end_channel;
                const int heads = static_cast<int>(div_up(end, of.width) - head);
                const int64_t bias_stride = of.biases > 1 ? positions * num_keys : 0;
                const float* bias = nullptr;
                if (of.biases > 0) bias = floats + 1 + head * bias_stride + position * num_keys + span[0];
                Positions keys_here = all_keys, values_here = all_values;
                keys_here.first += head * of.depth;
                values_here.first += c;
                attention_scores(query.p + r * query.row_stride + head * of.depth, heads, of.depth, keys_here, span[0],
                                 span[1], floats[0], bias, bias_stride, scores_, pitch);
                for (int h = 0; h < heads; ++h) {
                    factors[h] = attention_weights(scores_ + h * pitch, span[1] - span[0]);
                }
                float* out = to + r * stride + c - first_channel;
                attention_sum(scores_, pitch, values_here, span[0], span[1], of.width, c, end, out);
                for (int64_t i = c; i < end; ++i) out[i - c] *= factors[i / of.width - head];
                c = end;
            }
            for (int64_t c = tile.channels(); c < columns; ++c) to[r * stride + c] = 0.0f;
        }
    }

    struct Place {
        int64_t column, sample;
    };

    // A row of a tile's run.
    Place place_of(const Tile& tile, int64_t row) const {
        if (tile.run.samples) return {tile.run.column, row};
        if (tile.step.uniform) return {row / batch_.count, row % batch_.count};
        return {tile.run.column + row * tile.step.cycle, tile.run.sample};
    }

    // The row of its frame that a step works on.
    int64_t row_of(const PlanStep& step) const { return (y_ - step.lag_y) / step.stride_y; }

    // Of a plane that has all its rows, from a channel on.
    Positions all_positions(int64_t index, int64_t channel, int64_t sample) const {
        const PlanPlane& plane = plan_.planes[index];
        const int64_t stride = plane.pitch * batch_.count;
        return {at(index, 0, 0) + sample * plane.pitch + channel, plane.width, stride,
                (plane.left + plane.width + plane.right) * stride};
    }

    // Both columns of each pair, by minimal filtering; the tile's run is of their first columns.
    void compute_pair(const Tile& tile) {
        static constexpr Sum kSums[2][4] = {{{1, 1, 0}, {0, 1, -1}, {1, 2, -1}},  // for filters of 2 and 3 taps
                                            {{1, 2, 1}, {2, 1, -1}, {0, 2, -1}, {1, 3, -1}}};
        const int size = static_cast<int>(tile.step.filter_size);
        const Sum* sums = kSums[size - 2];
        const int64_t columns = tile.columns();
        float* starts[2] = {shared_, shared_};  // what each side starts from
        filter(tile, 0, sums[0], bias_of(tile), starts[0], columns, columns);
        if (size == 3) {
            starts[1] += tile.rows * columns;
            filter(tile, 1, sums[1], {}, starts[1], columns, columns);
            for (int64_t i = 0; i < tile.rows * columns; i += kLanes<float>) {
                const V a = load(starts[0] + i), b = load(starts[1] + i);
                store(starts[0] + i, a + b);
                store(starts[1] + i, a - b);
            }
        }
        for (int side = 0; side < 2; ++side) {
            Tile half = tile;
            half.run.column += side;
            finish(half, [&](float* to, int64_t stride, int64_t count) {
                const int own = size - 1 + side;
                filter(tile, own, sums[own], {starts[side], columns, 0}, to, stride, count);
                add_others(half, to, stride, count);
            });
        }
    }

    // The data of a product: column a of the row plus (1) or minus (-1) column b, or (0) column a alone.
    struct Sum {
        int a, b, sign;
    };

    // to = start + product `index` of the filters, for the tile's pairs.
    void filter(const Tile& tile, int index, Sum sum, Value start, float* to, int64_t stride, int64_t columns) {
        const PlanStep& step = tile.step;
        Tap<float>* taps = reinterpret_cast<Tap<float>*>(taps_);
        const int64_t panel_stride = step.inner * kPanelColumns;
        const float* block =
            static_cast<const float*>(plan_.weights) + step.weight + index * panels_of(step) * panel_stride;
        const float* weight = block + tile.first_panel * step.groups * panel_stride;
        float* data = filtered_;
        int64_t num_taps = 0;
        for (const PlanTap *tap = plan_.taps + step.first_tap, *end = tap + step.num_filters; tap != end; ++tap) {
            if (rows_[tap->address] != nullptr) {
                const Value source = transform(tile, *tap, sum, data);
                taps[num_taps++] = {source.p, source.row_stride, 1, tap->count, weight};
                data += kTileRows * div_up(tap->count, kPanelColumns) * kPanelColumns;
            }
            weight += tap->count * kPanelColumns;
        }
        TapGemm<float> gemm = product<float>(tile, num_taps, panel_stride, start, to, stride, columns);
        if (index < step.filter_size) {
            gemm.next = block + (panels_of(step) + tile.first_panel * step.groups) * panel_stride;
            gemm.next_bytes = tile.panels * step.groups * panel_stride * static_cast<int64_t>(sizeof(float));
        }
        tap_gemm(gemm);
    }

    // The data that a product multiplies the weights of a filter by, written to `data` where it is a sum.
    Value transform(const Tile& tile, const PlanTap& tap, Sum sum, float* data) {
        const Value source = operand(tile, tap.address, 0);
        const int64_t pixel = batch_.count * plan_.planes[plan_.addresses[tap.address].plane].pitch;
        const float* a = source.p + sum.a * pixel;
        const float* b = source.p + sum.b * pixel;
        if (sum.sign == 0) return {a, source.row_stride, kPanelColumns};
        const int64_t pitch = div_up(tap.count, kPanelColumns) * kPanelColumns;
        const V sign = broadcast(static_cast<float>(sum.sign));
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t row = r * source.row_stride;
            for (int64_t c = 0; c < pitch; c += kLanes<float>) {
                store(data + r * pitch + c, fma(sign, load(b + row + c), load(a + row + c)));
            }
        }
        return {data, pitch, kPanelColumns};
    }

    // to += product of the taps that are of no filter.
    void add_others(const Tile& tile, float* to, int64_t stride, int64_t columns) {
        const PlanStep& step = tile.step;
        const int64_t first = step.first_tap + step.num_filters, end = step.first_tap + step.num_taps;
        int64_t inner = 0;
        for (int64_t i = first; i < end; ++i) inner += plan_.taps[i].count;
        if (inner == 0) return;
        const float* weight =
            static_cast<const float*>(plan_.weights) + step.weight +
            ((step.filter_size + 1) * panels_of(step) * step.inner + tile.first_panel * step.groups * inner) *
                kPanelColumns;
        const int64_t num_taps = collect<float, 1>(tile, first, end, weight);
        tap_gemm(product<float>(tile, num_taps, inner * kPanelColumns, {to, stride, 0}, to, stride, columns));
    }

    // What the program reads and writes arrives while the product is computed.
    void fetch_operands(const Tile& tile) const {
        const PlanStep& step = tile.step;
        const auto fetch = [&](int64_t address) {
            const Value value = operand(tile, address, tile.first_channel());
            for (int64_t r = 0; r < tile.rows; ++r) {
                for (int64_t j = 0; j < tile.panels; ++j) {
                    __builtin_prefetch(value.p + r * value.row_stride + j * value.panel_stride, 0, 2);
                }
            }
        };
        for (int64_t i = step.first_instr; i < step.first_instr + step.num_instrs; ++i) {
            if (plan_.instrs[i].op == PlanOp::load) fetch(plan_.instrs[i].address);
        }
        for (int64_t i = step.first_store; i < step.first_store + step.num_stores; ++i) fetch(plan_.stores[i].address);
    }

    // Where the rows of a tile are in a plane, from a channel of the address on.
    Value operand(const Tile& tile, int64_t address, int64_t channel) const {
        const Run& run = tile.run;
        const PlanAddress& source = plan_.addresses[address];
        const PlanPlane& plane = plan_.planes[source.plane];
        float* row = rows_[address];
        if (row == nullptr) return {kZeros, 0, 0};
        const int64_t pixel = batch_.count * plane.pitch;
        if (plane.broadcast) {
            const bool varies = run.samples && plane.per_sample;
            const int64_t stride = varies ? plane.pitch : 0;
            const int64_t sample = plane.per_sample ? run.sample * plane.pitch : 0;
            return {row + sample + tile.first_row * stride + channel, stride, kPanelColumns};
        }
        const int64_t column = div_down(run.column * source.num_x + source.dx, source.den_x);
        const int64_t stride =
            run.samples || tile.step.uniform ? plane.pitch : tile.step.cycle * source.num_x / source.den_x * pixel;
        const float* first = row + column * pixel + run.sample * plane.pitch;
        return {first + tile.first_row * stride + channel, stride, kPanelColumns};
    }

    // Whether a pixel step reads outside the plane, where all is zero.
    bool outside(const Tile& tile, int64_t address) const {
        if (rows_[address] == nullptr) return true;
        const PlanAddress& source = plan_.addresses[address];
        const PlanPlane& plane = plan_.planes[source.plane];
        if (tile.step.row_stage || plane.broadcast) return false;
        const int64_t column = div_down(tile.run.column * source.num_x + source.dx, source.den_x);
        return column < 0 || column >= plane.width;
    }

    void multiply(const Tile& tile, float* to, int64_t stride, int64_t columns) {
        if (plan_.bfloat16) {
            multiply_by<BFloat16Pair, 2>(tile, to, stride, columns);
        } else {
            multiply_by<float, 1>(tile, to, stride, columns);
        }
    }

    // W holds kDepth consecutive k of a column.
    template <class W, int64_t kDepth>
    void multiply_by(const Tile& tile, float* to, int64_t stride, int64_t columns) {
        const PlanStep& step = tile.step;
        const int64_t panel_stride = step.inner * kPanelColumns;
        const int64_t first_panel = step.equal ? 0 : tile.first_panel * step.groups;
        const W* weight = static_cast<const W*>(plan_.weights) + step.weight + first_panel * panel_stride;
        const int64_t num_taps = collect<W, kDepth>(tile, step.first_tap, step.first_tap + step.num_taps, weight);
        Value start{};
        if (step.init >= 0) {
            start = operand(tile, step.init, first_panel * kPanelColumns);
        } else {
            start = bias_of(tile);
        }
        tap_gemm(product<W>(tile, num_taps, panel_stride, start, to, stride, columns));
    }

    Value bias_of(const Tile& tile) const {
        if (tile.step.bias < 0 || tile.step.equal) return {};
        return {plan_.biases + tile.step.bias + tile.first_panel * tile.step.groups * kPanelColumns, 0, 0};
    }

    // Taps [first, end) with their weights, less those that read outside; returns their number.
    template <class W, int64_t kDepth>
    int64_t collect(const Tile& tile, int64_t first, int64_t end, const W* weight) {
        Tap<float, W>* taps = reinterpret_cast<Tap<float, W>*>(taps_);
        int64_t num_taps = 0;
        for (const PlanTap *tap = plan_.taps + first, *last = plan_.taps + end; tap != last; ++tap) {
            if (!outside(tile, tap->address)) {
                const Value a = operand(tile, tap->address, 0);
                taps[num_taps++] = {a.p, a.row_stride, 1, tap->count, weight};
            }
            weight += div_up(tap->count, kDepth) * kPanelColumns;
        }
        return num_taps;
    }

    template <class W>
    TapGemm<float, W> product(const Tile& tile, int64_t num_taps, int64_t panel_stride, Value start, float* to,
                              int64_t stride, int64_t columns) const {
        TapGemm<float, W> gemm{};
        gemm.taps = reinterpret_cast<const Tap<float, W>*>(taps_);
        gemm.num_taps = num_taps;
        gemm.b_panel_stride = panel_stride;
        gemm.b_k_stride = kPanelColumns;
        gemm.init = start.p;
        gemm.init_row_stride = start.row_stride;
        gemm.c = to;
        gemm.c_row_stride = stride;
        gemm.rows = tile.rows;
        gemm.cols = columns;
        gemm.next = hint_.first;
        gemm.next_bytes = hint_.bytes;
        return gemm;
    }

    static void write(const Value& value, float* result, int64_t pitch, int64_t rows, int64_t channels) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < channels; c += kLanes<float>) {
                const float* x =
                    value.p + r * value.row_stride + c / kPanelColumns * value.panel_stride + c % kPanelColumns;
                const int64_t n = channels - c < kLanes<float> ? channels - c : kLanes<float>;
                store_n(result + r * pitch + c, load(x), static_cast<int>(n));
            }
        }
    }

    // Samples are split between the members.
    void draw(const PlanDraw& source, int64_t x) {
        const PlanPlane& plane = plan_.planes[source.plane];
        const float* params = at(source.plane, y_, x) + source.channel;
        const int64_t pixels = plan_.height * plan_.width, position = y_ * plan_.width + x;
        for (int64_t n = batch_.count * member_ / members_; n < batch_.count * (member_ + 1) / members_; ++n) {
            const float* own = params + n * plane.pitch;
            if (batch_.params) {
                float* copy = batch_.params + (n * batch_.num_params + source.channel) * pixels + position;
                for (int64_t k = 0; k < source.count; ++k) copy[k * pixels] = own[k];
            }
            int32_t* levels = batch_.levels + (n * plan_.colours + source.first_colour) * pixels + position;
            int32_t drawn[kMaxJointColours];
            if (batch_.mask && batch_.mask[n * pixels + position]) {
                const int32_t* known = batch_.known + (levels - batch_.levels);
                for (int64_t c = 0; c < source.num_colours; ++c) drawn[c] = known[c * pixels];
            } else {
                draw_levels(source, own, n, position, drawn);
            }
            for (int64_t c = 0; c < source.num_colours; ++c) {
                levels[c * pixels] = drawn[c];
                encode(source.first_colour + c, drawn[c], n, x);
            }
        }
    }

    void draw_levels(const PlanDraw& source, const float* params, int64_t n, int64_t position, int32_t* drawn) {
        uint32_t bits[4];
        const auto uniform = [&](int64_t i) {
            if (i == source.first_uniform || i % 4 == 0) {
                philox_draw(batch_.seed, static_cast<uint32_t>(i / 4), static_cast<uint32_t>(position),
                            batch_.start + static_cast<uint64_t>(n), bits);
            }
            return philox_uniform(bits[i % 4]);
        };
        if (plan_.head == PlanHead::logistic_mixture) {
            float uniforms[1 + kMaxJointColours];
            for (int64_t i = 0; i < source.num_uniforms; ++i) uniforms[i] = uniform(source.first_uniform + i);
            logistic_mixture_draw(params, plan_.components, source.num_colours, plan_.num_levels, uniforms,
                                  batch_.inverse_temperature, plan_.levels, drawn);
            return;
        }
        drawn[0] = static_cast<int32_t>(invert(params, source.count, uniform(source.first_uniform)));
    }

    void encode(int64_t colour, int32_t level, int64_t n, int64_t x) {
        for (const PlanEncoding *e = plan_.encodings, *end = e + plan_.num_encodings; e != end; ++e) {
            if (e->colour != colour) continue;
            float* to = at(e->plane, y_, x) + n * plan_.planes[e->plane].pitch + e->channel;
            const float* from = plan_.tables + e->offset + level * e->count;
            for (int64_t c = 0; c < e->count; ++c) to[c] = from[c];
        }
    }

    // The smallest level whose cumulative probability is at least u.
    int64_t invert(const float* params, int64_t count, float u) {
        if (plan_.head == PlanHead::bernoulli) {
            const double odds = __builtin_exp(-__builtin_fabs(params[0] * batch_.inverse_temperature));
            return (params[0] < 0 ? 1.0 : odds) / (1.0 + odds) < u;
        }
        float* e = probabilities_;
        float top = params[0];
        for (int64_t k = 1; k < count; ++k) top = params[k] > top ? params[k] : top;
        const V scale = broadcast(static_cast<float>(batch_.inverse_temperature)), shift = broadcast(top);
        for (int64_t k = 0; k < count; k += kLanes<float>) {
            const int64_t n = count - k < kLanes<float> ? count - k : kLanes<float>;
            store_n(e + k, exp((load_n(params + k, static_cast<int>(n)) - shift) * scale), static_cast<int>(n));
        }
        double total = 0;
        for (int64_t k = 0; k < count; ++k) total += e[k];
        const double target = u * total;
        double sum = 0;
        for (int64_t k = 0; k < count - 1; ++k) {
            sum += e[k];
            if (sum >= target) return k;
        }
        return count - 1;
    }

    float* at(int64_t index, int64_t row, int64_t column) const {
        const PlanPlane& plane = plan_.planes[index];
        const int64_t pixel = mod(row, plane.rows) * (plane.left + plane.width + plane.right) + plane.left + column;
        return batch_.workspace + (plane.offset + pixel * plane.pitch) * batch_.count;
    }

    alignas(64) static constexpr float kZeros[kTileColumns + kPanelColumns] = {};

    const PlanTables& plan_;
    const PlanBatch& batch_;
    PlanTeam& team_;
    int64_t members_;  // 1 once the team has disbanded
    const int member_;
    float* product_;        // tile of the product
    float* shared_;         // two such tiles, of what a pair of outputs shares
    float* filtered_;       // data of the filters of a tile, transformed
    float* buffers_;        // tiles of the program's results
    float** rows_;          // column 0 of the row of each address, for the steps located last; null outside the plane
    char* taps_;            // of the tile at hand
    Value* values_;         // of the program at hand
    int64_t* active_;       // steps that have work in this row
    int64_t* ran_;          // epoch in which each step ran last
    float* probabilities_;  // of the levels
    float* scores_;         // of the keys of some heads
    int64_t num_active_ = 0;
    const PlanStep* following_ = nullptr;  // the step after the one at hand
    Span hint_{};                          // weights that this thread needs after the tile at hand
    int64_t epoch_ = 0;                    // number of barriers passed
    int64_t y_ = 0;
};

}  // namespace

void plan_worker(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, char* scratch,
                 int64_t row_begin, int64_t row_end) {
    Worker(plan, batch, team, member, scratch).run(row_begin, row_end);
}

}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
// The worker of the plan executor: every thread of a team runs through the same time loop, does its share of each
// step's tiles, and meets the others at barriers where one step reads what another wrote. Which thread computes an
// element does not change its bits.
#include "plan_executor.h"

#include "../common/philox.h"
#include "tap_gemm.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kPanelColumns = kPlanPanel;
static_assert(kPanelColumns == kPanel<float>);

FASTGEN_INLINE int64_t mod(int64_t a, int64_t n) {
    const int64_t r = a % n;
    return r < 0 ? r + n : r;
}

FASTGEN_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An operand of the elementwise program: rows x panels of 16 floats.
struct Value {
    const float* p;
    int64_t row_stride, panel_stride;
};
static_assert(sizeof(Value) <= kAddressFloats * sizeof(float) && sizeof(Tap<float>) <= kAddressFloats * sizeof(float));

FASTGEN_INLINE Vec<float> each_lane(Vec<float> x, float (*f)(float)) {
    for (int i = 0; i < kLanes<float>; ++i) x[i] = f(x[i]);
    return x;
}
float log_of(float x) { return __builtin_logf(x); }
float sqrt_of(float x) { return __builtin_sqrtf(x); }

// e^x - 1 = 2 t / (1 - t), t = tanh(x / 2): accurate near zero, where exp(x) - 1 cancels.
FASTGEN_INLINE Vec<float> expm1(Vec<float> x) {
    const Vec<float> one = broadcast(1.0f);
    const Vec<float> t = tanh(x * broadcast(0.5f));
    return where(x > one, exp(x) - one, (t + t) / (one - t));
}

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
        case PlanOp::exp:
            return map(dst, stride, rows, panels, a, [](V x) { return exp(x); });
        case PlanOp::expm1:
            return map(dst, stride, rows, panels, a, [](V x) { return expm1(x); });
        case PlanOp::log:
            return map(dst, stride, rows, panels, a, [](V x) { return each_lane(x, log_of); });
        case PlanOp::sqrt:
            return map(dst, stride, rows, panels, a, [](V x) { return each_lane(x, sqrt_of); });
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
        case PlanOp::acc:
        case PlanOp::load:
        case PlanOp::constant:
            break;
    }
}

class Worker {
public:
    Worker(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, float* scratch)
        : plan_(plan),
          batch_(batch),
          team_(team),
          members_(team.size()),
          member_(member),
          product_(scratch),
          buffers_(scratch + plan_product_floats(plan)) {
        float* rest = buffers_ + plan.buffers * kTileFloats;
        taps_ = reinterpret_cast<Tap<float>*>(rest);
        tile_taps_ = taps_ + plan.max_taps;
        values_ = reinterpret_cast<Value*>(tile_taps_ + plan.max_taps);
    }

    void run(int64_t row_begin, int64_t row_end) {
        for (y_ = row_begin; y_ < row_end; ++y_) {
            clear_rows_below();
            run_steps(0, plan_.row_steps, 0);
            wait();
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
    }

    // Rows under the bottom of a plane are zero; only planes that are computed ahead of the image get there.
    void clear_rows_below() {
        bool any = false;
        for (int64_t s = 0; s < plan_.num_steps; ++s) {
            const PlanStep& step = plan_.steps[s];
            const PlanPlane& plane = plan_.planes[step.out];
            const int64_t row = y_ - step.lag_y;
            if (row < plane.height) continue;
            any = true;
            if (member_ != 0) continue;
            float* p = at(step.out, row, 0) + step.out_channel;
            for (int64_t i = 0; i < plane.width * batch_.count; ++i, p += plane.pitch) {
                for (int64_t c = 0; c < step.width; ++c) p[c] = 0;
            }
        }
        if (any) wait();
    }

    void run_pixel(int64_t x) {
        int64_t s = plan_.row_steps;
        for (int64_t colour = 0; colour < plan_.colours; ++colour) {
            const int64_t begin = s;
            while (s < plan_.num_steps && plan_.steps[s].rank == colour) ++s;
            run_steps(begin, s, x);
            wait();
            if (y_ < 0 || x < 0 || x >= plan_.width) continue;
            draw(colour, x);
            if (members_ > 1 && member_ == 0) team_.decide();
            wait();
        }
    }

    void run_steps(int64_t begin, int64_t end, int64_t x) {
        for (int64_t s = begin; s < end; ++s) {
            const PlanStep& step = plan_.steps[s];
            if (step.barrier) wait();
            const PlanPlane& out = plan_.planes[step.out];
            const int64_t row = y_ - step.lag_y, column = step.row_stage ? 0 : x - step.lag_x;
            if (row < 0 || row >= out.height || column < 0 || column >= out.width) continue;
            run_step(step, row, column, step.row_stage ? out.width * batch_.count : batch_.count);
        }
    }

    // Splits rows x channels into tiles and does the tiles of this member. Channels are split between members before
    // rows, so that a thread always multiplies by the same part of the weights, which then stays in its cache.
    void run_step(const PlanStep& step, int64_t row, int64_t column, int64_t rows) {
        const int64_t panels = div_up(step.width, kPanelColumns);
        const float* weight = plan_.weights + step.weight;
        for (int64_t t = 0; t < step.num_taps; ++t) {
            const PlanTap& tap = plan_.taps[step.first_tap + t];
            taps_[t] = {at(tap.read, row, column), plan_.planes[tap.read.plane].pitch, 1, tap.count, weight};
            weight += tap.count * kPanelColumns;
        }
        const int64_t groups = step.groups > 0 ? step.groups : 1;
        const int64_t widest = kTileColumns / (groups * kPanelColumns);
        int64_t column_tiles = div_up(panels, widest > 0 ? widest : 1);
        if (!step.row_stage && column_tiles < members_) column_tiles = panels < members_ ? panels : members_;
        const int64_t row_tiles = div_up(rows, kTileRows);
        const int64_t tiles = column_tiles * row_tiles;
        for (int64_t i = tiles * member_ / members_, end = tiles * (member_ + 1) / members_; i < end; ++i) {
            // Row steps walk the rows last: a thread owns whole rows. Pixel steps walk them first: a thread owns
            // columns.
            const int64_t ct = step.row_stage ? i % column_tiles : i / row_tiles;
            const int64_t rt = step.row_stage ? i / column_tiles : i % row_tiles;
            const int64_t first_row = rows * rt / row_tiles, end_row = rows * (rt + 1) / row_tiles;
            const int64_t first_panel = panels * ct / column_tiles, end_panel = panels * (ct + 1) / column_tiles;
            tile(step, row, column, first_row, end_row - first_row, first_panel, end_panel - first_panel);
        }
    }

    void tile(const PlanStep& step, int64_t row, int64_t column, int64_t first_row, int64_t rows, int64_t first_panel,
              int64_t panels) {
        const PlanPlane& out = plan_.planes[step.out];
        const int64_t first_channel = first_panel * kPanelColumns;
        const int64_t channels =
            step.width - first_channel < panels * kPanelColumns ? step.width - first_channel : panels * kPanelColumns;
        float* result = at(step.out, row, column) + first_row * out.pitch + step.out_channel + first_channel;
        const PlanInstr* program = plan_.instrs + step.first_instr;
        const bool direct =
            step.num_instrs == 1 && program[0].op == PlanOp::acc;  // one group: the product is the result

        float* product = direct ? result : product_;
        const int64_t product_columns = panels * step.groups * kPanelColumns;
        if (step.groups > 0) {
            multiply(step, row, column, first_row, rows, first_panel, product, direct ? out.pitch : product_columns,
                     direct ? channels : product_columns);
        }
        if (direct) return;

        for (int64_t i = 0; i < step.num_instrs; ++i) {
            const PlanInstr& instr = program[i];
            const bool last = i == step.num_instrs - 1;
            float* buffer = buffers_ + instr.buffer * kTileFloats;
            int64_t stride = panels * kPanelColumns;
            if (instr.op == PlanOp::acc) {
                values_[i] = {product + instr.a * kPanelColumns, product_columns, step.groups * kPanelColumns};
            } else if (instr.op == PlanOp::constant) {
                values_[i] = {plan_.constants + instr.a * kPanelColumns, 0, 0};
            } else if (instr.op == PlanOp::load) {
                values_[i] = operand(step, instr.read, row, column, first_row, rows, first_panel, panels, buffer);
            } else {
                if (last && channels == panels * kPanelColumns) {
                    buffer = result;
                    stride = out.pitch;
                }
                apply(instr.op, buffer, stride, rows, panels, values_[instr.a],
                      instr.b < 0 ? Value{} : values_[instr.b]);
                values_[i] = {buffer, stride, kPanelColumns};
            }
        }
        const Value& value = values_[step.num_instrs - 1];
        if (value.p != result) write(value, result, out.pitch, rows, channels);
    }

    void multiply(const PlanStep& step, int64_t row, int64_t column, int64_t first_row, int64_t rows,
                  int64_t first_panel, float* product, int64_t product_stride, int64_t columns) {
        const int64_t panel_stride = step.inner * kPanelColumns;
        const int64_t first_column = first_panel * step.groups * kPanelColumns;
        for (int64_t t = 0; t < step.num_taps; ++t) {
            tile_taps_[t] = taps_[t];
            tile_taps_[t].a += first_row * taps_[t].row_stride;
            tile_taps_[t].b += first_panel * step.groups * panel_stride;
        }
        TapGemm<float> gemm{};
        gemm.taps = tile_taps_;
        gemm.num_taps = static_cast<int>(step.num_taps);
        gemm.b_panel_stride = panel_stride;
        gemm.b_k_stride = kPanelColumns;
        if (step.init >= 0) {
            gemm.init_row_stride = plan_.planes[step.init].pitch;
            gemm.init = at(step.init, row, column) + first_row * gemm.init_row_stride + first_column;
        } else if (step.bias >= 0) {
            gemm.init = plan_.biases + step.bias + first_column;
        }
        gemm.c = product;
        gemm.c_row_stride = product_stride;
        gemm.rows = rows;
        gemm.cols = columns;
        tap_gemm(gemm);
    }

    // Where an operand lies in its plane; the rows of a row step walk through all samples of a pixel, which a plane
    // that is the same at every pixel has only once, so its values are copied.
    Value operand(const PlanStep& step, const PlanRead& read, int64_t row, int64_t column, int64_t first_row,
                  int64_t rows, int64_t first_panel, int64_t panels, float* buffer) {
        const PlanPlane& plane = plan_.planes[read.plane];
        const float* p = at(read, row, column) + first_panel * kPanelColumns;
        if (!plane.broadcast) return {p + first_row * plane.pitch, plane.pitch, kPanelColumns};
        if (!plane.per_sample) return {p, 0, kPanelColumns};
        if (!step.row_stage) return {p + first_row * plane.pitch, plane.pitch, kPanelColumns};
        const int64_t floats = panels * kPanelColumns;
        for (int64_t r = 0; r < rows; ++r) {
            const float* sample = p + (first_row + r) % batch_.count * plane.pitch;
            for (int64_t c = 0; c < floats; c += kLanes<float>) store(buffer + r * floats + c, load(sample + c));
        }
        return {buffer, floats, kPanelColumns};
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
    void draw(int64_t colour, int64_t x) {
        const PlanDraw& source = plan_.draws[colour];
        const PlanPlane& plane = plan_.planes[source.plane];
        const PlanPlane& image = plan_.planes[plan_.image];
        const float* params = at(source.plane, y_, x) + source.channel;
        float* input = at(plan_.image, y_, x) + colour;
        const int64_t pixels = plan_.height * plan_.width, position = y_ * plan_.width + x;
        for (int64_t n = batch_.count * member_ / members_; n < batch_.count * (member_ + 1) / members_; ++n) {
            const int64_t element = (n * plan_.colours + colour) * pixels + position;
            int64_t level;
            if (batch_.mask && batch_.mask[n * pixels + position]) {
                level = batch_.known[element];
            } else {
                uint32_t bits[4];
                philox_draw(batch_.seed, static_cast<uint32_t>(colour / 4), static_cast<uint32_t>(position),
                            batch_.start + static_cast<uint64_t>(n), bits);
                level = invert(params + n * plane.pitch, source.count, philox_uniform(bits[colour % 4]));
            }
            batch_.levels[element] = static_cast<uint8_t>(level);
            input[n * image.pitch] = plan_.encoding[level];
        }
    }

    // The smallest level whose cumulative probability is at least u.
    int64_t invert(const float* params, int64_t count, float u) {
        const double t = batch_.inverse_temperature;
        if (plan_.head == PlanHead::bernoulli) {
            const double odds = __builtin_exp(-__builtin_fabs(params[0] * t));
            return (params[0] < 0 ? 1.0 : odds) / (1.0 + odds) < u;
        }
        float e[256];
        float top = params[0];
        for (int64_t k = 1; k < count; ++k) top = params[k] > top ? params[k] : top;
        const V scale = broadcast(batch_.inverse_temperature), shift = broadcast(top);
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

    const float* at(const PlanRead& read, int64_t row, int64_t column) const {
        if (plan_.planes[read.plane].broadcast) return at(read.plane, 0, 0) + read.channel;
        return at(read.plane, row + read.dy, column + read.dx) + read.channel;
    }

    const PlanTables& plan_;
    const PlanBatch& batch_;
    PlanTeam& team_;
    int64_t members_;  // 1 once the team has disbanded
    const int member_;
    float* const product_;   // tile of the product
    float* const buffers_;   // tiles of the program's results
    Tap<float>* taps_;       // of the step at hand, at its first row and column
    Tap<float>* tile_taps_;  // of the tile at hand
    Value* values_;          // of the program at hand
    int64_t y_ = 0;
};

}  // namespace

void plan_worker(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, float* scratch,
                 int64_t row_begin, int64_t row_end) {
    Worker(plan, batch, team, member, scratch).run(row_begin, row_end);
}

}  // namespace fastgen::FASTGEN_ISA

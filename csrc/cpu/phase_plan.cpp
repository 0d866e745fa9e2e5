#include "phase_plan.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace fastgen {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::min();
constexpr int64_t kTransformCycles = 64;   // of one tile of minimal filtering, for a vector of channels in or out
constexpr int64_t kWeightCycles = 8;       // in which a vector of weights comes from memory
constexpr int64_t kAddCycles = 3;          // of a slice of overlap-add
constexpr int64_t kMaxOverlapPanels = 32;  // of overlap-add: its products are kept in the second-level cache
constexpr int64_t kMaxCells = 8;           // phases side by side come from up to this many positions

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

struct Slot {
    int64_t base;
    std::vector<int64_t> offsets, kernel;
    std::vector<AxisSpan> spans;
};

struct Axis {
    int64_t in_step, out_step, phases;
    std::vector<Slot> slots;
};

class AxisBuilder {
public:
    AxisBuilder(const ConvAxis& axis, bool transposed) : axis_(axis), transposed_(transposed) {}

    Axis phase_by_phase() const {
        const int64_t step = transposed_ ? axis_.stride : 1;
        Axis result{in_step(step), step, 1, {}};
        for (int64_t phase = 0; phase < step; ++phase) result.slots.push_back(slot(phase, step, 1));
        return result;
    }

    // All outputs side by side, of a single position.
    Axis at_once() const {
        const int64_t step = axis_.out_size;
        return {in_step(step), step, step, {slot(0, step, step)}};
    }

    // All outputs of `cells` positions side by side, with the base that reads least.
    Axis side_by_side(int64_t cells) const {
        const int64_t step = cells * (transposed_ ? axis_.stride : 1);
        Axis best{in_step(step), step, step, {}};
        for (int64_t shift = 0; shift < step; ++shift) {
            Slot candidate = slot(-shift, step, step);
            if (best.slots.empty() || work(candidate) < work(best.slots[0])) best.slots.assign(1, candidate);
        }
        return best;
    }

    static int64_t work(const Slot& slot) {
        int64_t sum = 0;
        for (const AxisSpan& span : slot.spans) sum += (span.last - span.first) * (span.tap_end - span.tap_begin);
        return sum;
    }

    static int64_t work(const Axis& axis) {
        int64_t sum = 0;
        for (const Slot& slot : axis.slots) sum += work(slot);
        return sum;
    }

private:
    int64_t in_step(int64_t out_step) const { return transposed_ ? out_step / axis_.stride : out_step * axis_.stride; }

    int64_t source(int64_t y, int64_t k) const {
        if (!transposed_) return y * axis_.stride - axis_.padding + k * axis_.dilation;
        const int64_t at = y + axis_.padding - k * axis_.dilation;
        return at % axis_.stride == 0 ? at / axis_.stride : kNone;
    }

    Slot slot(int64_t base, int64_t step, int64_t phases) const {
        struct Tap {
            int64_t offset, phase, kernel;
        };
        std::vector<Tap> taps;
        taps.reserve(phases * axis_.kernel);
        for (int64_t phase = 0; phase < phases; ++phase) {
            for (int64_t k = 0; k < axis_.kernel; ++k) {
                const int64_t at = source(base + phase, k);
                if (at != kNone) taps.push_back({at, phase, k});
            }
        }
        std::sort(taps.begin(), taps.end(), [](const Tap& a, const Tap& b) { return a.offset < b.offset; });
        Slot result{base, {}, {}, {}};
        for (const Tap& tap : taps) {
            if (result.offsets.empty() || result.offsets.back() != tap.offset) {
                result.offsets.push_back(tap.offset);
                result.kernel.resize(result.kernel.size() + phases, -1);
            }
            *(result.kernel.end() - phases + tap.phase) = tap.kernel;
        }
        add_spans(result, first_cell(base, step, phases), floor_div(axis_.out_size - 1 - base, step) + 1,
                  in_step(step));
        drop_unread(result, phases);
        return result;
    }

    // Taps that lie outside the image for every cell, as most do on the smallest maps, need no weights.
    static void drop_unread(Slot& slot, int64_t phases) {
        int64_t begin = slot.offsets.size(), end = 0;
        for (const AxisSpan& span : slot.spans) {
            if (span.tap_begin == span.tap_end) continue;
            begin = std::min(begin, span.tap_begin);
            end = std::max(end, span.tap_end);
        }
        begin = std::min(begin, end);
        slot.offsets = {slot.offsets.begin() + begin, slot.offsets.begin() + end};
        slot.kernel = {slot.kernel.begin() + begin * phases, slot.kernel.begin() + end * phases};
        for (AxisSpan& span : slot.spans) {
            span.tap_begin = std::clamp(span.tap_begin - begin, int64_t{0}, end - begin);
            span.tap_end = std::clamp(span.tap_end - begin, span.tap_begin, end - begin);
        }
    }

    // The first cell one of whose outputs exists.
    static int64_t first_cell(int64_t base, int64_t step, int64_t phases) {
        return -floor_div(base + phases - 1, step);
    }

    void add_spans(Slot& slot, int64_t first, int64_t last, int64_t in_step) const {
        const auto& offsets = slot.offsets;
        for (int64_t cell = first, next; cell < last; cell = next) {
            const auto begin = std::lower_bound(offsets.begin(), offsets.end(), -cell * in_step);
            const auto end = std::lower_bound(begin, offsets.end(), axis_.in_size - cell * in_step);
            next = last;  // the first cell that reads another tap, or one less
            if (begin != offsets.begin()) next = std::min(next, -floor_div(begin[-1], in_step));
            if (end != begin) next = std::min(next, -floor_div(end[-1] - axis_.in_size, in_step));
            slot.spans.push_back({cell, next, begin - offsets.begin(), end - offsets.begin()});
        }
    }

    ConvAxis axis_;
    bool transposed_;
};

// Whether one cell has all outputs of an axis, and its only input.
bool is_point(const ConvAxis& axis) { return axis.in_size == 1 && axis.out_size % axis.stride == 0; }

// Whether a single pixel becomes all outputs.
bool is_pixel(const ConvShape& shape) { return shape.transposed && is_point(shape.y) && is_point(shape.x); }

std::vector<Axis> candidates(const ConvShape& shape, const ConvAxis& axis, int64_t lanes) {
    const AxisBuilder builder(axis, shape.transposed);
    if (is_pixel(shape)) return {builder.at_once()};
    std::vector<Axis> result{builder.phase_by_phase()};
    const int64_t stride = shape.transposed ? axis.stride : 1;
    for (int64_t cells = stride > 1 ? 1 : 2; cells <= kMaxCells; ++cells) {
        // Wider products gain nothing, and smaller images have no such cells.
        if (cells * stride * shape.out_channels > 2 * lanes || cells * stride > axis.out_size) break;
        result.push_back(builder.side_by_side(cells));
    }
    return result;
}

// Whether each output of a single pixel has a kernel element of its own, in whole panels.
bool spreads_pixels(const ConvShape& shape, int64_t lanes) {
    const auto spreads = [](const ConvAxis& axis) {
        return axis.padding == 0 && axis.dilation == 1 && axis.kernel % axis.stride == 0 &&
               axis.out_size == (axis.in_size - 1) * axis.stride + axis.kernel;
    };
    return shape.transposed && spreads(shape.y) && spreads(shape.x) && shape.out_channels % lanes == 0;
}

struct Owner {
    Axis y, x;
    std::vector<AxisSlot> y_slots, x_slots;
    ConvPlan plan;
};

AxisPlan view(const ConvAxis& axis, const Axis& built, std::vector<AxisSlot>& slots) {
    for (const Slot& slot : built.slots) {
        slots.push_back({slot.base, static_cast<int64_t>(slot.offsets.size()), slot.offsets.data(), slot.kernel.data(),
                         slot.spans.data(), static_cast<int64_t>(slot.spans.size())});
    }
    return {axis.in_size,
            axis.out_size,
            built.in_step,
            built.out_step,
            built.phases,
            slots.data(),
            static_cast<int64_t>(slots.size())};
}

bool is_filter(const AxisSlot& slot, int64_t in_step) {
    if (slot.taps != 2 * in_step && slot.taps != 3 * in_step) return false;
    return slot.offsets[slot.taps - 1] - slot.offsets[0] == slot.taps - 1;
}

int64_t direct_products(const AxisSlot& slot) {
    int64_t sum = 0;
    for (int64_t i = 0; i < slot.num_spans; ++i) {
        const AxisSpan& span = slot.spans[i];
        sum += (span.last - span.first) * (span.tap_end - span.tap_begin);
    }
    return sum;
}

// Processor cycles for one image, roughly: a vector multiply-add in each, unless the weights come later than that.
int64_t cost(const ConvPlan& plan, const ConvElement& element) {
    const int64_t lanes = element.lanes;
    const int64_t columns = plan.y.phases * plan.x.phases * plan.out_channels;
    const int64_t outputs = (columns + lanes - 1) / lanes, inputs = (plan.in_channels + lanes - 1) / lanes;
    int64_t products = 0, weights = 0;
    for (int64_t i = 0; i < plan.y.num_slots * plan.x.num_slots; ++i) {
        const AxisSlot &sy = plan.y.slots[i / plan.x.num_slots], &sx = plan.x.slots[i % plan.x.num_slots];
        if (!is_minimal(plan, sy, sx)) {
            products += direct_products(sy) * direct_products(sx) * plan.in_channels * outputs;
            weights += sy.taps * sx.taps;
            continue;
        }
        const int64_t filters = interleaved_filters(plan), taps = sy.taps / plan.y.in_step;
        const AxisTiles y{0, last_cell(sy) - first_cell(sy), taps}, x{0, last_cell(sx) - first_cell(sx), taps};
        products += y.products() * x.products() * filters * plan.in_channels * outputs;
        products += y.count() * x.count() * (filters * inputs + outputs) * kTransformCycles;
        const int64_t points = (y.full() ? kPoints : kPoints - 1) * (x.full() ? kPoints : kPoints - 1);
        weights += (element.sums_filters && taps == 2 ? taps * taps : points) * filters;
    }
    return std::max(products, weights * plan.in_channels * outputs * kWeightCycles);
}

OverlapAxis overlap_axis(const ConvAxis& axis, bool transposed) {
    if (transposed) return {axis.kernel, axis.stride, axis.padding, false};
    return {axis.kernel, axis.stride, axis.kernel - 1 - axis.padding, true};
}

bool may_overlap(const ConvShape& shape, const ConvPlan& plan, int64_t lanes) {
    const auto allows = [&](const ConvAxis& axis, const OverlapAxis& overlap) {
        return axis.dilation == 1 && (shape.transposed || axis.stride == 1) && overlap.padding >= 0 &&
               overlap.kernel <= kMaxOverlapKernel;
    };
    const OverlapAxis &y = plan.overlap_y, &x = plan.overlap_x;
    return shape.groups == 1 && allows(shape.y, y) && allows(shape.x, x) &&
           y.kernel * x.slices() * x.stride * shape.out_channels <= kMaxOverlapPanels * lanes;
}

// As `cost`.
int64_t overlap_cost(const ConvPlan& plan, int64_t lanes) {
    const OverlapAxis &y = plan.overlap_y, &x = plan.overlap_x;
    const int64_t run = x.stride * plan.out_channels, columns = y.kernel * x.slices() * run;
    const int64_t weights = plan.in_channels * ((columns + lanes - 1) / lanes);
    const int64_t runs = plan.y.out_size * (plan.x.in_size + x.slices()) * ((run + lanes - 1) / lanes);
    return weights * std::max(plan.y.in_size * plan.x.in_size, kWeightCycles) +
           runs * y.slices() * x.slices() * kAddCycles;
}

}  // namespace

bool is_minimal(const ConvPlan& plan, const AxisSlot& y, const AxisSlot& x) {
    return plan.minimal && y.taps * plan.x.in_step == x.taps * plan.y.in_step && is_filter(y, plan.y.in_step) &&
           is_filter(x, plan.x.in_step);
}

std::shared_ptr<const ConvPlan> make_conv_plan(const ConvShape& shape, const ConvElement& element) {
    const int64_t lanes = element.lanes;
    const auto owner = std::make_shared<Owner>();
    if (element.by_channel && !shape.transposed && shape.groups > 1 && shape.in_channels * shape.out_channels == 1) {
        owner->plan = {};
        owner->plan.groups = shape.groups;
        owner->plan.depthwise = true;
        owner->plan.depthwise_y = shape.y;
        owner->plan.depthwise_x = shape.x;
        return {owner, &owner->plan};
    }
    int64_t least = std::numeric_limits<int64_t>::max();
    const auto x_candidates = candidates(shape, shape.x, lanes);
    for (const Axis& y : candidates(shape, shape.y, lanes)) {
        for (const Axis& x : x_candidates) {
            const int64_t columns = y.phases * x.phases * shape.out_channels;
            const int64_t vectors = (columns + lanes - 1) / lanes;
            const int64_t work = AxisBuilder::work(y) * AxisBuilder::work(x) * vectors;
            if (work < least) {
                least = work;
                owner->y = y;
                owner->x = x;
            }
        }
    }
    owner->plan = {shape.groups,
                   shape.in_channels,
                   shape.out_channels,
                   view(shape.y, owner->y, owner->y_slots),
                   view(shape.x, owner->x, owner->x_slots),
                   false,
                   false,
                   0,
                   overlap_axis(shape.y, shape.transposed),
                   overlap_axis(shape.x, shape.transposed),
                   false,
                   {},
                   {}};
    ConvPlan minimal = owner->plan;
    minimal.minimal = shape.minimal && minimal.y.phases * minimal.x.phases == 1;
    int64_t least_cost = cost(owner->plan, element);
    if (const int64_t with_minimal = cost(minimal, element); with_minimal < least_cost) {
        least_cost = with_minimal;
        owner->plan = minimal;
    }
    if (may_overlap(shape, owner->plan, lanes) && overlap_cost(owner->plan, lanes) < least_cost) {
        owner->plan.minimal = false;
        owner->plan.overlap_add = true;
    }
    const bool by_phases = owner->y.phases * owner->x.phases == 1;
    if ((by_phases || is_pixel(shape)) && spreads_pixels(shape, lanes) && !owner->plan.minimal &&
        !owner->plan.overlap_add)
        owner->plan.element_row = shape.x.kernel;
    return {owner, &owner->plan};
}

}  // namespace fastgen

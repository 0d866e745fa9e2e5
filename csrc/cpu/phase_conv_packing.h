// The weights of convolutions by phases, packed as phase_conv_products.h and phase_conv_winograd.h read them.
//
// Slot by slot, panel by panel, tap by tap [in_channels][kPanel], where a column is an output channel of a phase; or, where
// the plan says so, by kernel elements that all slots share. For minimal filtering, the points of the filters, each with
// all of its panels, or the filters as FilterLines, from which products make the points themselves.
#pragma once

#include "conv_products.h"
#include "minimal_filter.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class E>
struct PhaseWeights {
    using T = SumOf<E>;

    static constexpr int64_t kPackChannels = 16;  // packed together

    const ConvPlan& plan;

    FASTGEN_INLINE int64_t phases() const { return plan.y.phases * plan.x.phases; }
    FASTGEN_INLINE int64_t columns() const { return phases() * plan.out_channels; }
    FASTGEN_INLINE int64_t panels() const { return panels_of<T>(columns()); }
    FASTGEN_INLINE int64_t slots() const { return plan.y.num_slots * plan.x.num_slots; }
    FASTGEN_INLINE int64_t depth() const {
        return interleaved_filters(plan) * plan.in_channels;
    }  // of a point's product

    FASTGEN_INLINE bool packs_points(const AxisSlot& sy, const AxisSlot& sx) const {
        return is_minimal(plan, sy, sx) && !(kConvElement<E>.sums_filters && sy.taps == 2 * plan.y.in_step);
    }

    // Of the packed weights of a pair of slots.
    FASTGEN_INLINE int64_t panel_stride(const AxisSlot& sy, const AxisSlot& sx) const {
        return plan.element_row ? slice() : panel_size(sy, sx);
    }
    FASTGEN_INLINE int64_t tap_offset(const AxisSlot& sy, const AxisSlot& sx, int64_t ty, int64_t tx) const {
        if (!plan.element_row || phases() > 1) return (ty * sx.taps + tx) * slice();
        return (sy.kernel[ty] * plan.element_row + sx.kernel[tx]) * panels() * slice();
    }
    FASTGEN_INLINE int64_t slice() const { return plan.in_channels * kPanel<T>; }  // of a tap in a panel

    // Elements of one panel of the packed weights of a pair of slots.
    FASTGEN_INLINE int64_t panel_size(const AxisSlot& sy, const AxisSlot& sx) const {
        const int64_t slices = packs_points(sy, sx) ? kPoints * kPoints * interleaved_filters(plan) : sy.taps * sx.taps;
        return slices * slice();
    }

    // Where the packed weights of a pair of slots start.
    int64_t packed_offset(int64_t group, int64_t slot) const {
        int64_t sum = 0, offset = 0;
        for (int64_t s = 0; s < slots(); ++s) {
            if (s == slot && !plan.element_row) offset = sum;
            sum += panels() * panel_size(plan.y.slots[s / plan.x.num_slots], plan.x.slots[s % plan.x.num_slots]);
        }
        return slot == slots() ? sum * plan.groups : group * sum + offset;
    }

    int64_t packed_size() const { return packed_offset(0, slots()); }

    // A few channels of a panel at a time, for all slots: they read the same cache lines.
    void pack(const ConvWeight<E>& weight, E* packed, int64_t threads) const {
        const int64_t blocks = ceil_div(plan.in_channels, kPackChannels);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t unit = 0; unit < plan.groups * panels() * blocks; ++unit) {
            const int64_t group = unit / blocks / panels(), panel = unit / blocks % panels(), block = unit % blocks;
            const Packing part{weight, group, panel, block * kPackChannels,
                               min_of(plan.in_channels, (block + 1) * kPackChannels)};
            for (int64_t slot = 0; slot < slots(); ++slot) {
                const AxisSlot& sy = plan.y.slots[slot / plan.x.num_slots];
                const AxisSlot& sx = plan.x.slots[slot % plan.x.num_slots];
                E* to = packed + packed_offset(group, slot);
                if (packs_points(sy, sx))
                    pack_points(part, sy, sx, to);
                else if (is_minimal(plan, sy, sx))
                    pack_lines(part, sy, sx, to + panel * panel_stride(sy, sx));
                else
                    pack_panel(part, sy, sx, to + panel * panel_stride(sy, sx));
            }
        }
    }

    // Input channels first..last-1 of a panel.
    struct Packing {
        const ConvWeight<E>& weight;
        int64_t group, panel, first, last;
    };

    // The weights of a tap for the columns of a panel: channel 0, or null where a column does not read the tap.
    struct Columns {
        const E* from[kPanel<T>];

        Columns(const PhaseWeights& all, const Packing& part, const AxisSlot& sy, const AxisSlot& sx, int64_t tap) {
            for (int64_t j = 0; j < kPanel<T>; ++j)
                from[j] = all.first_weight(part.weight, part.group, sy, sx, tap, part.panel, j);
        }
        FASTGEN_INLINE E at(int64_t j, int64_t offset) const { return from[j] ? from[j][offset] : E{}; }
    };

    // As FilterLines; those of the next interleaved filter follow.
    void pack_lines(const Packing& part, const AxisSlot& sy, const AxisSlot& sx, E* to) const {
        if constexpr (kConvElement<E>.sums_filters) {
            for (int64_t f = 0; f < interleaved_filters(plan); ++f, to += plan.in_channels * kFilterLines * kPanel<T>) {
                for (int64_t t = 0; t < kFilterLines; ++t) {
                    const Columns columns(*this, part, sy, sx, filter_tap(sx, f, t / 2, t % 2));
                    for (int64_t c = part.first; c < part.last; ++c) {
                        for (int64_t j = 0; j < kPanel<T>; ++j)
                            to[filter_line_at(c, t, j)] = columns.at(j, c * part.weight.in_channel);
                    }
                }
            }
        }
    }

    // The tap of element (y, x) of an interleaved filter.
    FASTGEN_INLINE int64_t filter_tap(const AxisSlot& sx, int64_t filter, int64_t y, int64_t x) const {
        const int64_t steps = plan.x.in_step;
        return (y * plan.y.in_step + filter / steps) * sx.taps + x * steps + filter % steps;
    }

    // For minimal filtering the points come one after the other, each with all of its panels.
    void pack_points(const Packing& part, const AxisSlot& sy, const AxisSlot& sx, E* to) const {
        const int64_t taps = sy.taps / plan.y.in_step;
        for (int64_t f = 0; f < interleaved_filters(plan); ++f) {
            // Of a few channels all taps, before the next ones: in double, so that the points are rounded once.
            double filters[9][kPackChannels * kPanel<T>];
            for (int64_t t = 0; t < taps * taps; ++t) {
                const Columns columns(*this, part, sy, sx, filter_tap(sx, f, t / taps, t % taps));
                for (int64_t c = part.first; c < part.last; ++c) {
                    for (int64_t j = 0; j < kPanel<T>; ++j)
                        filters[t][(c - part.first) * kPanel<T> + j] =
                            to_double(columns.at(j, c * part.weight.in_channel));
                }
            }
            for (int64_t c = part.first; c < part.last; ++c) {
                const double* filter = &filters[0][(c - part.first) * kPanel<T>];
                E* lines = to + part.panel * depth() * kPanel<T>;
                if (taps == 3)
                    point_lines<3>(filter, lines, f * plan.in_channels + c);
                else
                    point_lines<2>(filter, lines, f * plan.in_channels + c);
            }
        }
    }

    // The points of one channel's filters, whose taps are kPackChannels * kPanel elements apart.
    template <int kTaps>
    void point_lines(const double* filter, E* to, int64_t channel) const {
        constexpr int64_t kTap = kPackChannels * kPanel<T>, kVec = kLanes<double>;
        const int64_t point = panels() * depth() * kPanel<T>;
        for (int64_t j = 0; j < kPanel<T>; j += kVec) {
            Vec<double> taps[kTaps * kTaps], rows[kPoints * kTaps], points[kPoints * kPoints];
            for (int64_t t = 0; t < kTaps * kTaps; ++t) taps[t] = load(filter + t * kTap + j);
            for (int64_t t = 0; t < kTaps; ++t) filter_points(kTaps, taps + t, kTaps, rows + t, kTaps);
            for (int64_t p = 0; p < kPoints; ++p) filter_points(kTaps, rows + p * kTaps, 1, points + p * kPoints, 1);
            for (int64_t p = 0; p < kPoints * kPoints; ++p) {
                for (int64_t l = 0; l < kVec; ++l)
                    to[p * point + Products<E>::weight_at(channel, j + l)] = Products<E>::rounded(points[p][l]);
            }
        }
    }

    void pack_panel(const Packing& part, const AxisSlot& sy, const AxisSlot& sx, E* to) const {
        for (int64_t tap = 0; tap < sy.taps * sx.taps; ++tap) {
            const Columns columns(*this, part, sy, sx, tap);
            E* slice = to + tap_offset(sy, sx, tap / sx.taps, tap % sx.taps);
            for (int64_t c = part.first; c < part.last; ++c) {
                for (int64_t j = 0; j < kPanel<T>; ++j)
                    slice[Products<E>::weight_at(c, j)] = columns.at(j, c * part.weight.in_channel);
            }
        }
    }

    // The weight of input channel 0 for column j of a panel, through a tap.
    const E* first_weight(const ConvWeight<E>& weight, int64_t group, const AxisSlot& sy, const AxisSlot& sx,
                          int64_t tap, int64_t panel, int64_t j) const {
        const int64_t column = panel * kPanel<T> + j;
        if (column >= columns()) return nullptr;
        const int64_t phase = column / plan.out_channels, o = column % plan.out_channels;
        const int64_t ky = sy.kernel[tap / sx.taps * plan.y.phases + phase / plan.x.phases];
        const int64_t kx = sx.kernel[tap % sx.taps * plan.x.phases + phase % plan.x.phases];
        if (ky < 0 || kx < 0) return nullptr;
        return weight.data + group * weight.group + o * weight.out_channel + ky * weight.kernel_y +
               kx * weight.kernel_x;
    }
};

}  // namespace
}  // namespace fastgen::FASTGEN_ISA

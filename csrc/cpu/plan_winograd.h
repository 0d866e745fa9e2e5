// Linear steps by minimal filtering along the row (fastgen/sampling/executors/winograd.py): neighbouring columns from
// products that they share, and one of each.
#pragma once

#include "plan_linear.h"

namespace fastgen::FASTGEN_ISA {
namespace {

// The data of a product: column a of the row plus (1) or minus (-1) column b, or (0) column a alone.
struct ColumnSum {
    int a, b, sign;
};

// Those of the products of a filter of 2 and of 3 taps: the shared ones, then that of either side.
constexpr ColumnSum kColumnSums[2][4] = {{{1, 1, 0}, {0, 1, -1}, {1, 2, -1}},
                                         {{1, 2, 1}, {2, 1, -1}, {0, 2, -1}, {1, 3, -1}}};

// The data that a product multiplies the weights of a filter by, written to `data` where it is a sum.
inline PlanValue column_sum(const PlanThread& thread, const PlanTile& tile, const PlanTap& tap, ColumnSum sum,
                            float* data) {
    const PlanValue source = thread.operand(tile, tap.address, 0);
    const int64_t pixel = thread.batch.count * thread.plan.planes[thread.plan.addresses[tap.address].plane].pitch;
    const float* a = source.p + sum.a * pixel;
    const float* b = source.p + sum.b * pixel;
    if (sum.sign == 0) return {a, source.row_stride, kPanelColumns};
    const int64_t pitch = div_up(tap.count, kPanelColumns) * kPanelColumns;
    const Vec<float> sign = broadcast(static_cast<float>(sum.sign));
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t row = r * source.row_stride;
        for (int64_t c = 0; c < pitch; c += kLanes<float>) {
            store(data + r * pitch + c, fma(sign, load(b + row + c), load(a + row + c)));
        }
    }
    return {data, pitch, kPanelColumns};
}

// to = start + product `index` of the filters, for the tile's pairs.
inline void filter(const PlanThread& thread, const PlanTile& tile, int index, PlanValue start, float* to,
                   int64_t stride, int64_t columns) {
    const PlanStep& step = tile.step;
    Tap<float>* taps = reinterpret_cast<Tap<float>*>(thread.taps);
    const ColumnSum sum = kColumnSums[step.filter_size - 2][index];
    const int64_t panel_stride = step.inner * kPanelColumns, panels = div_up(step.channels, kPanelColumns);
    const float* block =
        static_cast<const float*>(thread.plan.weights) + step.weight + index * panels * step.groups * panel_stride;
    const float* weight = block + tile.first_panel * step.groups * panel_stride;
    float* data = thread.filtered;
    int64_t num_taps = 0;
    for (const PlanTap *tap = thread.plan.taps + step.first_tap, *end = tap + step.num_filters; tap != end; ++tap) {
        if (thread.rows[tap->address] != nullptr) {
            const PlanValue source = column_sum(thread, tile, *tap, sum, data);
            taps[num_taps++] = {source.p, source.row_stride, 1, tap->count, weight};
            data += kTileRows * div_up(tap->count, kPanelColumns) * kPanelColumns;
        }
        weight += tap->count * kPanelColumns;
    }
    TapGemm<float> gemm = product<float>(thread, tile, num_taps, panel_stride, start, to, stride, columns);
    if (index < step.filter_size) {
        gemm.next = block + (panels + tile.first_panel) * step.groups * panel_stride;
        gemm.next_bytes = tile.panels * step.groups * panel_stride * static_cast<int64_t>(sizeof(float));
    }
    tap_gemm(gemm);
}

// to += product of the taps that are of no filter.
inline void add_others(const PlanThread& thread, const PlanTile& tile, float* to, int64_t stride, int64_t columns) {
    const PlanStep& step = tile.step;
    const int64_t first = step.first_tap + step.num_filters, end = step.first_tap + step.num_taps;
    int64_t inner = 0;
    for (int64_t i = first; i < end; ++i) inner += thread.plan.taps[i].count;
    if (inner == 0) return;
    const int64_t filters = (step.filter_size + 1) * div_up(step.channels, kPanelColumns) * step.inner;
    const float* weight = static_cast<const float*>(thread.plan.weights) + step.weight +
                          (filters + tile.first_panel * inner) * step.groups * kPanelColumns;
    const int64_t num_taps = list_taps<float>(thread, tile, first, end, weight);
    tap_gemm(product<float>(thread, tile, num_taps, inner * kPanelColumns, {to, stride, 0}, to, stride, columns));
}

// Both columns of each of a tile's pairs, whose run is of the first ones.
class PairProducts {
public:
    // Computes what they share: the sums that the product of either side starts from.
    PairProducts(const PlanThread& thread, const PlanTile& tile) : thread_(thread), tile_(tile) {
        const int64_t columns = tile.columns();
        filter(thread, tile, 0, bias_of(thread, tile), starts_[0], columns, columns);
        if (tile.step.filter_size != 3) return;
        starts_[1] += tile.rows * columns;
        filter(thread, tile, 1, {}, starts_[1], columns, columns);
        for (int64_t i = 0; i < tile.rows * columns; i += kLanes<float>) {
            const Vec<float> a = load(starts_[0] + i), b = load(starts_[1] + i);
            store(starts_[0] + i, a + b);
            store(starts_[1] + i, a - b);
        }
    }

    // to = the product of one side; `half` is the tile of its columns.
    void multiply(const PlanTile& half, int side, float* to, int64_t stride, int64_t columns) const {
        const int own = static_cast<int>(tile_.step.filter_size) - 1 + side;
        filter(thread_, tile_, own, {starts_[side], tile_.columns(), 0}, to, stride, columns);
        add_others(thread_, half, to, stride, columns);
    }

private:
    const PlanThread& thread_;
    const PlanTile& tile_;
    float* starts_[2] = {thread_.shared, thread_.shared};
};

}  // namespace
}  // namespace fastgen::FASTGEN_ISA

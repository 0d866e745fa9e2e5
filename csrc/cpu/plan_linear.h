// The products of a plan's linear steps: what a tile reads, tap by tap, times the step's weights, on the tap-GEMM.
#pragma once

#include <type_traits>

#include "plan_thread.h"

namespace fastgen::FASTGEN_ISA {
namespace {

inline PlanValue bias_of(const PlanThread& thread, const PlanTile& tile) {
    if (tile.step.bias < 0 || tile.step.equal) return {};
    return {thread.plan.biases + tile.step.bias + tile.first_panel * tile.step.groups * kPanelColumns, 0, 0};
}

// Elements of a packed panel that a tap of so many channels has.
template <class W>
constexpr int64_t packed_elements(int64_t count) {
    if constexpr (std::is_same_v<W, ScaledInt8>) return kPowersBytes + count * kPanelColumns;
    return (std::is_same_v<W, BFloat16Pair> ? div_up(count, 2) : count) * kPanelColumns;
}

// Lists the taps [first, end) with their weights, less those that read outside; returns their number.
template <class W>
int64_t list_taps(const PlanThread& thread, const PlanTile& tile, int64_t first, int64_t end, const W* weight) {
    Tap<float, W>* taps = reinterpret_cast<Tap<float, W>*>(thread.taps);
    int64_t num_taps = 0;
    for (const PlanTap *tap = thread.plan.taps + first, *last = thread.plan.taps + end; tap != last; ++tap) {
        if (!thread.outside(tile, tap->address)) {
            const PlanValue a = thread.operand(tile, tap->address, 0);
            taps[num_taps++] = {a.p, a.row_stride, 1, tap->count, weight};
        }
        weight += packed_elements<W>(tap->count);
    }
    return num_taps;
}

// to = start + product of the taps in the thread's list.
template <class W>
TapGemm<float, W> product(const PlanThread& thread, const PlanTile& tile, int64_t num_taps, int64_t panel_stride,
                          PlanValue start, float* to, int64_t stride, int64_t columns) {
    TapGemm<float, W> gemm{};
    gemm.taps = reinterpret_cast<const Tap<float, W>*>(thread.taps);
    gemm.num_taps = num_taps;
    gemm.b_panel_stride = panel_stride;
    gemm.b_k_stride = kPanelColumns;
    gemm.init = start.p;
    gemm.init_row_stride = start.row_stride;
    gemm.c = to;
    gemm.c_row_stride = stride;
    gemm.rows = tile.rows;
    gemm.cols = columns;
    gemm.next = thread.next_weights.first;
    gemm.next_bytes = thread.next_weights.bytes;
    return gemm;
}

template <class W>
void multiply_by(const PlanThread& thread, const PlanTile& tile, float* to, int64_t stride, int64_t columns) {
    const PlanStep& step = tile.step;
    const int64_t panel_words = step.inner * kPanelColumns;
    const int64_t panel_stride = panel_words * static_cast<int64_t>(sizeof(float) / sizeof(W));
    const int64_t first_panel = step.equal ? 0 : tile.first_panel * step.groups;
    const auto* words = static_cast<const float*>(thread.plan.weights) + step.weight + first_panel * panel_words;
    const W* weight = reinterpret_cast<const W*>(words);
    const int64_t num_taps = list_taps<W>(thread, tile, step.first_tap, step.first_tap + step.num_taps, weight);
    PlanValue start{};
    if (step.init >= 0) {
        start = thread.operand(tile, step.init, first_panel * kPanelColumns);
    } else {
        start = bias_of(thread, tile);
    }
    tap_gemm(product<W>(thread, tile, num_taps, panel_stride, start, to, stride, columns));
}

inline void multiply(const PlanThread& thread, const PlanTile& tile, float* to, int64_t stride, int64_t columns) {
    switch (tile.step.packing) {
        case PlanPacking::floats:
            return multiply_by<float>(thread, tile, to, stride, columns);
        case PlanPacking::bfloat16:
            return multiply_by<BFloat16Pair>(thread, tile, to, stride, columns);
        case PlanPacking::int8:
            return multiply_by<ScaledInt8>(thread, tile, to, stride, columns);
    }
}

}  // namespace
}  // namespace fastgen::FASTGEN_ISA

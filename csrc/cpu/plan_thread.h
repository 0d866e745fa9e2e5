// What a thread of the plan executor works with: the tile at hand, its scratch memory, and where in memory rows of planes
// are.
#pragma once

#include "integers.h"
#include "plan_executor.h"
#include "tap_gemm.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kPanelColumns = kPlanPanel;
static_assert(kPanelColumns == kPanel<float>);

// An operand: rows x panels of 16 floats.
struct PlanValue {
    const float* p;
    int64_t row_stride, panel_stride;
};

static_assert(sizeof(PlanValue) <= kScratchRecord && sizeof(Tap<float>) <= kScratchRecord);

alignas(64) constexpr float kPlanZeros[kTileColumns + kPanelColumns] = {};  // outside planes

// What the rows of one product are: columns first, first + cycle, ... of a row, for one sample or (uniform) for all, or
// one column for all samples.
struct PlanRun {
    int64_t column, sample, rows;
    bool samples;
};

// Part of the work of a step: rows of a run, and panels of its channels.
struct PlanTile {
    const PlanStep& step;
    PlanRun run;
    int64_t first_row, rows, first_panel, panels;
    int64_t first_channel() const { return first_panel * kPanelColumns; }
    int64_t room() const { return panels * kPanelColumns; }
    int64_t channels() const { return min_of(step.channels - first_channel(), room()); }
    int64_t columns() const { return room() * step.groups; }  // of the product
};

struct PlanSpan {
    const void* first;
    int64_t bytes;
};

// A thread of a team, in an image row.
struct PlanThread {
    PlanThread(const PlanTables& plan, const PlanBatch& batch, int members, int member, char* scratch)
        : plan(plan), batch(batch), members(members), member(member) {
        const PlanScratch sizes = plan_scratch(plan);
        char* next = scratch;
        const auto take = [&next](int64_t bytes) {
            char* p = next;
            next += bytes;
            return p;
        };
        product = reinterpret_cast<float*>(take(sizes.product));
        shared = reinterpret_cast<float*>(take(sizes.shared));
        filtered = reinterpret_cast<float*>(take(sizes.filtered));
        buffers = reinterpret_cast<float*>(take(sizes.buffers));
        rows = reinterpret_cast<float**>(take(sizes.rows));
        taps = take(sizes.taps);
        values = reinterpret_cast<PlanValue*>(take(sizes.values));
        active = reinterpret_cast<int64_t*>(take(sizes.active));
        ran = reinterpret_cast<int64_t*>(take(sizes.ran));
        probabilities = reinterpret_cast<float*>(take(sizes.probabilities));
        guided = reinterpret_cast<float*>(take(sizes.guided));
        scores = reinterpret_cast<float*>(take(sizes.scores));
    }

    // Floats from a column of a plane to the next, and from a sample to the next.
    int64_t column_stride(const PlanPlane& plane) const {
        switch (plane.layout) {
            case PlanLayout::together:
                return batch.count * plane.pitch;
            case PlanLayout::moment:
                return 0;
            default:
                return plane.pitch;
        }
    }
    int64_t sample_stride(const PlanPlane& plane) const {
        switch (plane.layout) {
            case PlanLayout::apart:
                return plane.rows * (plane.left + plane.width + plane.right) * plane.pitch;
            case PlanLayout::shared:
                return 0;
            default:
                return plane.pitch;
        }
    }

    // For the first sample. Shared planes are read only.
    float* at(int64_t index, int64_t row, int64_t column) const {
        const PlanPlane& plane = plan.planes[index];
        const int64_t pixel = mod(row, plane.rows) * (plane.left + plane.width + plane.right) + plane.left + column;
        float* first = plane.layout == PlanLayout::shared ? const_cast<float*>(plan.shared) + plane.offset
                                                          : batch.workspace + plane.offset * batch.count;
        return first + pixel * column_stride(plane);
    }

    // Where the rows of a tile are in a plane, from a channel of the address on.
    PlanValue operand(const PlanTile& tile, int64_t address, int64_t channel) const {
        const PlanRun& run = tile.run;
        const PlanAddress& source = plan.addresses[address];
        const PlanPlane& plane = plan.planes[source.plane];
        float* row = rows[address];
        if (row == nullptr) return {kPlanZeros, 0, 0};
        const int64_t pixel = column_stride(plane), per_sample = sample_stride(plane);
        if (plane.broadcast) {
            const int64_t stride = run.samples ? per_sample : 0;
            return {row + run.sample * per_sample + tile.first_row * stride + channel, stride, kPanelColumns};
        }
        const int64_t column = div_down(run.column * source.num_x + source.dx, source.den_x);
        const int64_t stride =
            run.samples || tile.step.uniform ? per_sample : tile.step.cycle * source.num_x / source.den_x * pixel;
        const float* first = row + column * pixel + run.sample * per_sample;
        return {first + tile.first_row * stride + channel, stride, kPanelColumns};
    }

    // Whether a pixel step reads outside the plane, where all is zero.
    bool outside(const PlanTile& tile, int64_t address) const {
        if (rows[address] == nullptr) return true;
        const PlanAddress& source = plan.addresses[address];
        const PlanPlane& plane = plan.planes[source.plane];
        if (tile.step.row_stage || plane.broadcast) return false;
        const int64_t column = div_down(tile.run.column * source.num_x + source.dx, source.den_x);
        return column < 0 || column >= plane.width;
    }

    const PlanTables& plan;
    const PlanBatch& batch;
    int64_t members;  // of the team; once it has disbanded 1, and 0 for those who have nothing to do any more
    const int member;
    float* product;           // tile of the product
    float* shared;            // two such tiles, of what a pair of outputs shares
    float* filtered;          // data of the filters of a tile, transformed
    float* buffers;           // tiles of the program's results
    float** rows;             // column 0 of the row of each address, for the steps located last; null outside the plane
    char* taps;               // of the tile at hand
    PlanValue* values;        // of the program at hand
    int64_t* active;          // steps that have work in this row
    int64_t* ran;             // epoch in which each step ran last
    float* probabilities;     // of the levels, and as much room
    float* guided;            // logits of the levels
    float* scores;            // of the keys of some heads
    PlanSpan next_weights{};  // that this thread needs after the tile at hand
    int64_t y = 0;            // the image row
};

}  // namespace
}  // namespace fastgen::FASTGEN_ISA

// The attention steps of a plan: where the queries, keys and values of a tile's rows are, for attention.h to compute with.
#pragma once

#include "attention.h"
#include "plan_thread.h"

namespace fastgen::FASTGEN_ISA {
namespace {

struct PlanPlace {
    int64_t column, sample;
};

// A row of a tile's run.
inline PlanPlace place_of(const PlanThread& thread, const PlanTile& tile, int64_t row) {
    if (tile.run.samples) return {tile.run.column, row};
    if (tile.step.uniform) return {row / thread.batch.count, row % thread.batch.count};
    return {tile.run.column + row * tile.step.cycle, tile.run.sample};
}

// The row of its frame that a step works on.
inline int64_t row_of(const PlanThread& thread, const PlanStep& step) {
    return (thread.y - step.lag_y) / step.stride_y;
}

// Of a plane that has all its rows, from a channel on.
inline Positions all_positions(const PlanThread& thread, int64_t index, int64_t channel, int64_t sample) {
    const PlanPlane& plane = thread.plan.planes[index];
    const int64_t stride = thread.column_stride(plane);
    return {thread.at(index, 0, 0) + sample * thread.sample_stride(plane) + channel, plane.width, stride,
            (plane.left + plane.width + plane.right) * stride};
}

// The tile's channels of what attention gives for its rows; zeros in columns beyond.
inline void attend(const PlanThread& thread, const PlanTile& tile, const PlanAttention& of, float* to, int64_t stride,
                   int64_t columns) {
    const PlanValue query = thread.operand(tile, of.query, 0);
    const PlanPlane& keys = thread.plan.planes[of.keys];
    const int64_t num_keys = keys.height * keys.width;
    const float* floats = thread.plan.attention_floats + of.scale;
    const int64_t positions = tile.step.height * tile.step.width, pitch = plan_attention_pitch(num_keys);
    float factors[kPlanHeads];
    const int64_t first_channel = tile.first_channel(), end_channel = first_channel + tile.channels();
    for (int64_t r = 0; r < tile.rows; ++r) {
        const PlanPlace place = place_of(thread, tile, tile.first_row + r);
        const int64_t position = row_of(thread, tile.step) * tile.step.width + place.column;
        const int64_t* span = thread.plan.spans + of.spans + 2 * position;
        const Positions all_keys = all_positions(thread, of.keys, of.keys_channel, place.sample);
        const Positions all_values = all_positions(thread, of.values, of.values_channel, place.sample);
        Positions added{};
        if (of.of_keys >= 0) {
            const int64_t channel = of.of_keys_channel + of.each_query * position;
            added = all_positions(thread, of.of_keys, channel, place.sample);
        }
        for (int64_t c = first_channel; c < end_channel;) {
            const int64_t head = c / of.width, end = min_of((head + kPlanHeads) * of.width, end_channel);
            const int heads = static_cast<int>(div_up(end, of.width) - head);
            const int64_t bias_stride = of.biases > 1 ? positions * num_keys : 0;
            const float* bias = nullptr;
            if (of.biases > 0) bias = floats + 2 + head * bias_stride + position * num_keys + span[0];
            Positions keys_here = all_keys, values_here = all_values;
            keys_here.first += head * of.depth;
            values_here.first += c;
            attention_scores(query.p + r * query.row_stride + head * of.depth, heads, of.depth, keys_here, span[0],
                             span[1], floats[0], floats[1], bias, bias_stride, added, thread.scores, pitch);
            for (int h = 0; h < heads; ++h) {
                factors[h] = of.softmax ? attention_weights(thread.scores + h * pitch, span[1] - span[0]) : 1.0f;
            }
            float* out = to + r * stride + c - first_channel;
            attention_sum(thread.scores, pitch, values_here, span[0], span[1], of.width, c, end, out);
            for (int64_t i = c; i < end; ++i) out[i - c] *= factors[i / of.width - head];
            c = end;
        }
        for (int64_t c = tile.channels(); c < columns; ++c) to[r * stride + c] = 0.0f;
    }
}

}  // namespace
}  // namespace fastgen::FASTGEN_ISA

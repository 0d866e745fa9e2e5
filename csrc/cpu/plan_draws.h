// The draws of a plan: a pixel's levels, from the parameters that the network gives for it, and their encoding as inputs.
#pragma once

#include "../common/logistic_mixture.h"
#include "../common/philox.h"
#include "plan_thread.h"
#include "truncation.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

// The smallest level whose cumulative probability is at least u.
inline int64_t invert(const PlanThread& thread, const float* params, int64_t count, float u) {
    const double inverse_temperature = thread.batch.inverse_temperature;
    if (thread.plan.head == PlanHead::bernoulli) {
        const double odds = __builtin_exp(-__builtin_fabs(params[0] * inverse_temperature));
        return (params[0] < 0 ? 1.0 : odds) / (1.0 + odds) < u;
    }
    float* e = thread.probabilities;
    float top = params[0];
    for (int64_t k = 1; k < count; ++k) top = params[k] > top ? params[k] : top;
    const Vec<float> scale = broadcast(static_cast<float>(inverse_temperature)), shift = broadcast(top);
    for (int64_t k = 0; k < count; k += kLanes<float>) {
        const int n = static_cast<int>(min_of(count - k, kLanes<float>));
        store_n(e + k, exp((load_n(params + k, n) - shift) * scale), n);
    }
    if (thread.batch.top_k > 0 || thread.batch.top_p < 1)
        keep_likeliest(e, count, thread.batch.top_k, thread.batch.top_p, e + thread.plan.num_levels);
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

inline void draw_levels(const PlanThread& thread, const PlanDraw& source, const float* params, int64_t n,
                        int64_t position, int32_t* drawn) {
    const PlanTables& plan = thread.plan;
    const PlanBatch& batch = thread.batch;
    uint32_t bits[4];
    const auto uniform = [&](int64_t i) {
        if (i == source.first_uniform || i % 4 == 0) {
            philox_draw(batch.seed, static_cast<uint32_t>(i / 4), static_cast<uint32_t>(position),
                        batch.start + static_cast<uint64_t>(n), bits);
        }
        return philox_uniform(bits[i % 4]);
    };
    if (plan.head == PlanHead::logistic_mixture) {
        float uniforms[1 + kMaxJointColours];
        for (int64_t i = 0; i < source.num_uniforms; ++i) uniforms[i] = uniform(source.first_uniform + i);
        logistic_mixture_draw(params, plan.components, source.num_colours, plan.num_levels, uniforms,
                              batch.inverse_temperature, plan.levels, drawn);
        return;
    }
    drawn[0] = static_cast<int32_t>(invert(thread, params, source.count, uniform(source.first_uniform)));
}

inline void encode(const PlanThread& thread, int64_t colour, int32_t level, int64_t row, int64_t x) {
    for (const PlanEncoding *e = thread.plan.encodings, *end = e + thread.plan.num_encodings; e != end; ++e) {
        if (e->colour != colour) continue;
        float* to = thread.at(e->plane, thread.y, x) + row * thread.plan.planes[e->plane].pitch + e->channel;
        const float* from = thread.plan.tables + e->offset + level * e->count;
        for (int64_t c = 0; c < e->count; ++c) to[c] = from[c];
    }
}

// null + scale * (given - null), of `count` logits. What `null` forbids, by -inf, stays forbidden.
inline const float* guided(const PlanThread& thread, const float* given, const float* null, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
        const float led = null[k] + thread.batch.guidance * (given[k] - null[k]);
        thread.guided[k] = null[k] == -__builtin_inff() ? null[k] : led;
    }
    return thread.guided;
}

// Samples are split between the members.
inline void draw(const PlanThread& thread, const PlanDraw& source, int64_t x) {
    const PlanTables& plan = thread.plan;
    const PlanBatch& batch = thread.batch;
    const PlanPlane& plane = plan.planes[source.plane];
    const float* params = thread.at(source.plane, thread.y, x) + source.channel;
    const int64_t pixels = plan.height * plan.width, position = thread.y * plan.width + x;
    const int64_t samples = batch.count / batch.streams;
    const int64_t first = samples * thread.member / thread.members;
    const int64_t end = samples * (thread.member + 1) / thread.members;
    for (int64_t n = first; n < end; ++n) {
        const float* own = params + n * batch.streams * plane.pitch;
        if (batch.streams > 1) own = guided(thread, own, own + plane.pitch, source.count);
        if (batch.params) {
            float* copy = batch.params + (n * batch.num_params + source.channel) * pixels + position;
            for (int64_t k = 0; k < source.count; ++k) copy[k * pixels] = own[k];
        }
        int32_t* levels = batch.levels + (n * plan.colours + source.first_colour) * pixels + position;
        int32_t drawn[kMaxJointColours];
        if (batch.mask && batch.mask[n * pixels + position]) {
            const int32_t* known = batch.known + (levels - batch.levels);
            for (int64_t c = 0; c < source.num_colours; ++c) drawn[c] = known[c * pixels];
        } else {
            draw_levels(thread, source, own, n, position, drawn);
        }
        for (int64_t c = 0; c < source.num_colours; ++c) {
            levels[c * pixels] = drawn[c];
            for (int64_t row = n * batch.streams; row < (n + 1) * batch.streams; ++row) {
                encode(thread, source.first_colour + c, drawn[c], row, x);
            }
        }
    }
}

}  // namespace
}  // namespace fastgen::FASTGEN_ISA

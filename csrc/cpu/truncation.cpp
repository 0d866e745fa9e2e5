#include "truncation.h"

#include <algorithm>
#include <functional>

namespace fastgen {
namespace {

void keep_from(float* weights, int64_t count, float least) {
    for (int64_t i = 0; i < count; ++i) {
        if (weights[i] < least) weights[i] = 0.0f;
    }
}

double sum_of(const float* weights, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i];
    return sum;
}

}  // namespace

void keep_likeliest(float* weights, int64_t count, int64_t top_k, double top_p, float* room) {
    if (!(sum_of(weights, count) > 0)) return;  // a NaN, which has no order
    if (top_k > 0 && top_k < count) {
        std::copy(weights, weights + count, room);
        std::nth_element(room, room + top_k - 1, room + count, std::greater<float>());
        keep_from(weights, count, room[top_k - 1]);
    }
    if (top_p >= 1) return;
    // Together, weights below this are less than what is left out: none of them is the last that is kept.
    const double total = sum_of(weights, count), floor = (1 - top_p) * total / static_cast<double>(count) * 0.999;
    float* end = std::copy_if(weights, weights + count, room, [&](float weight) { return weight > floor; });
    std::sort(room, end, std::greater<float>());
    double sum = 0;
    for (const float* weight = room; weight != end; ++weight) {
        sum += *weight;
        if (sum >= top_p * total) return keep_from(weights, count, *weight);
    }
}

}  // namespace fastgen

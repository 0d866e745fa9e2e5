// Draws of the likeliest levels alone; the definition is fastgen/sampling/truncation.py.
#pragma once

#include <cstdint>

namespace fastgen {

// Makes zeros of the weights (probabilities but for a factor) of levels that are left out: all but the top_k largest, where
// that is not 0, and of these all but the largest whose sum is at least top_p of theirs. `room` is for `count` floats.
void keep_likeliest(float* weights, int64_t count, int64_t top_k, double top_p, float* room);

}  // namespace fastgen

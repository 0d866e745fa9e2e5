// Sampling plans on the GPU: a whole batch of images in one launch of a persistent kernel.
#pragma once

#include <cstdint>

#include "common/plan_tables.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastgen::cuda {

// host, device: the same tables on either side; batch: with pointers to device memory.
// strategy: 0 automatic, 1 latency, 2 throughput, see plan_schedule.h; changes no bit.
// arrivals: 8 bytes on the device, zero.
// Draws rows [row_begin, row_end) of the batch. Throws std::runtime_error if the launch fails or the plan needs more
// shared memory than the current GPU has.
void sample_plan(const PlanTables& host, const PlanTables& device, const PlanBatch& batch, int64_t strategy,
                 uint64_t* arrivals, int64_t row_begin, int64_t row_end, CUstream_st* stream);

}  // namespace fastgen::cuda

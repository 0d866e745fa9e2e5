// Launches the pixel stage of image rows on the GPU.
#pragma once

#include <cstdint>

#include "cuda/pixel_stage.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastgen::cuda {

// How many clusters of `size` blocks the current GPU runs at a time; 0 if it has no such clusters, or too little memory.
// host_steps: the steps of the stage, on the host. share: blocks, 1 or 2, that share the memory of a multiprocessor.
int64_t pixel_clusters(const PixelStage& stage, const PixelStep* host_steps, int64_t size, int64_t share);

// Draws one image row of a batch, `clusters` of them sharing its samples evenly. stage, batch: pointers to device memory.
// Throws std::runtime_error if the launch fails.
void run_pixel_stage(const PixelStage& stage, const PixelStep* host_steps, const PixelBatch& batch, int64_t size,
                     int64_t share, int64_t clusters, CUstream_st* stream);

}  // namespace fastgen::cuda

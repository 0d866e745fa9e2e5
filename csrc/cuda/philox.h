// Philox draws on the GPU: common/philox.h for arrays of counters.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastgen::cuda {

// int64 device arrays block, position, sample [count] -> out [count, 4]. Throws std::runtime_error if the launch fails.
void philox_uint32(uint64_t seed, const int64_t* block, const int64_t* position, const int64_t* sample, int64_t count,
                   int64_t* out, CUstream_st* stream);

}  // namespace fastgen::cuda

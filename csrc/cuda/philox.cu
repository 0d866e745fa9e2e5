#include "philox.h"

#include "common/philox.h"
#include "device.h"

namespace fastgen::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void draw(uint64_t seed, const int64_t* block, const int64_t* position, const int64_t* sample, int64_t count,
                     int64_t* out) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    uint32_t bits[4];
    philox_draw(seed, uint32_t(block[i]), uint32_t(position[i]), uint64_t(sample[i]), bits);
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = bits[lane];
}

}  // namespace

void philox_uint32(uint64_t seed, const int64_t* block, const int64_t* position, const int64_t* sample, int64_t count,
                   int64_t* out, CUstream_st* stream) {
    if (count == 0) return;  // an empty grid is an error
    const auto blocks = unsigned((count + kThreads - 1) / kThreads);
    draw<<<blocks, kThreads, 0, stream>>>(seed, block, position, sample, count, out);
    check_launch("philox_uint32");
}

}  // namespace fastgen::cuda

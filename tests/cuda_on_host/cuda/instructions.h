// csrc/cuda/instructions.h for lanes of the host.
#pragma once

#include "cuda_runtime.h"

namespace fastgen::cuda {

// Fragments as the PTX ISA gives them for mma.m16n8k16 with .bf16.
inline void multiply_add(float acc[4], const uint32_t a[4], const uint32_t b[2]) {
    using namespace cuda_on_host;
    const unsigned lane = threadIdx.x % kWarp;
    Warp& of = warp();
    std::memcpy(of.a[lane], a, sizeof(of.a[lane]));
    std::memcpy(of.b[lane], b, sizeof(of.b[lane]));
    pass(of.gate);
    const auto half = [](uint32_t both, int high) { return __uint_as_float(high ? both & 0xffff0000u : both << 16); };
    for (int i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = acc[i];
        for (int k = 0; k < 16; ++k) {
            const unsigned of_a = row % 8 * 4 + k % 8 / 2, of_b = column * 4 + k % 8 / 2;
            sum += double{half(of.a[of_a][k / 8 * 2 + row / 8], k % 2)} * half(of.b[of_b][k / 8], k % 2);
        }
        acc[i] = static_cast<float>(sum);
    }
    pass(of.gate);
}

// As late as it may happen.
inline void copy_to_shared(char* to, const char* from) {
    std::memset(to, 0xff, 16);
    cuda_on_host::lane().copies.push_back({to, from});
}

inline void wait_for_copies() {
    for (const auto& [to, from] : cuda_on_host::lane().copies) std::memcpy(to, from, 16);
    cuda_on_host::lane().copies.clear();
}

inline void arrive_in_cluster() {
    ++cuda_on_host::lane().arrivals;
    cuda_on_host::block.cluster->arrivals.fetch_add(1, std::memory_order_acq_rel);
}

inline void wait_in_cluster() {
    if (cuda_on_host::cluster_arrived()) return;
    cuda_on_host::lane().waits_for_cluster = true;
    cuda_on_host::yield();
    cuda_on_host::lane().waits_for_cluster = false;
}

}  // namespace fastgen::cuda

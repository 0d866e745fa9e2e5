// Instructions of a GPU that CUDA C++ has no names for. tests/cuda_on_host has them for threads of the host.
#pragma once

#include <cstdint>

namespace fastgen::cuda {

// Two bfloat16 in each register. A lane has of `a`, 16x16, rows lane / 4 and that + 8 in registers 0 and 1, columns
// 2 * (lane % 4) and that + 1, and in registers 2 and 3 the columns 8 further; of `b`, 16x8, these as rows of column
// lane / 4; and of acc, 16x8, the rows of `a` and columns 2 * (lane % 4) and that + 1. acc += a * b
__device__ inline void multiply_add(float acc[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Begins to copy 16 bytes to shared memory; `wait_for_copies` ends what the lane has begun.
__device__ inline void copy_to_shared(char* to, const char* from) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The lanes of a warp come together. What they wrote before `arrive` is seen by all blocks of the cluster after `wait`.
__device__ inline void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void wait_in_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

}  // namespace fastgen::cuda

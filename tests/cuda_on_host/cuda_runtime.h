// As much of CUDA C++ as the kernels of csrc/cuda use, on the host: a block is a thread, its lanes are coroutines of it.
//
// Lanes change places where they wait for each other, in a new order each time, so what two of them do between two
// barriers happens in either order. Shared memory begins as NaN, and what is being copied to it is NaN until the lane
// that copies waits. Compile with -fsanitize=undefined,address to see misaligned vectors and what lies out of bounds.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

struct CUstream_st;
struct dim3 {
    dim3(unsigned x = 1) : x(x) {}
    unsigned x, y = 1, z = 1;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline thread_local dim3 threadIdx, blockIdx, gridDim;
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_on_host {

constexpr int kWarp = 32;

// Lanes of a warp, or of a block, that wait for each other.
struct Gate {
    int size = 0, arrived = 0, round = 0;
};

struct Copy {
    char* to;
    const char* from;
};

struct Lane {
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    std::vector<Copy> copies;
    int64_t arrivals = 0;        // at the barrier of the cluster
    const Gate* gate = nullptr;  // at which it waits for the end of a round
    int round = 0;
    bool waits_for_cluster = false, done = false;
};

struct Warp {
    Gate gate;
    uint64_t shuffled[kWarp];
    uint32_t a[kWarp][4], b[kWarp][2];
};

// All blocks of a cluster.
struct Cluster {
    int rank_of_first, blocks, lanes;
    std::atomic<int64_t> arrivals{0};
};

struct Block {
    Cluster* cluster = nullptr;
    void (*enter)(const void* kernel, void** arguments) = nullptr;
    const void* kernel = nullptr;
    void** arguments = nullptr;
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    Gate all;
    jmp_buf scheduler;
};

inline thread_local Block block;

inline Lane& lane() { return block.lanes[threadIdx.x]; }
inline Warp& warp() { return block.warps[threadIdx.x / kWarp]; }

// The lane goes on until it yields. (The contexts of ucontext.h ask the system at every change.)
[[gnu::noinline]] inline void resume() {
    if (_setjmp(block.scheduler) == 0) _longjmp(lane().context, 1);
}

// Other lanes go on.
[[gnu::noinline]] inline void yield() {
    if (_setjmp(lane().context) == 0) _longjmp(block.scheduler, 1);
}

inline void pass(Gate& gate) {
    const int round = gate.round;
    if (++gate.arrived == gate.size) {
        gate.arrived = 0;
        ++gate.round;
    }
    if (gate.round != round) return;
    lane().gate = &gate;
    lane().round = round;
    yield();
    lane().gate = nullptr;
}

inline bool cluster_arrived() {
    return block.cluster->arrivals.load(std::memory_order_acquire) >= lane().arrivals * block.cluster->lanes;
}

// Whether the lane has something to do.
inline bool ready() {
    const Lane& of = lane();
    if (of.done || (of.waits_for_cluster && !cluster_arrived())) return false;
    return of.gate == nullptr || of.gate->round != of.round;
}

inline void run_lane() {
    yield();
    block.enter(block.kernel, block.arguments);
    lane().done = true;
    yield();
}

[[gnu::noinline]] inline void start(const ucontext_t& lane) {
    if (_setjmp(block.scheduler) == 0) setcontext(&lane);
}

inline void run_block() {
    block.all.size = static_cast<int>(block.lanes.size());
    for (Warp& of : block.warps) of.gate.size = kWarp;
    constexpr size_t kStack = 1 << 16;
    for (threadIdx.x = 0; threadIdx.x < block.lanes.size(); ++threadIdx.x) {
        lane().stack = std::make_unique<char[]>(kStack);
        ucontext_t begin;
        getcontext(&begin);
        begin.uc_stack.ss_sp = lane().stack.get();
        begin.uc_stack.ss_size = kStack;
        makecontext(&begin, run_lane, 0);
        start(begin);
    }
    const auto count = static_cast<unsigned>(block.lanes.size());
    unsigned left = count, random = 1 + blockIdx.x;
    while (left > 0) {
        random = random * 1664525u + 1013904223u;
        const unsigned begin = random >> 16, step = random & 256 ? 1 : count - 1;
        left = 0;
        bool resumed = false;
        for (unsigned i = 0; i < count; ++i) {
            threadIdx.x = (begin + i * step) % count;
            if (ready()) {
                resume();
                resumed = true;
            }
            left += !lane().done;
        }
        if (!resumed) std::this_thread::yield();  // they wait for another block
    }
}

template <class T>
T shuffle(T value, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&warp().shuffled[threadIdx.x % kWarp], &value, sizeof(T));
    pass(warp().gate);
    std::memcpy(&value, &warp().shuffled[from % kWarp], sizeof(T));
    pass(warp().gate);
    return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::pass(cuda_on_host::block.all); }
inline void __syncwarp() { cuda_on_host::pass(cuda_on_host::warp().gate); }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return cuda_on_host::shuffle(value, from);
}
template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// The runtime, on a GPU like an H200.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 233472,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 232448,
    cudaDevAttrReservedSharedMemoryPerBlock = 1024,
    cudaDevAttrMultiProcessorCount = 132
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout,
    cudaFuncAttributeNonPortableClusterSizeAllowed
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    CUstream_st* stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) { return *value = name, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void*) {
    return facts->sharedSizeBytes = 1024, cudaSuccess;
}
inline std::map<const void*, int> dynamic_shared;  // bytes that a kernel may have
// That they become fewer is an error here: graphs of a GPU may still replay launches that had more.
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
    if (name != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < dynamic_shared[kernel]) return cudaErrorInvalidValue;
    return dynamic_shared[kernel] = value, cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
    const unsigned size = config->attrs[0].val.clusterDim.x;
    const size_t share = cudaDevAttrMaxSharedMemoryPerMultiprocessor /
                         (config->dynamicSmemBytes + cudaDevAttrReservedSharedMemoryPerBlock);
    return *clusters = static_cast<int>(cudaDevAttrMultiProcessorCount * (share > 2 ? 2 : share) / size), cudaSuccess;
}

namespace cuda_on_host {

// What a program defines: calls the kernel with its arguments, after it has filled the shared memory with `bytes` of NaN.
void enter(const void* kernel, void** arguments);
void fill_shared(size_t bytes);

}  // namespace cuda_on_host

inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
    using namespace cuda_on_host;
    if (config->dynamicSmemBytes > static_cast<size_t>(dynamic_shared[kernel])) return cudaErrorInvalidValue;
    const unsigned size = config->attrs[0].val.clusterDim.x, blocks = config->gridDim.x, lanes = config->blockDim.x;
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::thread> threads;
    for (unsigned b = 0; b < blocks; ++b) {
        if (b % size == 0) {
            clusters.push_back(std::make_unique<Cluster>());
            clusters.back()->rank_of_first = static_cast<int>(b);
            clusters.back()->blocks = static_cast<int>(size);
            clusters.back()->lanes = static_cast<int>(size * lanes);
        }
        threads.emplace_back([=, cluster = clusters.back().get()] {
            block.cluster = cluster;
            block.enter = enter;
            block.kernel = kernel;
            block.arguments = arguments;
            block.lanes = std::vector<Lane>(lanes);
            block.warps = std::vector<Warp>(lanes / kWarp);
            blockIdx.x = b;
            gridDim.x = blocks;
            fill_shared(config->dynamicSmemBytes);
            run_block();
        });
    }
    for (std::thread& thread : threads) thread.join();
    return cudaSuccess;
}

#include "plan_executor.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device.h"
#include "plan_schedule.h"

namespace fastgen::cuda {
namespace {

constexpr int kLanes = 256;

// The blocks of a cooperative launch: all of them run at the same time, so they may wait for each other.
class BlockTeam {
public:
    __device__ BlockTeam(unsigned long long* arrivals, char* scratch) : arrivals_(arrivals), scratch_(scratch) {}
    __device__ int rank() const { return blockIdx.x; }
    __device__ int size() const { return gridDim.x; }
    __device__ int lane() const { return threadIdx.x; }
    __device__ int lanes() const { return kLanes; }
    __device__ char* scratch() const { return scratch_; }
    __device__ void sync() { __syncthreads(); }

    // Counts the arrivals of all rounds. One thread releases what its block wrote and acquires what the others did;
    // __syncthreads carries that to the rest of the block.
    __device__ void barrier() {
        awaited_ += gridDim.x;
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(arrivals_, 1ull);
            while (arrived() < awaited_) {
            }
            __threadfence();
        }
        __syncthreads();
    }

private:
    __device__ unsigned long long arrived() const {
        unsigned long long count;
        asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(count) : "l"(arrivals_) : "memory");
        return count;
    }

    unsigned long long* const arrivals_;
    char* const scratch_;
    unsigned long long awaited_ = 0;
};

__global__ void __launch_bounds__(kLanes)
    sample_rows(const __grid_constant__ PlanTables plan, const __grid_constant__ PlanBatch batch, PlanStrategy strategy,
                const __grid_constant__ PlanSpace space, unsigned long long* arrivals, int64_t row_begin,
                int64_t row_end) {
    extern __shared__ __align__(16) char scratch[];
    BlockTeam team(arrivals, scratch);
    PlanSchedule<BlockTeam>(plan, batch, strategy, space, team).run(row_begin, row_end);
}

void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would be blamed for it
    throw std::runtime_error("sample_plan: " + what + ": " + cudaGetErrorString(error));
}

int64_t attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cannot ask the GPU");
    return value;
}

// Blocks beyond the tiles of the largest step would only come to the barriers.
int64_t most_tiles(const PlanTables& plan, int64_t count) {
    int64_t most = 1;
    for (const PlanStep *step = plan.steps, *end = step + plan.num_steps; step != end; ++step) {
        const int64_t rows = step->row_stage ? step->width * count : count;
        const int64_t tiles = div_up(step->channels, kPlanPanel) * div_up(rows, kLatencyRows);
        if (tiles > most) most = tiles;
    }
    return most;
}

}  // namespace

void sample_plan(const PlanTables& host, const PlanTables& device, const PlanBatch& batch, int64_t strategy,
                 uint64_t* arrivals, int64_t row_begin, int64_t row_end, CUstream_st* stream) {
    int here = 0;
    check(cudaGetDevice(&here), "no GPU");
    PlanSpace space = plan_space(host, kLanes);
    const int64_t bytes = space.total(), room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, here);
    if (bytes > room) {
        throw std::runtime_error("sample_plan: the plan needs " + std::to_string(bytes) +
                                 " bytes of shared memory, this GPU has " + std::to_string(room));
    }
    check(cudaFuncSetAttribute(sample_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "cannot get shared memory");
    const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, here), tiles = most_tiles(host, batch.count);
    const auto blocks = static_cast<unsigned>(tiles < processors ? tiles : processors);
    auto chosen = static_cast<PlanStrategy>(strategy);
    auto* counter = reinterpret_cast<unsigned long long*>(arrivals);
    PlanTables plan = device;
    PlanBatch part = batch;
    void* arguments[] = {&plan, &part, &chosen, &space, &counter, &row_begin, &row_end};
    check(cudaLaunchCooperativeKernel(sample_rows, dim3(blocks), dim3(kLanes), arguments, static_cast<size_t>(bytes),
                                      stream),
          "launch");
    check_launch("sample_plan");
}

}  // namespace fastgen::cuda

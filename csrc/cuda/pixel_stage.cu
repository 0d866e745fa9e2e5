#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/instructions.h"
#include "device.h"
#include "pixel_stage_kernel.h"

namespace fastgen::cuda {
namespace {

extern __shared__ __align__(16) char shared[];

constexpr int kLanes = 256, kWarps = kLanes / 32;
constexpr int kBlocksPerProcessor = 2;  // while one waits for its cluster, the other multiplies
constexpr int kRound = 8;               // blocks of channels that a warp reads at a time
constexpr int kTiles = 3;               // that it multiplies them by
static_assert(32 % kRound == 0, "lanes find blocks for whole rounds");
static_assert(kWarps == kPixelParts, "a warp has a part of each sum");

// Shared memory of a block, in bytes from its start.
struct Space {
    int64_t partial, values, doubles, placed, steps, instrs, stores, weights;
    int64_t weights_of_warp;  // bytes
    int64_t total() const { return weights + kWarps * weights_of_warp; }
};

// Two bfloat16: that of a in the low half.
__device__ uint32_t pair(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ float low_of(uint32_t both) { return __uint_as_float(both << 16); }
__device__ float high_of(uint32_t both) { return __uint_as_float(both & 0xffff0000u); }

// Three bfloat16 numbers have the 24 bits of a float: parts[0] + parts[1] + parts[2] is (a, b). Of infinity the others
// are NaN, and so is a product that float32 would have as infinite.
__device__ void split(float a, float b, uint32_t parts[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        parts[i] = pair(a, b);
        a -= low_of(parts[i]);
        b -= high_of(parts[i]);
    }
}

// The blocks of a cluster, which GPUs have from compute capability 9.0 on. A warp computes a part of each sum on tensor cores: floats are split into three bfloat16
// numbers, and of the products of two such sums those that count are taken, small ones first.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <bool kBfloat16>
class ClusterTeam {
public:
    __device__ explicit ClusterTeam(const Space& space) : space_(space) {
        if (threadIdx.x % 32 == 0) fetched() = 0;
        __syncwarp();
    }
    __device__ int32_t rank() const { return cooperative_groups::cluster_group::block_rank(); }
    __device__ int32_t size() const { return cooperative_groups::cluster_group::num_blocks(); }
    __device__ int32_t lane() const { return threadIdx.x; }
    __device__ int32_t lanes() const { return kLanes; }
    __device__ void sync() { __syncthreads(); }
    __device__ void arrive() {
        __syncwarp();  // aligned: the lanes of a warp come together
        arrive_in_cluster();
    }
    __device__ void wait() {
        __syncwarp();
        wait_in_cluster();
    }
    __device__ float* partial() const { return reinterpret_cast<float*>(shared + space_.partial); }
    __device__ float* values() const { return reinterpret_cast<float*>(shared + space_.values); }
    __device__ double* doubles() const { return reinterpret_cast<double*>(shared + space_.doubles); }

    // Copies as much of the warp's weights as there is room for.
    __device__ void fetch(const PixelStage& stage, const PixelStep& step, PixelRange tiles) {
        const PixelRange blocks = own(step);
        const int32_t room = static_cast<int32_t>(space_.weights_of_warp) / kFragment;
        const int32_t all = tiles.size() * blocks.size(), count = all < room ? all : room;
        __syncwarp();  // nobody reads what was fetched before any more
        if (threadIdx.x % 32 == 0) fetched() = count;
        char* to = weights_of_warp() + threadIdx.x % 32 * 16;
        for (int32_t begin = 0, tile = tiles.begin; begin < count; begin += blocks.size(), ++tile) {
            const int32_t left = count - begin, bytes = (left < blocks.size() ? left : blocks.size()) * kFragment;
            const char* from = fragment(stage, step, tile, blocks.begin) + threadIdx.x % 32 * 16;
            for (int32_t i = 0; i < bytes; i += 32 * 16) copy_to_shared(to + begin * kFragment + i, from + i);
        }
    }

    // Lane i of a warp finds the i-th of its blocks.
    __device__ void locate(const PixelStage& stage, const PixelBatch& batch, const PixelStep& step, int32_t column) {
        const PixelRange blocks = own(step);
        found_ = find(stage, batch, step, blocks.begin, blocks.end, column);
    }

    // Part `warp` of the sums of some rows. A lane has columns lane / 4 and that + 8 of a tile and two of the rows.
    __device__ void multiply(const PixelStage& stage, const PixelBatch& batch, const PixelStep& step, PixelRange tiles,
                             PixelRange rows, int32_t column) {
        const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const PixelRange blocks = own(step);
        const int32_t in_shared = fetched();
        for (int32_t first = tiles.begin; first < tiles.end; first += kTiles) {
            float acc[kTiles][kChains][4] = {};
            for (int32_t begin = blocks.begin; begin < blocks.end; begin += kRound) {
                const int32_t passed = (begin - blocks.begin) % 32;
                if (blocks.size() > 32 && passed == 0) found_ = find(stage, batch, step, begin, blocks.end, column);
                float4 b[kRound];
#pragma unroll
                for (int r = 0; r < kRound; ++r) {
                    const Found from = found(passed + r);
                    b[r] = activations(from, rows.begin + lane / 4, lane / 4 < rows.size());
                }
                wait_for_copies();
                __syncwarp();
#pragma unroll
                for (int r = 0; r < kRound; ++r) {
                    if (begin + r >= blocks.end) break;
                    uint32_t low[3], high[3];
                    split(b[r].x, b[r].y, low);
                    split(b[r].z, b[r].w, high);
                    const uint32_t of_b[3][2] = {{low[0], high[0]}, {low[1], high[1]}, {low[2], high[2]}};
#pragma unroll
                    for (int j = 0; j < kTiles; ++j) {
                        if (first + j >= tiles.end) break;
                        const int32_t index = (first + j - tiles.begin) * blocks.size() + begin + r - blocks.begin;
                        const char* from = index < in_shared ? weights_of_warp() + index * kFragment
                                                             : fragment(stage, step, first + j, begin + r);
                        multiply_tile(acc[j][r % kChains], from, lane, of_b);
                    }
                }
            }
            const int32_t to = (first - tiles.begin) * kPixelColumns + lane / 4, row = lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                if (first + j >= tiles.end) break;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int32_t packed = to + j * kPixelColumns + i / 2 * 8;
                    const float other = kChains > 1 ? acc[j][kChains - 1][i] : 0.0f;
                    partial()[partial_at(warp, row + i % 2, packed, tiles)] = acc[j][0][i] + other;
                }
            }
        }
    }

private:
    static constexpr int32_t kFragment = kBfloat16 ? 512 : 1024;  // bytes of a block's weights in a tile

    static constexpr int kChains = kBfloat16 ? 1 : 2;  // of a sum: where it has many products, they wait for each other

    // Where the channels of a block are; null: zeros.
    struct Found {
        const float* first;
        int32_t pitch, count;  // count kFast: all of them, at a multiple of 16 bytes
    };
    static constexpr int32_t kFast = kPixelDepth + 1;

    // Fragments that the warp has fetched; kept in shared memory, for want of registers.
    __device__ static int32_t& fetched() {
        __shared__ int32_t counts[kWarps];
        return counts[threadIdx.x / 32];
    }

    __device__ static PixelRange own(const PixelStep& step) {
        return pixel_share(step.num_blocks, static_cast<int32_t>(threadIdx.x / 32), kWarps);
    }

    __device__ char* weights_of_warp() const {
        return shared + space_.weights + threadIdx.x / 32 * space_.weights_of_warp;
    }

    __device__ const char* fragment(const PixelStage& stage, const PixelStep& step, int32_t tile, int32_t block) const {
        const int64_t index = step.weight + int64_t{tile} * step.num_blocks + block;
        return static_cast<const char*>(stage.weights) + index * kFragment;
    }

    __device__ static Found find(const PixelStage& stage, const PixelBatch& batch, const PixelStep& step, int32_t begin,
                                 int32_t end, int32_t column) {
        const int32_t block = begin + static_cast<int32_t>(threadIdx.x % 32);
        if (block >= end) return {};
        const int4 packed = __ldg(reinterpret_cast<const int4*>(stage.blocks) + step.first_block + block);
        const PixelPlace from = pixel_place(batch, packed.x, column);
        return {from.first ? from.first + packed.y : nullptr, from.pitch, packed.w ? kFast : packed.z};
    }

    // What lane `index` has found.
    __device__ Found found(int32_t index) const {
        const auto first = reinterpret_cast<unsigned long long>(found_.first);
        return {reinterpret_cast<const float*>(__shfl_sync(~0u, first, index)), __shfl_sync(~0u, found_.pitch, index),
                __shfl_sync(~0u, found_.count, index)};
    }

    // Four channels, from 4 * (lane % 4) on, of a row.
    __device__ static float4 activations(const Found& from, int32_t row, bool exists) {
        float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (!from.first || !exists) return a;
        const int32_t t = threadIdx.x % 4 * 4;
        const float* first = from.first + int64_t{row} * from.pitch + t;
        if (from.count == kFast) return __ldcg(reinterpret_cast<const float4*>(first));
        if (t < from.count) a.x = __ldcg(first);
        if (t + 1 < from.count) a.y = __ldcg(first + 1);
        if (t + 2 < from.count) a.z = __ldcg(first + 2);
        if (t + 3 < from.count) a.w = __ldcg(first + 3);
        return a;
    }

    // acc += a fragment of weights times activations, in three parts. Products below 2^-24 of the whole are left out.
    __device__ static void multiply_tile(float acc[4], const char* weights, int32_t lane, const uint32_t b[3][2]) {
        if (kBfloat16) {
            const uint4 a = reinterpret_cast<const uint4*>(weights)[lane];
            const uint32_t of_a[4] = {a.x, a.z, a.y, a.w};
#pragma unroll
            for (int i = 2; i >= 0; --i) multiply_add(acc, of_a, b[i]);
        } else {
            const int32_t flip = lane / 4 % 2;  // so that eight lanes share no memory bank
            float4 own = reinterpret_cast<const float4*>(weights)[lane * 2 + flip];
            float4 other = reinterpret_cast<const float4*>(weights)[lane * 2 + 1 - flip];
            if (flip) {
                const float4 kept = own;
                own = other;
                other = kept;
            }
            uint32_t parts[4][3], a[3][4];
            split(own.x, own.y, parts[0]);
            split(other.x, other.y, parts[1]);
            split(own.z, own.w, parts[2]);
            split(other.z, other.w, parts[3]);
#pragma unroll
            for (int i = 0; i < 12; ++i) a[i % 3][i / 3] = parts[i / 3][i % 3];
            multiply_add(acc, a[2], b[0]);
            multiply_add(acc, a[0], b[2]);
            multiply_add(acc, a[1], b[1]);
            multiply_add(acc, a[1], b[0]);
            multiply_add(acc, a[0], b[1]);
            multiply_add(acc, a[0], b[0]);
        }
    }

    const Space& space_;
    Found found_{};
};

#endif

// Copies a table to shared memory, where a barrier of the cluster does not drop it from a cache.
template <class T>
__device__ T* copy(const T* from, char* to, int64_t rows) {
    const auto* source = reinterpret_cast<const int32_t*>(from);
    auto* target = reinterpret_cast<int32_t*>(to);
    const auto words = static_cast<int32_t>(rows * int64_t{sizeof(T)} / 4);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < words; i += kLanes) target[i] = source[i];
    return reinterpret_cast<T*>(to);
}

template <bool kBfloat16>
__global__ void __launch_bounds__(kLanes, kBlocksPerProcessor)
    pixel_row(const __grid_constant__ PixelStage given, const __grid_constant__ PixelBatch asked,
              const __grid_constant__ Space space) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ PixelStage stage;  // with these pointers registers would not do
    __shared__ PixelBatch batch;
    const int64_t first = given.first_operand, operands = given.num_operands - first;
    auto* placed = reinterpret_cast<PixelPlaced*>(shared + space.placed);
    for (int64_t i = threadIdx.x; i < operands; i += kLanes) placed[i] = pixel_placed(given, asked, first + i);
    const PixelStep* steps = copy(given.steps, shared + space.steps, given.num_steps);
    const PixelInstr* instrs = copy(given.instrs, shared + space.instrs, given.num_instrs);
    const PixelStore* stores = copy(given.stores, shared + space.stores, given.num_stores);
    if (threadIdx.x == 0) {
        stage = given;
        stage.steps = steps;
        stage.instrs = instrs;
        stage.stores = stores;
        batch = asked;
        batch.placed = placed - first;
    }
    __syncthreads();
    ClusterTeam<kBfloat16> team(space);
    const auto clusters = static_cast<int32_t>(gridDim.x) / team.size();
    const PixelRange rows = pixel_rows(batch, static_cast<int32_t>(blockIdx.x) / team.size(), clusters);
    PixelSchedule<ClusterTeam<kBfloat16>>(stage, batch, rows, team).run();
#endif
}

void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would be blamed for it
    throw std::runtime_error("pixel_stage: " + what + ": " + cudaGetErrorString(error));
}

int64_t attribute(cudaDeviceAttr name) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "no GPU");
    check(cudaDeviceGetAttribute(&value, name, device), "cannot ask the GPU");
    return value;
}

const void* kernel_of(const PixelStage& stage) {
    return stage.bfloat16 ? reinterpret_cast<const void*>(pixel_row<true>)
                          : reinterpret_cast<const void*>(pixel_row<false>);
}

int64_t aligned(int64_t bytes) { return div_up(bytes, 16) * 16; }

// Shared memory that a kernel has without being given any.
int64_t static_bytes(const void* kernel) {
    cudaFuncAttributes facts{};
    check(cudaFuncGetAttributes(&facts, kernel), "cannot ask for the kernel");
    return static_cast<int64_t>(facts.sharedSizeBytes);
}

// As much room for weights as the largest step can use and `share` blocks of a multiprocessor leave each other.
Space space_of(const PixelStage& stage, const PixelStep* steps, int64_t size, int64_t share) {
    const PixelScratch scratch = pixel_scratch(stage, steps, kLanes, size);
    Space space{};
    int64_t next = 0;
    const auto take = [&](int64_t bytes) {
        const int64_t at = next;
        next += aligned(bytes);
        return at;
    };
    space.partial = take(scratch.partial * 4);
    space.values = take(scratch.values * 4);
    space.doubles = take(scratch.doubles * 8);
    const int64_t operands = stage.num_operands - stage.first_operand;
    space.placed = take(operands * int64_t{sizeof(PixelPlaced)});
    space.steps = take(stage.num_steps * int64_t{sizeof(PixelStep)});
    space.instrs = take(stage.num_instrs * int64_t{sizeof(PixelInstr)});
    space.stores = take(stage.num_stores * int64_t{sizeof(PixelStore)});
    space.weights = next;
    int64_t most = 0;
    for (int64_t s = 0; s < stage.num_steps; ++s) {
        const int64_t fragments = div_up(steps[s].num_blocks, kWarps) * div_up(pixel_tiles(steps[s]), size);
        if (fragments > most) most = fragments;
    }
    const int64_t fragment = stage.bfloat16 ? 512 : 1024;
    const int64_t all = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / share -
                        attribute(cudaDevAttrReservedSharedMemoryPerBlock) - static_bytes(kernel_of(stage));
    const int64_t room = all > next ? (all - next) / kWarps / fragment : 0;
    space.weights_of_warp = (most < room ? most : room) * fragment;
    return space;
}

struct Launch {
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};
};

bool fits(const Space& space, const void* kernel) {
    return space.total() + static_bytes(kernel) <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Lets a kernel have as much shared memory as any launch of it has had on this GPU: graphs replay launches of before.
void allow(const void* kernel, int64_t bytes) {
    static std::mutex lock;
    static std::map<std::pair<const void*, int>, int64_t> allowed;
    const std::lock_guard<std::mutex> locked(lock);
    int device = 0;
    check(cudaGetDevice(&device), "no GPU");
    int64_t& most = allowed[{kernel, device}];
    if (bytes <= most) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "cannot get shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "cannot get shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cannot get clusters");
    most = bytes;
}

void configure(Launch& launch, const void* kernel, const Space& space, int64_t size, int64_t clusters,
               CUstream_st* stream) {
    const int64_t bytes = space.total();
    allow(kernel, bytes);
    launch.attribute.id = cudaLaunchAttributeClusterDimension;
    launch.attribute.val.clusterDim.x = static_cast<unsigned>(size);
    launch.attribute.val.clusterDim.y = launch.attribute.val.clusterDim.z = 1;
    launch.config.gridDim = dim3(static_cast<unsigned>(size * clusters));
    launch.config.blockDim = dim3(kLanes);
    launch.config.dynamicSmemBytes = static_cast<size_t>(bytes);
    launch.config.stream = stream;
    launch.config.attrs = &launch.attribute;
    launch.config.numAttrs = 1;
}

}  // namespace

int64_t pixel_clusters(const PixelStage& stage, const PixelStep* host_steps, int64_t size, int64_t share) {
    Launch launch;
    const void* kernel = kernel_of(stage);
    const Space space = space_of(stage, host_steps, size, share);
    if (!fits(space, kernel)) return 0;
    configure(launch, kernel, space, size, 1, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess) return clusters;
    cudaGetLastError();  // no such clusters
    return 0;
}

void run_pixel_stage(const PixelStage& stage, const PixelStep* host_steps, const PixelBatch& batch, int64_t size,
                     int64_t share, int64_t clusters, CUstream_st* stream) {
    Space space = space_of(stage, host_steps, size, share);
    PixelStage plan = stage;
    PixelBatch part = batch;
    void* arguments[] = {&plan, &part, &space};
    const void* kernel = kernel_of(stage);
    Launch launch;
    configure(launch, kernel, space, size, clusters, stream);
    check(cudaLaunchKernelExC(&launch.config, kernel, arguments), "launch");
}

}  // namespace fastgen::cuda

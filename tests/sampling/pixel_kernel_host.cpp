// Runs csrc/cuda/pixel_stage.cu as it is, launch and kernel, on the host: see tests/cuda_on_host/cuda_runtime.h.
#include "cuda/pixel_stage.cu"

#include "pixel_call.h"

namespace fastgen::cuda {
namespace {

alignas(16) thread_local char shared[cudaDevAttrMaxSharedMemoryPerBlockOptin];

}
}  // namespace fastgen::cuda

void cuda_on_host::enter(const void* kernel, void** arguments) {
    using namespace fastgen;
    using Kernel = void (*)(const PixelStage, const PixelBatch, const cuda::Space);
    reinterpret_cast<Kernel>(kernel)(*static_cast<PixelStage*>(arguments[0]), *static_cast<PixelBatch*>(arguments[1]),
                                     *static_cast<cuda::Space*>(arguments[2]));
}

void cuda_on_host::fill_shared(size_t bytes) {
    if (bytes > sizeof(fastgen::cuda::shared)) std::abort();
    std::memset(fastgen::cuda::shared, 0xff, bytes);
}

int main(int, char** arguments) {
    const PixelCall call(arguments[1]);
    const int64_t size = call.number("size"), share = call.number("share"), clusters = call.number("clusters");
    for (const int64_t blocks : {int64_t{1}, size}) {  // one has most memory, which may not be taken back
        if (fastgen::cuda::pixel_clusters(call.stage, call.stage.steps, blocks, share) < 1) std::abort();
    }
    fastgen::cuda::run_pixel_stage(call.stage, call.stage.steps, call.batch, size, share, clusters, nullptr);
    call.write(arguments[2]);
    return 0;
}

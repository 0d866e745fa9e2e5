#include "device.h"

#include <cuda_runtime.h>

namespace fastgen::cuda {

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();  // no driver or no GPU: clear the error, the runtime would report it at the next launch
    return 0;
}

int runtime_version() {
    int version = 0;
    cudaRuntimeGetVersion(&version);
    return version;
}

}  // namespace fastgen::cuda

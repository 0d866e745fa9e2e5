// A CUDA driver without a GPU: it loads anything, and remembers what is launched and with which arguments.
#include <string.h>

#include "cuda.h"

enum { kMost = 64 };  // launches that are remembered, and arguments of each

struct Launch {
    void* function;
    unsigned grid[3], block, shared;
    int count;
    unsigned char arguments[kMost][8];
};

static struct Launch launches[kMost];
static int num_launches, num_arguments, sizes[kMost];
static size_t handles;

// Bytes of the arguments of what is launched next, which the driver cannot know.
void expect(int count, const int* bytes) {
    num_arguments = count;
    memcpy(sizes, bytes, (size_t)count * sizeof(int));
}

int launched(void) { return num_launches; }
const struct Launch* launch(int i) { return &launches[i]; }
void forget(void) { num_launches = 0; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
    if (num_launches == kMost || num_arguments > kMost) return CUDA_ERROR_OUT_OF_MEMORY;
    struct Launch* to = &launches[num_launches++];
    memset(to, 0, sizeof(*to));
    to->function = function;
    to->grid[0] = config->gridDimX;
    to->grid[1] = config->gridDimY;
    to->grid[2] = config->gridDimZ;
    to->block = config->blockDimX;
    to->shared = config->sharedMemBytes;
    to->count = num_arguments;
    for (int i = 0; i < num_arguments; ++i) memcpy(to->arguments[i], arguments[i], (size_t)sizes[i]);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    *module = (CUmodule)++handles;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = (CUfunction)++handles;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute name, CUfunction function) {
    *value = name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute name, CUdevice device) {
    *value = name == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute name, CUdeviceptr pointer) {
    memcpy(value, &pointer, sizeof(pointer));
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = "more launches or arguments than are remembered";
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute name, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// What Triton's launcher refers to, and does not call here.
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDriverGetVersion(int* version) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return CUDA_ERROR_NOT_SUPPORTED; }

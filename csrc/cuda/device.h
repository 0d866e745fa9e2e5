// What the CUDA runtime sees, and its errors. Nothing here needs a driver or a GPU.
#pragma once

namespace fastgen::cuda {

int device_count();     // 0 without a driver
int runtime_version();  // 1000 * major + 10 * minor of the runtime linked in

// Throws std::runtime_error naming the kernel if its launch failed.
void check_launch(const char* kernel);

}  // namespace fastgen::cuda

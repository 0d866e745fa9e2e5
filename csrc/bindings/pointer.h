// Memory of tensors, which Python passes as addresses.
#pragma once

#include <cstdint>

namespace fastgen {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace fastgen

// A hint to the system about memory that is about to be filled for the first time.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgen {

inline constexpr uintptr_t kLargePage = uintptr_t{1} << 21;  // of x86-64, and of arm64 with pages of 4 KiB

// Feature maps of megabytes are fresh memory at every call: by pages of 4 KiB, 32 MB take longer to be given out than to be
// copied.
inline void advise_large_pages(uintptr_t data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t begin = (data + kLargePage - 1) / kLargePage * kLargePage;
    const uintptr_t end = (data + bytes) / kLargePage * kLargePage;
    if (bytes > 0 && begin < end)
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may be refused
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace fastgen

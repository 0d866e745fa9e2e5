// Vector quantisation: of every vector, the index of the nearest code; how is in nearest_code.cpp.
#pragma once

#include <cstdint>

namespace fastgen {

// Vectors of `depth` elements at `images` times `area` positions, of any strides, and `count` codes, dense rows.
template <class T>
struct NearestCode {
    const T* input;
    int64_t images, area, depth;
    int64_t image_stride, area_stride, depth_stride;
    const T* codes;
    int64_t count;
    int64_t threads;
};

}  // namespace fastgen

// indices: dense [images][area]. Scratch: as many elements as nearest_code_scratch says, which looks at sizes and threads
// alone, from an address that is a multiple of 64 on.
#define FASTGEN_DECLARE_NEAREST_CODE_OF(T)                   \
    int64_t nearest_code_scratch(const NearestCode<T>& job); \
    void nearest_code(const NearestCode<T>& job, int64_t* indices, T* scratch);

#define FASTGEN_DECLARE_NEAREST_CODE(ISA)   \
    namespace fastgen::ISA {                \
    FASTGEN_DECLARE_NEAREST_CODE_OF(float)  \
    FASTGEN_DECLARE_NEAREST_CODE_OF(double) \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_NEAREST_CODE(FASTGEN_ISA)
#endif

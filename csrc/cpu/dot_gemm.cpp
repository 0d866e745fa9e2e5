// fastgen: per-isa
// Register-blocked micro-kernels of dot_gemm and the choice among them; the formula and the contract are in dot_gemm.h.

#include "dot_gemm.h"

#include "bfloat16.h"
#include "integers.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int kLine = 64;
constexpr int kColumns = kLine / static_cast<int>(sizeof(float));  // of a panel
constexpr int kVecsPerPanel = kLine / kVecBytes;
constexpr int kMaxPanels = kVecRegisters / kVecsPerPanel >= 32 ? 2 : 1;
constexpr int kMaxRows = kVecRegisters >= 32 ? 14 / (kVecsPerPanel > 2 ? 2 : 1) : 4 / (kVecsPerPanel > 2 ? 2 : 1);

#if defined(__AVX512BF16__)

typedef Vec<int32_t> Words;

FASTGEN_INLINE Vec<float> add_dots(Vec<float> sum, Words x, Words w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
}

#else

typedef Vec<int32_t> Words;

FASTGEN_INLINE Vec<float> add_dots(Vec<float> sum, Words x, Words w) {
    sum = fma(reinterpret_cast<Vec<float>>(x & -0x10000), reinterpret_cast<Vec<float>>(w & -0x10000), sum);
    return fma(reinterpret_cast<Vec<float>>(x << 16), reinterpret_cast<Vec<float>>(w << 16), sum);
}

#endif

FASTGEN_INLINE Words load_words(const BFloat16* p) {
    Words words;
    __builtin_memcpy(&words, p, sizeof words);
    return words;
}

FASTGEN_INLINE Words broadcast_word(const BFloat16* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return word - Words{};
}

// What will be read next is fetched meanwhile: a line in each step.
struct Ahead {
    const char* p;
    const char* last;
};

using Kernel = Ahead (*)(const DotGemm& gemm, int64_t row, int64_t panel, Ahead ahead);

template <int R, int P>
Ahead kernel(const DotGemm& gemm, int64_t row, int64_t panel, Ahead ahead) {
    constexpr int V = P * kVecsPerPanel, L = kLanes<float>;
    Vec<float> acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = Vec<float>{};
    const int64_t panel_stride = 2 * gemm.b_panel_stride;
    for (const DotTap *tap = gemm.taps, *end = tap + gemm.num_taps; tap != end; ++tap) {
        const int64_t row_stride = tap->row_stride;
        const BFloat16* b = tap->b + panel * panel_stride;
        // Three rows to a pointer: base, base + stride, base + 2 * stride are addressing modes, not registers.
        const BFloat16* a[(R + 2) / 3];
#pragma GCC unroll 16
        for (int i = 0; i < (R + 2) / 3; ++i) a[i] = tap->a + (row + 3 * i) * row_stride;
        for (int64_t k = 0; k < tap->k; k += 2, b += 2 * kColumns) {
            __builtin_prefetch(ahead.p, 0, 2);
            ahead.p = ahead.p + kLine < ahead.last ? ahead.p + kLine : ahead.last;
            Words w[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                Words words = load_words(b + v / kVecsPerPanel * panel_stride + v % kVecsPerPanel * 2 * L);
                keep_in_register(words);
                w[v] = words;
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Words x = broadcast_word(a[r / 3] + r % 3 * row_stride);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) acc[r][v] = add_dots(acc[r][v], x, w[v]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < (R + 2) / 3; ++i) a[i] += 2;
        }
    }
    float* c = gemm.c + row * gemm.c_row_stride + panel * kColumns;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(c + r * gemm.c_row_stride + v * L, acc[r][v]);
    return ahead;
}

struct Kernels {
    Kernel at[kMaxRows + 1][kMaxPanels + 1];

    template <int R, int P>
    constexpr void add() {
        at[R][P] = kernel<R, P>;
        if constexpr (P < kMaxPanels)
            add<R, P + 1>();
        else if constexpr (R < kMaxRows)
            add<R + 1, 1>();
    }

    constexpr Kernels() : at{} { add<1, 1>(); }
};

constexpr Kernels kKernels{};

}  // namespace

void dot_gemm(const DotGemm& gemm) {
    if (gemm.rows <= 0) return;
    const int64_t steps = ceil_div(gemm.rows, kMaxRows);
    for (int64_t panel = 0; panel < gemm.panels; panel += kMaxPanels) {
        const int64_t width = gemm.panels - panel < kMaxPanels ? gemm.panels - panel : kMaxPanels;
        const int64_t next = gemm.panels - panel - width < kMaxPanels ? gemm.panels - panel - width : kMaxPanels;
        const BFloat16* start = gemm.next;
        if (gemm.num_taps > 0 && next > 0) start = gemm.taps[0].b + (panel + width) * 2 * gemm.b_panel_stride;
        const int64_t bytes = start ? 4 * gemm.b_panel_stride * (next > 0 ? next : width) : kLine;
        const char* address = start ? reinterpret_cast<const char*>(start) : reinterpret_cast<const char*>(gemm.c);
        Ahead ahead{address, address + bytes - kLine};
        for (int64_t step = 0, row = 0; step < steps; ++step) {
            const int64_t rows = ceil_div(gemm.rows - row, steps - step);
            ahead = kKernels.at[rows][width](gemm, row, panel, ahead);
            row += rows;
        }
    }
}

}  // namespace fastgen::FASTGEN_ISA

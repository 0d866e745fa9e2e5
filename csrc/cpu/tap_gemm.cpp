// fastgen: per-isa Register-blocked micro-kernels of tap_gemm and the choice among them. A micro-kernel keeps an R x
// (P panels) tile of C in registers and walks all taps; the formula and the contract are in tap_gemm.h.

#include "tap_gemm.h"

#include "integers.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int kMaxRows = 14;
constexpr int kMaxPanels = 8;
constexpr int kVecsPerPanel = 64 / kVecBytes;

// The tile, the smaller operand's vectors and one vector of the other operand (and of a product, where it is not
// fused) must fit the register file.
constexpr bool fits(int rows, int panels) {
    const int vecs = panels * kVecsPerPanel;
#if defined(__x86_64__) && !defined(__FMA__)
    const int temporaries = 2;
#else
    const int temporaries = 1;
#endif
    return rows * vecs + (rows < vecs ? rows : vecs) + temporaries <= kVecRegisters;
}

// How weights get to the core in time. In tiles of a few rows a weight is at work for longer than it takes to come, but
// the processor's prefetchers start anew at each panel and page: fetching the next panels into L2 meanwhile gains 7-13 %
// for 16 to 64 rows of floats from L3, 3 % with bfloat16. A k fetches as many lines as it uses, as often a single tile of
// rows meets the panels. One row waits for the bandwidth of the cache its weights are in; there, hints a page
// ahead cost 10-25 %, and some lines ahead they gain 5 % where the halves of a word keep one vector busy, else nothing.
constexpr int kMinRowsAhead = 4;
constexpr int kNearSteps = 4;

// Memory to be fetched while tiles are computed: kMaxPanels lines from each address up to `last`.
struct Ahead {
    const char* p;
    const char* last;
};

// Returns what is left to fetch.
template <class T, class W>
using Kernel = Ahead (*)(const TapGemm<T, W>& gemm, int64_t row, int64_t panel, Ahead ahead);

template <class W>
constexpr bool kScaled = false;
template <>
constexpr bool kScaled<ScaledInt8> = true;

template <class W>
constexpr int kPerWord = 1;
template <>
constexpr int kPerWord<BFloat16Pair> = 2;

template <int I>
struct Half {
    static constexpr int value = I;
};

// How the weights of one k are made of memory.
template <class T, class W>
struct Weights {
    FASTGEN_INLINE explicit Weights(const TapGemm<T, W>&) {}
    template <int H>
    FASTGEN_INLINE Vec<T> load(const T* p) const {
        return FASTGEN_ISA::load(p);
    }
};

// Of a word of two, the lower (0) or upper (1) half.
template <>
struct Weights<float, BFloat16Pair> {
    FASTGEN_INLINE explicit Weights(const TapGemm<float, BFloat16Pair>&) {}
    template <int H>
    FASTGEN_INLINE Vec<float> load(const BFloat16Pair* p) const {
        Vec<int32_t> words;
        __builtin_memcpy(&words, p, sizeof words);
        return reinterpret_cast<Vec<float>>(H == 0 ? words << 16 : words & -0x10000);
    }
};

// The bytes as they are: sums take the powers of their columns when a tap is done.
template <>
struct Weights<float, ScaledInt8> {
    FASTGEN_INLINE explicit Weights(const TapGemm<float, ScaledInt8>&) {}
    template <int H>
    FASTGEN_INLINE Vec<float> load(const ScaledInt8* p) const {
        return load_bytes(&p->value);
    }
};

template <Combination C>
struct Weights<float, FilterLines<C>> {
    int64_t second;
    Signs signs;

    FASTGEN_INLINE explicit Weights(const TapGemm<float, FilterLines<C>>& gemm)
        : second(gemm.second_line), signs(gemm.signs) {}

    template <int H>
    FASTGEN_INLINE Vec<float> load(const FilterLines<C>* p) const {
        constexpr int64_t L = kPanel<float>;
        const auto line = [&](int64_t i) __attribute__((always_inline)) { return FASTGEN_ISA::load(&p->first + i); };
        if constexpr (C == Combination::sum) return line(0) + line(second);
        if constexpr (C == Combination::difference) return line(0) - line(second);
        // A branch instead of four kernels, which took half a minute more to compile for 1 %.
        switch (signs) {
            case Signs::plus_plus:
                return (line(0) + line(L)) + (line(2 * L) + line(3 * L));
            case Signs::plus_minus:
                return (line(0) - line(L)) + (line(2 * L) - line(3 * L));
            case Signs::minus_plus:
                return (line(0) + line(L)) - (line(2 * L) + line(3 * L));
            default:
                return (line(0) - line(L)) - (line(2 * L) - line(3 * L));
        }
    }
};

// The first of the least number of nearly equal parts, none above `most`; 0 of 0.
FASTGEN_INLINE int64_t even_part(int64_t total, int64_t most) {
    return total > 0 ? ceil_div(total, ceil_div(total, most)) : 0;
}

// Zeros to start from where there is no init.
template <class T>
alignas(64) constexpr T kZeros[kMaxPanels * kPanel<T>] = {};

template <class T, class W, int R, int P>
Ahead kernel(const TapGemm<T, W>& gemm, int64_t row, int64_t panel, Ahead ahead) {
    constexpr int V = P * kVecsPerPanel;
    constexpr int L = kLanes<T>;
    const int64_t col = panel * kPanel<T>;
    const int64_t cols = gemm.cols - col;
    const bool full = cols >= P * kPanel<T>;

    // The value so far, without the chunk at work: init, later `total`.
    alignas(64) T total[R * V * L];
    const T* base = kZeros<T>;
    int64_t base_stride = 0;
    if (gemm.init != nullptr) {
        base = gemm.init + row * gemm.init_row_stride + col;
        base_stride = gemm.init_row_stride;
        if (!full) {
            for (int r = 0; r < R; ++r) {
                for (int v = 0; v < V; ++v) {
                    const Vec<T> x = load_n(base + r * base_stride + v * L, lanes_below<T>(cols - v * L));
                    store(total + (r * V + v) * L, x);
                }
            }
            base = total;
            base_stride = V * L;
        }
    }

    // The tile's cache lines arrive while it is computed, rather than when it is stored (3 % of a large convolution).
    for (int r = 0; r < R; ++r) {
        for (int p = 0; p < P; ++p) {
            __builtin_prefetch(gemm.c + (row + r) * gemm.c_row_stride + col + p * kPanel<T>, 1);
        }
    }

    Vec<T> acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};

    const int64_t b_panel_stride = gemm.b_panel_stride;
    const int64_t b_k_stride = gemm.b_k_stride;
    const Weights<T, W> weights(gemm);
    int64_t left = kTapGemmChunk;
    for (const Tap<T, W>*tap = gemm.taps, *end = tap + gemm.num_taps; tap != end; ++tap) {
        const int64_t row_stride = tap->row_stride;
        const int64_t k_stride = tap->k_stride;
        const W* b = tap->b + panel * b_panel_stride;
        // Three rows to a pointer: base, base + stride, base + 2 * stride are addressing modes, not registers.
        const T* a[(R + 2) / 3];
#pragma GCC unroll 16
        for (int i = 0; i < (R + 2) / 3; ++i) a[i] = tap->a + (row + 3 * i) * row_stride;

        const W* const powers = b;
        const auto power = [&](int v) __attribute__((always_inline)) {
            const W* at = powers + (v / kVecsPerPanel) * b_panel_stride;
            return load(reinterpret_cast<const T*>(at) + (v % kVecsPerPanel) * L);
        };
        if constexpr (kScaled<W>) {
            b += kPowersBytes;
            if (left != kTapGemmChunk) {  // what the chunk has of taps before
#pragma GCC unroll 32
                for (int v = 0; v < V; ++v) {
                    const Vec<T> inverse = broadcast(T{1}) / power(v);
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) acc[r][v] = acc[r][v] * inverse;
                }
            }
        }
        const auto scale = [&]() __attribute__((always_inline)) {
            if constexpr (kScaled<W>) {
#pragma GCC unroll 32
                for (int v = 0; v < V; ++v) {
                    const Vec<T> s = power(v);
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) acc[r][v] = acc[r][v] * s;
                }
            }
        };

        const auto prefetch = [&]() __attribute__((always_inline)) {
            if constexpr (R >= kMinRowsAhead) {
#pragma GCC unroll 8
                for (int i = 0; i < P; ++i) __builtin_prefetch(ahead.p + i * 64, 0, 2);
                ahead.p = ahead.p + P * 64 < ahead.last ? ahead.p + P * 64 : ahead.last;
            } else if constexpr (R == 1 && kPerWord<W> > 1 && kVecsPerPanel == 1) {
#pragma GCC unroll 8
                for (int p = 0; p < P; ++p) __builtin_prefetch(b + p * b_panel_stride + kNearSteps * b_k_stride, 0, 3);
            }
        };
        const auto add_product = [](Vec<T>& sum, Vec<T> x, Vec<T> w) __attribute__((always_inline)) {
            Vec<T> next = fma(x, w, sum);
            if constexpr (R > 1 && kPerWord<W> > 1) keep_in_register(next);  // else the halves mix and registers spill
            sum = next;
        };
        // One k, by the given half of the words at b.
        const auto step = [&](auto half) __attribute__((always_inline)) {
            if constexpr (half.value == 0) prefetch();
            if constexpr (R < V) {
                Vec<T> x[R];
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) x[r] = broadcast(a[r / 3][(r % 3) * row_stride]);
#pragma GCC unroll 32
                for (int v = 0; v < V; ++v) {
                    Vec<T> w = weights.template load<half.value>(b + (v / kVecsPerPanel) * b_panel_stride +
                                                                 (v % kVecsPerPanel) * L);
                    if constexpr (R > 1) keep_in_register(w);
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) add_product(acc[r][v], x[r], w);
                }
            } else {
                Vec<T> w[V];
#pragma GCC unroll 32
                for (int v = 0; v < V; ++v) {
                    Vec<T> loaded = weights.template load<half.value>(b + (v / kVecsPerPanel) * b_panel_stride +
                                                                      (v % kVecsPerPanel) * L);
                    if constexpr (R > 1) keep_in_register(loaded);
                    w[v] = loaded;
                }
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const Vec<T> x = broadcast(a[r / 3][(r % 3) * row_stride]);
#pragma GCC unroll 32
                    for (int v = 0; v < V; ++v) add_product(acc[r][v], x, w[v]);
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < (R + 2) / 3; ++i) a[i] += k_stride;
        };

        bool upper = false;  // half of the word at b that is next
        for (int64_t k = tap->k; k > 0;) {
            if (left == 0) {
                scale();
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
                    for (int v = 0; v < V; ++v) {
                        store(total + (r * V + v) * L, load(base + r * base_stride + v * L) + acc[r][v]);
                        acc[r][v] = Vec<T>{};
                    }
                base = total;
                base_stride = V * L;
                left = kTapGemmChunk;
            }
            int64_t steps = k < left ? k : left;
            k -= steps;
            left -= steps;
            if constexpr (kPerWord<W> == 1) {
                for (; steps > 0; --steps, b += b_k_stride) step(Half<0>{});
            } else {
                if (upper) {
                    step(Half<1>{});
                    b += b_k_stride;
                    --steps;
                }
                for (; steps > 1; steps -= 2, b += b_k_stride) {
                    step(Half<0>{});
                    if constexpr (R > 1) load_again(b);  // no registers to keep the words in
                    step(Half<1>{});
                }
                upper = steps > 0;
                if (upper) step(Half<0>{});
            }
        }
        scale();
    }

    T* c = gemm.c + row * gemm.c_row_stride + col;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) {
            T* p = c + r * gemm.c_row_stride + v * L;
            const Vec<T> value = load(base + r * base_stride + v * L) + acc[r][v];
            if (full)
                store(p, value);
            else
                store_n(p, value, lanes_below<T>(cols - v * L));
        }
    return ahead;
}

template <class T, class W>
struct Kernels {
    Kernel<T, W> at[kMaxRows + 1][kMaxPanels + 1];  // null where the tile does not fit
    int panels[kMaxRows + 1];                       // the widest that fits
    int rows;                                       // the tallest one-panel or, where registers allow, two-panel tile

    template <int R, int P>
    constexpr void add() {
        if constexpr (fits(R, P)) {
            at[R][P] = kernel<T, W, R, P>;
            panels[R] = P;
            rows = R;
            if constexpr (P < kMaxPanels) add<R, P + 1>();
        }
        if constexpr (P == 1 && R < kMaxRows) add<R + 1, 1>();
    }

    constexpr Kernels() : at{}, panels{}, rows{} { add<1, 1>(); }
};

template <class T, class W>
constexpr Kernels<T, W> kKernels{};

// The `count` packed panels from `panel` on; what the caller says comes next where there are none.
template <class T, class W>
FASTGEN_INLINE Ahead panels_ahead(const TapGemm<T, W>& gemm, int64_t panel, int64_t count) {
    constexpr int64_t least = kMaxPanels * 64;
    const void* start = gemm.next;
    int64_t bytes = gemm.next_bytes;
    if (count > 0 && gemm.num_taps > 0) {
        start = gemm.taps[0].b + panel * gemm.b_panel_stride;
        bytes = count * gemm.b_panel_stride * static_cast<int64_t>(sizeof(W));
    }
    if (bytes < least) {  // nothing much: any address that does no harm
        start = gemm.c;
        bytes = least;
    }
    return {static_cast<const char*>(start), static_cast<const char*>(start) + bytes - least};
}

template <class T, class W>
void run(const TapGemm<T, W>& gemm) {
    if (gemm.rows <= 0) return;
    const Kernels<T, W>& kernels = kKernels<T, W>;
    const int64_t panels = panels_of<T>(gemm.cols);
    // Even steps: 16 rows are 8 + 8, not 14 + 2.  The first step is the tallest; a width that fits it fits the others.
    const int64_t steps = ceil_div(gemm.rows, kernels.rows);
    const int64_t widest = kernels.panels[ceil_div(gemm.rows, steps)];
    for (int64_t panel = 0, width = even_part(panels, widest), next; panel < panels; panel += width, width = next) {
        next = even_part(panels - panel - width, widest);
        Ahead ahead = panels_ahead(gemm, panel + width, next);
        for (int64_t step = 0, row = 0; step < steps; ++step) {
            const int64_t rows = ceil_div(gemm.rows - row, steps - step);
            ahead = kernels.at[rows][width](gemm, row, panel, ahead);
            row += rows;
        }
    }
}

}  // namespace

void tap_gemm(const TapGemm<float>& gemm) { run(gemm); }
void tap_gemm(const TapGemm<float, BFloat16Pair>& gemm) { run(gemm); }
void tap_gemm(const TapGemm<float, ScaledInt8>& gemm) { run(gemm); }
void tap_gemm(const TapGemm<double>& gemm) { run(gemm); }
void tap_gemm(const TapGemm<float, FilterLines<Combination::sum>>& gemm) { run(gemm); }
void tap_gemm(const TapGemm<float, FilterLines<Combination::difference>>& gemm) { run(gemm); }
void tap_gemm(const TapGemm<float, FilterLines<Combination::all_four>>& gemm) { run(gemm); }

}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
//
//     index[p] = the least k with the largest  score[p, k] = sum over d of x[p, d] e[k, d] - |e[k]|^2 / 2
//
// which is the code of the least distance: |x - e|^2 = |x|^2 - 2 score. It is a matrix product of which no element is
// stored: vectors are copied to panels [depth][kWidth], a lane to each, codes are read where they are, and what comes out
// of the registers is compared with the best score of the lane so far. A lane meets the codes in order, and only a larger
// score replaces what it has, so that the first of equal ones stays, and codes may be met twice.
//
// A sum is cut into chunks of kChunk; a chunk is one chain of fused multiply-adds from zero, and chunks are added in order.
// Half the norm comes off at the end: summed with the products it would be rounded with every one of them. So the bits
// depend on nothing but the vector and the code, and the error grows with the chunk.
//
// A score that is NaN is not larger than any: codes that are not finite are never taken. A vector that is not finite is as
// far from all codes, so it gets index 0.
#include "nearest_code.h"

#include <type_traits>

#include "image.h"
#include "integers.h"
#include "normal_tiles.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int kVecs = 2;                             // of positions, and
constexpr int kRows = kVecRegisters == 32 ? 12 : 6;  // codes at a time: as many sums as registers allow
constexpr int64_t kChunk = 128;                      // of a sum
constexpr int64_t kCodesBytes = 16 * 1024;           // of codes that a panel meets, in the first-level cache
constexpr int64_t kBlockBytes = 128 * 1024;          // of panels that meet them, in the second-level cache

template <class T>
constexpr int kWidth = kVecs * kLanes<T>;

template <class T>
using Index = std::decay_t<decltype(Bits<T>{}[0])>;  // an integer of the size of T

// The best scores of a panel's lanes so far, and the indices of their codes.
template <class T>
struct Best {
    Vec<T> score[kVecs];
    Bits<T> index[kVecs];
};

template <class T>
struct Search {
    const NearestCode<T>& job;
    int64_t* indices;
    T* scratch;

    FASTGEN_INLINE int64_t positions() const { return job.images * job.area; }
    FASTGEN_INLINE int64_t panels() const { return ceil_div(positions(), kWidth<T>); }
    FASTGEN_INLINE int64_t panel_size() const { return job.depth * kWidth<T>; }
    FASTGEN_INLINE int64_t block_panels() const {
        return max_of(1, min_of(ceil_div(panels(), job.threads), kBlockBytes / (panel_size() * int64_t(sizeof(T)))));
    }
    FASTGEN_INLINE int64_t block_codes() const {
        return kRows * max_of(1, kCodesBytes / (kRows * job.depth * int64_t(sizeof(T))));
    }
    static constexpr int64_t kBestSize = sizeof(Best<T>) / sizeof(T);
    FASTGEN_INLINE int64_t norms_size() const { return ceil_div(job.count, kWidth<T>) * kWidth<T>; }
    FASTGEN_INLINE int64_t thread_size() const { return block_panels() * (panel_size() + kBestSize); }
    FASTGEN_INLINE int64_t scratch_size() const { return norms_size() + job.threads * thread_size(); }

    // Half the squared norm of code k: partial sums of every 64th byte, whatever the instruction set, then of halves.
    T half_norm(int64_t k) const {
        constexpr int64_t step = 64 / sizeof(T), vecs = 64 / kVecBytes;
        const T* code = job.codes + k * job.depth;
        Vec<T> sums[vecs] = {};
        for (int64_t d = 0; d < job.depth; d += step) {
            for (int64_t v = 0; v < vecs; ++v) {
                const int64_t left = job.depth - d - v * kLanes<T>;
                const Vec<T> e = left <= 0 ? Vec<T>{} : load_some<T>(code + d + v * kLanes<T>, min_of(left, kLanes<T>));
                sums[v] = fma(e, e, sums[v]);
            }
        }
        T parts[step];
        for (int64_t v = 0; v < vecs; ++v) store(parts + v * kLanes<T>, sums[v]);
        for (int64_t half = step / 2; half > 0; half /= 2) {
            for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
        }
        return parts[0] / 2;
    }

    // Copies `count` vectors from position `at` of an image on to lanes of a panel.
    void fill_lanes(int64_t image, int64_t at, int64_t count, T* lanes) const {
        const T* from = job.input + image * job.image_stride + at * job.area_stride;
        if (job.area_stride == 1) {
            for (int64_t d = 0; d < job.depth; ++d) copy(from + d * job.depth_stride, count, lanes + d * kWidth<T>);
            return;
        }
        // As if positions were channels and channels positions: eight at a time it transposes.
        const Image<T> turned{from, 0, job.area_stride, 0, job.depth_stride};
        for (int64_t i = 0; i < count; i += 8) {
            fetch(turned, 0, 0, i, min_of(i + 8, count), job.depth, lanes + i, kWidth<T>);
        }
    }

    // Copies a panel, and sets out to find its codes.
    void start(int64_t panel, T* lanes, Best<T>& best) const {
        const int64_t first = panel * kWidth<T>, count = min_of(kWidth<T>, positions() - first);
        for (int64_t i = 0, run; i < count; i += run) {
            const int64_t image = (first + i) / job.area, at = (first + i) % job.area;
            run = min_of(count - i, job.area - at);
            fill_lanes(image, at, run, lanes + i);
        }
        for (int64_t d = 0; d < job.depth && count < kWidth<T>; ++d) {
            for (int64_t i = count; i < kWidth<T>; ++i) lanes[d * kWidth<T> + i] = T(0);
        }
        const Vec<T> infinity = broadcast(T(__builtin_inf()));
        for (int v = 0; v < kVecs; ++v) {
            Vec<T> zero{};  // NaN where something is not finite
            for (int64_t d = 0; d < job.depth; ++d) {
                zero = fma(load(lanes + d * kWidth<T> + v * kLanes<T>), Vec<T>{}, zero);
            }
            best.score[v] = where(zero == zero, -infinity, infinity);
            best.index[v] = Bits<T>{};
        }
    }

    // One chain of products for each of R codes and each lane; three codes to a pointer, see below.
    template <int R>
    FASTGEN_INLINE void multiply(const T* (&codes)[(R + 2) / 3], const T*& lanes, int64_t steps,
                                 Vec<T> (&sum)[R][kVecs]) const {
        const int64_t depth = job.depth;
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec<T>{};
        for (; steps > 0; --steps, lanes += kWidth<T>) {
            Vec<T> x[kVecs];
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) {
                x[v] = load(lanes + v * kLanes<T>);
                keep_in_register(x[v]);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const Vec<T> e = broadcast(codes[r / 3][(r % 3) * depth]);
#pragma GCC unroll 2
                for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(e, x[v], sum[r][v]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < (R + 2) / 3; ++i) ++codes[i];
        }
    }

    // Compares a panel with R codes from k on.
    template <int R>
    FASTGEN_INLINE void compare(int64_t k, const T* lanes, const T* half_norms, Best<T>& best) const {
        // code, code + depth, code + 2 * depth are addressing modes, not registers.
        const T* codes[(R + 2) / 3];
#pragma GCC unroll 4
        for (int i = 0; i < (R + 2) / 3; ++i) codes[i] = job.codes + (k + 3 * i) * job.depth;
        Vec<T> sum[R][kVecs];
        multiply<R>(codes, lanes, min_of(job.depth, kChunk), sum);
        for (int64_t d = kChunk; d < job.depth; d += kChunk) {
            Vec<T> chunk[R][kVecs];
            multiply<R>(codes, lanes, min_of(job.depth - d, kChunk), chunk);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < kVecs; ++v) sum[r][v] += chunk[r][v];
        }
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
            Vec<T> most = best.score[v];
            Bits<T> index = best.index[v], code = Bits<T>{} + static_cast<Index<T>>(k);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r, code += 1) {
                const Vec<T> score = sum[r][v] - broadcast(half_norms[k + r]);
                index = where(score > most, code, index);
                most = max(score, most);
            }
            best.score[v] = most;
            best.index[v] = index;
        }
    }

    // With codes k0..k1-1, and some before them where they are no multiple of kRows.
    void compare_all(int64_t k0, int64_t k1, const T* lanes, const T* half_norms, Best<T>& best) const {
        if (job.count < kRows) {
            for (int64_t k = k0; k < k1; ++k) compare<1>(k, lanes, half_norms, best);
            return;
        }
        for (int64_t k = k0; k < k1; k += kRows) compare<kRows>(min_of(k, k1 - kRows), lanes, half_norms, best);
    }

    void finish(int64_t panel, const Best<T>& best) const {
        const int64_t first = panel * kWidth<T>, count = min_of(kWidth<T>, positions() - first);
        for (int64_t i = 0; i < count; ++i) indices[first + i] = best.index[i / kLanes<T>][i % kLanes<T>];
    }

    void block(int64_t first, int64_t count, const T* half_norms, T* room) const {
        Best<T>* best = reinterpret_cast<Best<T>*>(room);
        T* lanes = room + block_panels() * kBestSize;
        for (int64_t i = 0; i < count; ++i) start(first + i, lanes + i * panel_size(), best[i]);
        for (int64_t k = 0; k < job.count; k += block_codes()) {
            const int64_t end = min_of(k + block_codes(), job.count);
            for (int64_t i = 0; i < count; ++i) compare_all(k, end, lanes + i * panel_size(), half_norms, best[i]);
        }
        for (int64_t i = 0; i < count; ++i) finish(first + i, best[i]);
    }

    void run() const {
        in_parallel(job.threads, [&](int64_t thread, int64_t threads) {
            T* half_norms = scratch;
            const int64_t codes_end = job.count * (thread + 1) / threads;
            for (int64_t k = job.count * thread / threads; k < codes_end; ++k) half_norms[k] = half_norm(k);
            if (threads > 1) {
#pragma omp barrier
            }
            const int64_t end = panels() * (thread + 1) / threads;
            for (int64_t panel = panels() * thread / threads, count; panel < end; panel += count) {
                count = min_of(block_panels(), end - panel);
                block(panel, count, half_norms, scratch + norms_size() + thread * thread_size());
            }
        });
    }
};

}  // namespace

#define FASTGEN_DEFINE_NEAREST_CODE(T)                                           \
    int64_t nearest_code_scratch(const NearestCode<T>& job) {                    \
        return Search<T>{job, nullptr, nullptr}.scratch_size();                  \
    }                                                                            \
    void nearest_code(const NearestCode<T>& job, int64_t* indices, T* scratch) { \
        Search<T>{job, indices, scratch}.run();                                  \
    }

FASTGEN_DEFINE_NEAREST_CODE(float)
FASTGEN_DEFINE_NEAREST_CODE(double)

}  // namespace fastgen::FASTGEN_ISA

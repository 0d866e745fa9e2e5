// fastgen: per-isa
// Of every channel of every image, with z the input with up - 1 zeros after each pixel, surrounded by zeros:
//
//     output[y][x] = sum over (i, j) of filter[i][j] * z[y * down + i - before_y][x * down + j - before_x]
//
// Each output reads the few taps that are no zeros. Where neighbouring outputs read the same taps of neighbouring pixels,
// which without up- and downsampling are all of a line but those near its ends, they are computed as one run.
//
// Every output is summed in the order of the taps, whatever it is computed with: the bits depend on neither threads nor batch.

#include "upfirdn2d.h"

#include <omp.h>

#include "integers.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kMaxTaps = 1024;  // which the caller sees to
constexpr int kTileVecs = 4;

// The kernel elements of one output along an axis that read pixels of the input: begin, begin + up, ... below end.
struct Range {
    int64_t begin, end;
};

FASTGEN_INLINE Range taps_of(const FilterAxis& axis, int64_t out) {
    const int64_t first = axis.before - out * axis.down;  // the element that reads the first pixel
    const int64_t last = first + axis.in_size * axis.up;  // beyond all that do
    const int64_t phase = (first % axis.up + axis.up) % axis.up;
    return {first > 0 ? first : phase, min_of(axis.kernel, last)};
}

template <class T>
struct Filter {
    const UpFirDn2d<T>& job;

    struct Taps {
        const T* from[kMaxTaps];
        T weight[kMaxTaps];
        int64_t count;
    };

    FASTGEN_INLINE void collect(const T* image, int64_t oy, int64_t ox, Taps& taps) const {
        const FilterAxis &y = job.y, &x = job.x;
        const Range rows = taps_of(y, oy), columns = taps_of(x, ox);
        taps.count = 0;
        for (int64_t i = rows.begin; i < rows.end; i += y.up) {
            const T* row = image + (oy * y.down + i - y.before) / y.up * x.in_size * job.run;
            for (int64_t j = columns.begin; j < columns.end; j += x.up) {
                taps.from[taps.count] = row + (ox * x.down + j - x.before) / x.up * job.run;
                taps.weight[taps.count++] = job.filter[i * x.kernel + j];
            }
        }
    }

    template <int Vecs>
    FASTGEN_INLINE static void tile(const Taps& taps, int64_t at, T* to) {
        Vec<T> sum[Vecs] = {};
        for (int64_t t = 0; t < taps.count; ++t) {
            const Vec<T> weight = broadcast(taps.weight[t]);
            const T* from = taps.from[t] + at;
            for (int v = 0; v < Vecs; ++v) sum[v] = fma(weight, load(from + v * kLanes<T>), sum[v]);
        }
        for (int v = 0; v < Vecs; ++v) store(to + at + v * kLanes<T>, sum[v]);
    }

    static void sum_run(const Taps& taps, int64_t length, T* to) {
        int64_t at = 0;
        for (; at + kTileVecs * kLanes<T> <= length; at += kTileVecs * kLanes<T>) tile<kTileVecs>(taps, at, to);
        for (; at + kLanes<T> <= length; at += kLanes<T>) tile<1>(taps, at, to);
        if (at == length) return;
        const int rest = static_cast<int>(length - at);
        Vec<T> sum = {};
        for (int64_t t = 0; t < taps.count; ++t)
            sum = fma(broadcast(taps.weight[t]), load_n(taps.from[t] + at, rest), sum);
        store_n(to + at, sum, rest);
    }

    void line(int64_t image, int64_t oy, Taps& taps) const {
        const FilterAxis& x = job.x;
        const T* from = job.input + image * job.y.in_size * x.in_size * job.run;
        T* to = job.output + (image * job.y.out_size + oy) * x.out_size * job.run;
        // Outputs that read a pixel with every element, if neighbours read neighbours.
        const bool even = x.up == 1 && x.down == 1;
        const int64_t begin = even ? min_of(max_of(0, x.before), x.out_size) : x.out_size;
        const int64_t end = even ? max_of(begin, min_of(x.out_size, x.in_size + x.before - x.kernel + 1)) : begin;
        for (int64_t ox = 0; ox < x.out_size;) {
            const int64_t next = ox == begin && end > begin ? end : ox + 1;
            collect(from, oy, ox, taps);
            sum_run(taps, (next - ox) * job.run, to + ox * job.run);
            ox = next;
        }
    }

    void run() const {
        const int64_t lines = job.images * job.y.out_size;
#pragma omp parallel num_threads(job.threads)
        {
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            Taps taps;
            for (int64_t i = lines * thread / threads; i < lines * (thread + 1) / threads; ++i)
                line(i / job.y.out_size, i % job.y.out_size, taps);
        }
    }
};

}  // namespace

void upfirdn2d(const UpFirDn2d<float>& job) { Filter<float>{job}.run(); }
void upfirdn2d(const UpFirDn2d<double>& job) { Filter<double>{job}.run(); }

}  // namespace fastgen::FASTGEN_ISA

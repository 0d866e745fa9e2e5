// fastgen: per-isa
// Of every channel of every image, with z the input with up - 1 zeros after each pixel, surrounded by zeros:
//
//     output[y][x] = sum over (i, j) of filter[i][j] * z[y * down + i - before_y][x * down + j - before_x]
//
// Each output reads the few taps that are no zeros. There are two ways to sum them.
//
// Of many channels side by side (Filter), output by output; where neighbouring outputs read the same taps of neighbouring
// pixels, which without up- and downsampling are all of a line but those near its ends, they are computed as one run.
//
// Of planes, and of few channels (Polyphase), many lines as one run. Upsampling, every up-th output of an axis, a phase, has
// the same taps and reads neighbouring pixels; downsampling, a tap reads every down-th pixel. So bands of an image are copied
// with zeros around them, every down-th pixel beside the next, and each phase of the outputs sums shifted views of the copy.
//
// Every output is summed in the order of the taps: the bits depend on neither threads nor batch.

#include "upfirdn2d.h"

#include <omp.h>

#include <memory>
#include <utility>

#include "integers.h"
#include "tap_gemm.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kMaxTaps = 1024;  // which the caller sees to
constexpr int kTileVecs = kVecRegisters == 32 ? 8 : 4;
constexpr int64_t kWideRun = 32;           // channels side by side, from which on outputs are computed one by one
constexpr int64_t kBandBytes = 64 * 1024;  // of a band's copy

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
struct Taps {
    const T* from[kMaxTaps];
    T weight[kMaxTaps];
    int64_t count;

    FASTGEN_INLINE void add(const T* pixel, T by) {
        from[count] = pixel;
        weight[count++] = by;
    }

    template <int Vecs>
    FASTGEN_INLINE void tile(int64_t at, T* to) const {
        Vec<T> sum[Vecs] = {};
        for (int64_t t = 0; t < count; ++t) {
            const Vec<T> by = broadcast(weight[t]);
            const T* pixels = from[t] + at;
            for (int v = 0; v < Vecs; ++v) sum[v] = fma(by, load(pixels + v * kLanes<T>), sum[v]);
        }
        for (int v = 0; v < Vecs; ++v) store(to + at + v * kLanes<T>, sum[v]);
    }

    void sum_run(int64_t length, T* to) const {
        int64_t at = 0;
        for (; at + kTileVecs * kLanes<T> <= length; at += kTileVecs * kLanes<T>) tile<kTileVecs>(at, to);
        for (; at + kLanes<T> <= length; at += kLanes<T>) tile<1>(at, to);
        if (at == length) return;
        const int rest = static_cast<int>(length - at);
        Vec<T> sum = {};
        for (int64_t t = 0; t < count; ++t) sum = fma(broadcast(weight[t]), load_n(from[t] + at, rest), sum);
        store_n(to + at, sum, rest);
    }
};

template <class T>
struct Filter {
    const UpFirDn2d<T>& job;

    FASTGEN_INLINE void collect(const T* image, int64_t oy, int64_t ox, Taps<T>& taps) const {
        const FilterAxis &y = job.y, &x = job.x;
        const Range rows = taps_of(y, oy), columns = taps_of(x, ox);
        taps.count = 0;
        for (int64_t i = rows.begin; i < rows.end; i += y.up) {
            const T* row = image + (oy * y.down + i - y.before) / y.up * x.in_size * job.run;
            const T* pixel = row + (ox * x.down + columns.begin - x.before) / x.up * job.run;
            for (int64_t j = columns.begin; j < columns.end; j += x.up, pixel += job.run)
                taps.add(pixel, job.filter[i * x.kernel + j]);
        }
    }

    void line(int64_t image, int64_t oy, Taps<T>& taps) const {
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
            taps.sum_run((next - ox) * job.run, to + ox * job.run);
            ox = next;
        }
    }

    void run() const {
        const int64_t lines = job.images * job.y.out_size;
#pragma omp parallel num_threads(job.threads)
        {
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            Taps<T> taps;
            for (int64_t i = lines * thread / threads; i < lines * (thread + 1) / threads; ++i)
                line(i / job.y.out_size, i % job.y.out_size, taps);
        }
    }
};

// An axis by phases: outputs phase, phase + up, ... in order, and the pixels of a part, those of one remainder by `down`.
struct PhaseAxis {
    int64_t in_size, out_size, kernel, before, up, down;  // one of the two is 1
    int64_t lowest, highest;                              // place of the part that a tap reads, seen from the output's

    explicit PhaseAxis(const FilterAxis& a)
        : in_size(a.in_size),
          out_size(a.out_size),
          kernel(a.kernel),
          before(a.before),
          up(a.up),
          down(a.down),
          lowest(place(0, 0)),
          highest(place(up - 1, kernel - 1)) {}

    FASTGEN_INLINE int64_t first(int64_t phase, int64_t tap) const { return phase + tap - before; }
    FASTGEN_INLINE int64_t place(int64_t phase, int64_t tap) const { return floor_div(first(phase, tap), up * down); }
    FASTGEN_INLINE bool reads(int64_t phase, int64_t tap) const {
        return first(phase, tap) == place(phase, tap) * up || up == 1;
    }
    FASTGEN_INLINE int64_t part(int64_t tap) const { return up > 1 ? 0 : first(0, tap) - place(0, tap) * down; }
    FASTGEN_INLINE int64_t outputs(int64_t phase) const { return ceil_div(max_of(0, out_size - phase), up); }
    FASTGEN_INLINE int64_t places(int64_t outputs) const { return outputs + highest - lowest; }
};

template <class T>
struct Polyphase {
    const UpFirDn2d<T>& job;
    PhaseAxis y{job.y}, x{job.x};
    int64_t pitch = x.places(x.outputs(0)) * job.run;  // of a line of the copy, and of the sums
    int64_t band = band_outputs();                     // of a phase

    static bool serves(const UpFirDn2d<T>& job) {
        return job.run < kWideRun && (job.y.up == 1 || job.y.down == 1) && (job.x.up == 1 || job.x.down == 1);
    }

    int64_t band_outputs() const {
        const int64_t lines = kBandBytes / (y.down * x.down * pitch * static_cast<int64_t>(sizeof(T)));
        return max_of(1, min_of(y.outputs(0), lines - (y.highest - y.lowest)));
    }
    FASTGEN_INLINE int64_t part_size() const { return y.places(band) * pitch; }
    FASTGEN_INLINE int64_t copy_size() const { return aligned<T>(y.down * x.down * part_size()); }
    FASTGEN_INLINE int64_t sums_size() const { return aligned<T>(band * pitch); }  // of a phase along x
    FASTGEN_INLINE int64_t scratch_size() const { return copy_size() + x.up * sums_size(); }

    // The line of the copy at a place of a part, of pixels from `from` on, or of zeros.
    void copy_line(const T* from, int64_t part, T* to) const {
        const int64_t places = x.places(x.outputs(0)), run = job.run;
        int64_t begin = places, end = places;  // what lies inside the image
        if (from) {
            begin = min_of(places, max_of(0, ceil_div(max_of(0, -part), x.down) - x.lowest));
            end = min_of(places, max_of(begin, ceil_div(max_of(0, x.in_size - part), x.down) - x.lowest));
        }
        for (int64_t i = 0; i < begin * run; ++i) to[i] = T(0);
        for (int64_t i = end * run; i < places * run; ++i) to[i] = T(0);
        if (begin == end) return;
        from += ((begin + x.lowest) * x.down + part) * run;
        to += begin * run;
        if (x.down == 1) return copy(from, (end - begin) * run, to);
        int64_t i = 0;
        if (x.down == 2 && run == 1) {
            constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
            for (; i + kLanes<T> < end - begin; i += kLanes<T>)  // the last pixel may be the last of all
                store(to + i, every_second<T, 0>(load(from + 2 * i), load(from + 2 * i + kLanes<T>), lanes));
        }
        for (; i < end - begin; ++i) {
            for (int64_t c = 0; c < run; ++c) to[i * run + c] = from[i * x.down * run + c];
        }
    }

    // For the outputs first..last-1 of every phase.
    void copy_band(const T* image, int64_t first, int64_t last, T* copied) const {
        for (int64_t part_y = 0; part_y < y.down; ++part_y) {
            for (int64_t part_x = 0; part_x < x.down; ++part_x, copied += part_size()) {
                for (int64_t i = 0; i < y.places(last - first); ++i) {
                    const int64_t row = (first + y.lowest + i) * y.down + part_y;
                    const bool inside = row >= 0 && row < y.in_size;
                    copy_line(inside ? image + row * x.in_size * job.run : nullptr, part_x, copied + i * pitch);
                }
            }
        }
    }

    void collect(const T* copied, int64_t phase_y, int64_t phase_x, Taps<T>& taps) const {
        taps.count = 0;
        for (int64_t i = 0; i < y.kernel; ++i) {
            if (!y.reads(phase_y, i)) continue;
            const T* lines = copied + y.part(i) * x.down * part_size() + (y.place(phase_y, i) - y.lowest) * pitch;
            for (int64_t j = 0; j < x.kernel; ++j) {
                if (!x.reads(phase_x, j)) continue;
                taps.add(lines + x.part(j) * part_size() + (x.place(phase_x, j) - x.lowest) * job.run,
                         job.filter[i * x.kernel + j]);
            }
        }
    }

    // A line of outputs, of the sums of all phases.
    void put(const T* sums, T* to) const {
        const int64_t run = job.run;
        if (x.up == 1) return copy(sums, x.out_size * run, to);
        int64_t i = 0;
        if (x.up == 2 && run == 1) {
            constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
            for (; i + kLanes<T> <= x.outputs(1); i += kLanes<T>) {
                const Vec<T> a = load(sums + i), b = load(sums + sums_size() + i);
                store(to + 2 * i, lower_halves<T>(a, b, lanes));
                store(to + 2 * i + kLanes<T>, upper_halves<T>(a, b, lanes));
            }
        }
        for (int64_t phase = 0; phase < x.up; ++phase) {
            const T* from = sums + phase * sums_size();
            for (int64_t j = i; j < x.outputs(phase); ++j) {
                for (int64_t c = 0; c < run; ++c) to[(j * x.up + phase) * run + c] = from[j * run + c];
            }
        }
    }

    void item(int64_t image, int64_t first, int64_t last, Taps<T>& taps, T* copied, T* sums) const {
        copy_band(job.input + image * y.in_size * x.in_size * job.run, first, last, copied);
        T* output = job.output + image * y.out_size * x.out_size * job.run;
        for (int64_t phase_y = 0; phase_y < y.up; ++phase_y) {
            const int64_t lines = min_of(last, y.outputs(phase_y)) - first;
            if (lines <= 0) continue;
            for (int64_t phase_x = 0; phase_x < min_of(x.up, x.out_size); ++phase_x) {
                collect(copied, phase_y, phase_x, taps);
                taps.sum_run((lines - 1) * pitch + x.outputs(phase_x) * job.run, sums + phase_x * sums_size());
            }
            for (int64_t i = 0; i < lines; ++i)
                put(sums + i * pitch, output + (phase_y + (first + i) * y.up) * x.out_size * job.run);
        }
    }

    void run() const {
        const int64_t bands = ceil_div(y.outputs(0), band), items = job.images * bands;
        const std::unique_ptr<T[]> scratch(new T[job.threads * scratch_size()]);
#pragma omp parallel num_threads(job.threads)
        {
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            T* own = scratch.get() + thread * scratch_size();
            Taps<T> taps;
            for (int64_t i = items * thread / threads; i < items * (thread + 1) / threads; ++i) {
                const int64_t first = i % bands * band, last = min_of(first + band, y.outputs(0));
                item(i / bands, first, last, taps, own, own + copy_size());
            }
        }
    }
};

template <class T>
void filter(const UpFirDn2d<T>& job) {
    Polyphase<T>::serves(job) ? Polyphase<T>{job}.run() : Filter<T>{job}.run();
}

}  // namespace

void upfirdn2d(const UpFirDn2d<float>& job) { filter(job); }
void upfirdn2d(const UpFirDn2d<double>& job) { filter(job); }

}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
// In place, of images x, with a scale s for each channel of each image, noise e for each position and a bias b:
//
//     x[n][c][p] = clamp(gain * activation(s[n][c] * x[n][c][p] + e[n][p] + b[c]))
//
// Each element is read and written once, where the same in PyTorch takes a pass for every operation. What is missing is
// filled in before, so that vectors do not ask for it.

#include "scaled_act.h"

#include <omp.h>

#include "integers.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <Activation A, class T>
struct Pass {
    static constexpr int64_t kChunk = 256;  // channels, whose values stay in the first-level cache

    const ScaledAct<T>& job;

    const T* scales(int64_t n) const {
        return job.scale ? job.scale + (job.one_scale ? 0 : n * job.channels) : nullptr;
    }
    const T* noise(int64_t n) const {
        return job.noise ? job.noise + (job.one_noise ? 0 : n * job.positions) : nullptr;
    }

    // Of elements x[0..count-1]: at(i, lanes) gives the scale and what is added of those from i on.
    template <class At>
    FASTGEN_INLINE void elements(T* x, int64_t count, const At& at) const {
        const Vec<T> parameter = broadcast(job.parameter), gain = broadcast(job.gain), limit = broadcast(job.limit);
        const auto value = [&](Vec<T> from, int64_t i, int lanes) __attribute__((always_inline)) {
            const Factors given = at(i, lanes);
            const Vec<T> y = activate<A>(fma(from, given.scale, given.added), parameter) * gain;
            return max(-limit, min(limit, y));  // a NaN stays one
        };
        int64_t i = 0;
        for (; i + kLanes<T> <= count; i += kLanes<T>) store(x + i, value(load(x + i), i, kLanes<T>));
        if (i < count) {
            const int lanes = static_cast<int>(count - i);
            store_n(x + i, value(load_n(x + i, lanes), i, lanes), lanes);
        }
    }

    struct Factors {
        Vec<T> scale, added;
    };

    void plane(int64_t n, int64_t c) const {
        T* x = job.data + (n * job.channels + c) * job.positions;
        const T *scales = this->scales(n), *noise = this->noise(n);
        const Vec<T> scale = broadcast(scales ? scales[c] : T(1)), bias = broadcast(job.bias ? job.bias[c] : T(0));
        if (noise) {
            elements(x, job.positions, [&](int64_t i, int lanes) __attribute__((always_inline)) {
                return Factors{scale, load_some(noise + i, lanes) + bias};
            });
        } else {
            elements(x, job.positions,
                     [&](int64_t, int) __attribute__((always_inline)) { return Factors{scale, bias}; });
        }
    }

    void channels(int64_t n, int64_t begin, int64_t end) const {
        const T *scales = this->scales(n), *noise = this->noise(n);
        for (int64_t first = 0; first < job.channels; first += kChunk) {
            const int64_t count = min_of(kChunk, job.channels - first);
            T scale[kChunk + kLanes<T>], bias[kChunk + kLanes<T>];
            for (int64_t c = 0; c < count + kLanes<T>; ++c) {
                const bool inside = c < count;
                scale[c] = inside && scales ? scales[first + c] : T(1);
                bias[c] = inside && job.bias ? job.bias[first + c] : T(0);
            }
            for (int64_t p = begin; p < end; ++p) {
                const Vec<T> added = broadcast(noise ? noise[p] : T(0));
                elements(job.data + (n * job.positions + p) * job.channels + first, count,
                         [&](int64_t i, int) __attribute__((always_inline)) {
                             return Factors{load(scale + i), added + load(bias + i)};
                         });
            }
        }
    }

    void run() const {
        const int64_t inner = job.channels_last ? job.positions : job.channels, rows = job.images * inner;
#pragma omp parallel num_threads(job.threads)
        {
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            const int64_t end = rows * (thread + 1) / threads;
            for (int64_t i = rows * thread / threads, next; i < end; i = next) {
                next = job.channels_last ? min_of(end, (i / inner + 1) * inner) : i + 1;
                if (job.channels_last)
                    channels(i / inner, i % inner, i % inner + next - i);
                else
                    plane(i / inner, i % inner);
            }
        }
    }
};

template <class T>
void run(const ScaledAct<T>& job) {
    with_activation(job.activation, [&](auto tag) { Pass<decltype(tag)::value, T>{job}.run(); });
}

}  // namespace

void scaled_act(const ScaledAct<float>& job) { run(job); }
void scaled_act(const ScaledAct<double>& job) { run(job); }

}  // namespace fastgen::FASTGEN_ISA

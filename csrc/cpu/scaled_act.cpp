// fastgen: per-isa
// In place, of images x, with a scale s for each channel of each image, noise e for each position and a bias b:
//
//     x[n][c][p] = clamp(gain * activation(s[n][c] * x[n][c][p] + e[n][p] + b[c]))
//
// Each element is read and written once, where the same in PyTorch takes a pass for every operation. It is bound by
// memory, so that what is missing is asked for at every vector.

#include "scaled_act.h"

#include <omp.h>

#include "integers.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class T>
FASTGEN_INLINE Vec<T> load_lanes(const T* p, int lanes) {
    return lanes == kLanes<T> ? load(p) : load_n(p, lanes);
}

template <Activation A, class T>
struct Pass {
    const ScaledAct<T>& job;

    FASTGEN_INLINE void vector(T* at, int lanes, Vec<T> scale, Vec<T> shift) const {
        const Vec<T> x = fma(load_lanes(at, lanes), scale, shift);
        Vec<T> y = activate<A>(x, broadcast(job.parameter)) * broadcast(job.gain);
        const Vec<T> limit = broadcast(job.limit);
        y = where(y > limit, limit, where(y < -limit, -limit, y));  // a NaN stays one
        if (lanes == kLanes<T>)
            store(at, y);
        else
            store_n(at, y, lanes);
    }

    FASTGEN_INLINE static int lanes_below(int64_t count) {
        return static_cast<int>(min_of(count, int64_t{kLanes<T>}));
    }

    const T* scales(int64_t n) const { return job.scale ? job.scale + (job.one_scale ? 0 : n * job.channels) : nullptr; }
    const T* noise(int64_t n) const { return job.noise ? job.noise + (job.one_noise ? 0 : n * job.positions) : nullptr; }

    void plane(int64_t n, int64_t c) const {
        T* x = job.data + (n * job.channels + c) * job.positions;
        const T *scales = this->scales(n), *noise = this->noise(n);
        const Vec<T> scale = broadcast(scales ? scales[c] : T(1)), bias = broadcast(job.bias ? job.bias[c] : T(0));
        for (int64_t p = 0; p < job.positions; p += kLanes<T>) {
            const int lanes = lanes_below(job.positions - p);
            vector(x + p, lanes, scale, noise ? load_lanes(noise + p, lanes) + bias : bias);
        }
    }

    void position(int64_t n, int64_t p) const {
        T* x = job.data + (n * job.positions + p) * job.channels;
        const T *scales = this->scales(n), *noise = this->noise(n);
        const Vec<T> added = broadcast(noise ? noise[p] : T(0));
        for (int64_t c = 0; c < job.channels; c += kLanes<T>) {
            const int lanes = lanes_below(job.channels - c);
            const Vec<T> scale = scales ? load_lanes(scales + c, lanes) : broadcast(T(1));
            vector(x + c, lanes, scale, job.bias ? added + load_lanes(job.bias + c, lanes) : added);
        }
    }

    void run() const {
        const int64_t inner = job.channels_last ? job.positions : job.channels, rows = job.images * inner;
#pragma omp parallel num_threads(job.threads)
        {
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            for (int64_t i = rows * thread / threads; i < rows * (thread + 1) / threads; ++i) {
                if (job.channels_last)
                    position(i / inner, i % inner);
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

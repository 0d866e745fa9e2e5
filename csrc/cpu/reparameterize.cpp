// fastgen: per-isa
//
// z[s, n, d] = mu[n, d] + sigma[n, d] eps[s, n, d],  sigma = exp(logvar / 2),
// kl[n] = 1/2 sum over d of (mu^2 + sigma^2 - 1 - logvar),
// where a logvar above kMaxLogvar counts as that. eps is made in tiles that stay in the cache, in the forward pass and
// again in the backward pass; it depends on (seed, s, start + n, d) alone. A row's sum is that of 16 partial sums on
// every instruction set, and of its tiles, one after the other.
#include "reparameterize.h"

#include "normal_tiles.h"
#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr double kMaxLogvar = 80;  // exp(80) is 5.5e34: finite in float32, and so are sums of thousands
constexpr int kSums = 16;          // partial sums of a row

// A whole vector: buffers are padded.
template <class T>
FASTGEN_INLINE Vec<T> load_numbers(const float* from) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return load(from);
    } else {
        Vec<T> v{};
        for (int i = 0; i < kLanes<T>; ++i) v[i] = from[i];
        return v;
    }
}

// Calls function(column, count, index of the partial sum) for each vector of `columns`, inlined for whole vectors.
template <class T, class Function>
FASTGEN_INLINE void for_each_vector(int64_t columns, Function function) {
    constexpr int lanes = kLanes<T>, vectors = kSums / lanes;
    int64_t column = 0;
    for (; column + kSums <= columns; column += kSums) {
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) function(column + i * lanes, lanes, i);
    }
    for (int i = 0; column < columns; column += lanes, ++i) {
        function(column, static_cast<int>(columns - column < lanes ? columns - column : lanes), i);
    }
}

template <int half, class T, int... i>
FASTGEN_INLINE Vec<T> upper_half(Vec<T> v, std::integer_sequence<int, i...>) {
    return shuffle<((i + half) % kLanes<T>)...>(v, v);
}

// Adds the upper half of the lanes to the lower half, until one is left.
template <int half, class T>
FASTGEN_INLINE T fold(Vec<T> v) {
    if constexpr (half == 0) {
        return v[0];
    } else {
        return fold<half / 2, T>(v + upper_half<half, T>(v, std::make_integer_sequence<int, kLanes<T>>{}));
    }
}

template <class T>
struct Sums {
    Vec<T> parts[kSums / kLanes<T>] = {};

    FASTGEN_INLINE T total() const {
        constexpr int count = kSums / kLanes<T>;
        Vec<T> sums[count];
        for (int i = 0; i < count; ++i) sums[i] = parts[i];
        for (int half = count / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
        }
        return fold<kLanes<T> / 2, T>(sums[0]);
    }
};

// sigma, and 1 - sigma^2 without cancellation.
template <class T>
FASTGEN_INLINE Vec<T> sigma_of(Vec<T> logvar, Vec<T>& lack) {
    const Vec<T> sigma = exp_flushed(broadcast(T(0.5)) * logvar, lack);
    lack = lack * (broadcast(T(1)) + sigma);
    return sigma;
}

template <class T>
FASTGEN_INLINE Vec<T> bounded(Vec<T> logvar) {
    return min(broadcast(T(kMaxLogvar)), logvar);
}

// First samples, and the terms of the divergence; sigma, for further samples, unless null.
template <class T>
FASTGEN_INLINE void first_samples(const T* mu, const T* logvar, const float* numbers, int64_t count, T* z, T* terms,
                                  T* sigmas) {
    for_each_vector<T>(count, [&](int64_t at, int lanes, int) {
        const Vec<T> m = load_some(mu + at, lanes), lv = bounded<T>(load_some(logvar + at, lanes));
        Vec<T> lack;
        const Vec<T> sigma = sigma_of<T>(lv, lack);
        store(terms + at, fma(m, m, -(lack + lv)));
        store_some(z + at, fma(sigma, load_numbers<T>(numbers + at), m), lanes);
        if (sigmas) store(sigmas + at, sigma);
    });
}

template <class T>
FASTGEN_INLINE T sum_of(const T* terms, int64_t columns) {
    Sums<T> sums;
    for_each_vector<T>(columns, [&](int64_t column, int count, int part) {
        sums.parts[part] = sums.parts[part] + load_some(terms + column, count);
    });
    return sums.total();
}

template <class T>
FASTGEN_INLINE void samples(const T* mu, const T* sigmas, const float* numbers, int64_t columns, T* z) {
    for_each_vector<T>(columns, [&](int64_t column, int count, int) {
        const Vec<T> eps = load_numbers<T>(numbers + column);
        store_some(z + column, fma(load(sigmas + column), eps, load_some(mu + column, count)), count);
    });
}

// Adds a draw's gradient, and its product with the noise, to what earlier draws gave.
template <class T>
FASTGEN_INLINE void add_draw(const T* grad_z, const float* numbers, int64_t columns, bool first, T* sum, T* product) {
    for_each_vector<T>(columns, [&](int64_t column, int count, int) {
        const Vec<T> grad = load_some(grad_z + column, count), eps = load_numbers<T>(numbers + column);
        store(sum + column, first ? grad : load(sum + column) + grad);
        store(product + column, first ? grad * eps : fma(grad, eps, load(product + column)));
    });
}

template <class T>
FASTGEN_INLINE void gradients(const T* mu, const T* logvar, T grad_kl, int64_t columns, const T* sum, const T* product,
                              T* grad_mu, T* grad_logvar) {
    const Vec<T> by_kl = broadcast(grad_kl), half = broadcast(T(0.5));
    for_each_vector<T>(columns, [&](int64_t column, int count, int) {
        const Vec<T> m = load_some(mu + column, count), lv = load_some(logvar + column, count);
        Vec<T> lack;
        const Vec<T> sigma = sigma_of<T>(bounded<T>(lv), lack);
        const Vec<T> by_logvar = half * fma(sigma, load(product + column), -(by_kl * lack));
        store_some(grad_mu + column, fma(by_kl, m, load(sum + column)), count);
        store_some(grad_logvar + column, where(lv > broadcast(T(kMaxLogvar)), Vec<T>{}, by_logvar), count);
    });
}

constexpr int64_t kPadded = kNormalTile + kSums;  // whole vectors are stored at the end of a row

template <class T>
void forward(const Reparameterize& job, const T* mu, const T* logvar, T* z, T* kl) {
    const PhiloxKeys keys(job.seed);
    const NormalTiles tiles(job.rows, job.columns);
    // Rows one after the other, in memory and in a tile, are one: vectors are full, whatever the number of columns.
    const bool dense = tiles.pitch == job.columns && job.mu_row == job.columns && job.logvar_row == job.columns;
    in_parallel(job.threads, [&](int64_t thread, int64_t threads) {
        alignas(64) float numbers[kPadded];
        alignas(64) T sigmas[kPadded], terms[kPadded];
        tiles.for_each_of_thread(thread, threads, [&](const NormalTile& tile) {
            tiles.normals(keys, tile, job.start, 0, numbers);
            const int64_t runs = dense ? 1 : tile.rows, length = dense ? tile.rows * tile.columns : tile.columns;
            for (int64_t i = 0; i < runs; ++i) {
                const int64_t row = tile.row + i, at = i * tiles.pitch;
                first_samples(mu + row * job.mu_row + tile.column, logvar + row * job.logvar_row + tile.column,
                              numbers + at, length, z + row * job.columns + tile.column, terms + at,
                              job.draws > 1 ? sigmas + at : nullptr);
            }
            for (int64_t i = 0; i < tile.rows; ++i) {
                const T share = T(0.5) * sum_of(terms + i * tiles.pitch, tile.columns);
                kl[tile.row + i] = tile.column ? kl[tile.row + i] + share : share;
            }
            for (int64_t draw = 1; draw < job.draws; ++draw) {
                tiles.normals(keys, tile, job.start, static_cast<uint32_t>(draw), numbers);
                for (int64_t i = 0; i < tile.rows; ++i) {
                    const int64_t row = tile.row + i, at = i * tiles.pitch;
                    samples(mu + row * job.mu_row + tile.column, sigmas + at, numbers + at, tile.columns,
                            z + (draw * job.rows + row) * job.columns + tile.column);
                }
            }
        });
    });
}

template <class T>
void backward(const Reparameterize& job, const T* mu, const T* logvar, const T* grad_z, const T* grad_kl,
              int64_t grad_kl_row, T* grad_mu, T* grad_logvar) {
    const PhiloxKeys keys(job.seed);
    const NormalTiles tiles(job.rows, job.columns);
    in_parallel(job.threads, [&](int64_t thread, int64_t threads) {
        alignas(64) float numbers[kPadded];
        alignas(64) T sums[kPadded], products[kPadded];
        if (!grad_z) {
            for (int64_t i = 0; i < kPadded; ++i) sums[i] = products[i] = 0;
        }
        tiles.for_each_of_thread(thread, threads, [&](const NormalTile& tile) {
            for (int64_t draw = 0; grad_z && draw < job.draws; ++draw) {
                tiles.normals(keys, tile, job.start, static_cast<uint32_t>(draw), numbers);
                for (int64_t i = 0; i < tile.rows; ++i) {
                    add_draw(grad_z + (draw * job.rows + tile.row + i) * job.columns + tile.column,
                             numbers + i * tiles.pitch, tile.columns, draw == 0, sums + i * tiles.pitch,
                             products + i * tiles.pitch);
                }
            }
            for (int64_t i = 0; i < tile.rows; ++i) {
                const int64_t row = tile.row + i, at = row * job.columns + tile.column;
                gradients(mu + row * job.mu_row + tile.column, logvar + row * job.logvar_row + tile.column,
                          grad_kl ? grad_kl[row * grad_kl_row] : T(0), tile.columns, sums + i * tiles.pitch,
                          products + i * tiles.pitch, grad_mu + at, grad_logvar + at);
            }
        });
    });
}

}  // namespace

void reparameterize(const Reparameterize& job, const float* mu, const float* logvar, float* z, float* kl) {
    forward(job, mu, logvar, z, kl);
}
void reparameterize_gradient(const Reparameterize& job, const float* mu, const float* logvar, const float* grad_z,
                             const float* grad_kl, int64_t grad_kl_row, float* grad_mu, float* grad_logvar) {
    backward(job, mu, logvar, grad_z, grad_kl, grad_kl_row, grad_mu, grad_logvar);
}

void reparameterize(const Reparameterize& job, const double* mu, const double* logvar, double* z, double* kl) {
    forward(job, mu, logvar, z, kl);
}
void reparameterize_gradient(const Reparameterize& job, const double* mu, const double* logvar, const double* grad_z,
                             const double* grad_kl, int64_t grad_kl_row, double* grad_mu, double* grad_logvar) {
    backward(job, mu, logvar, grad_z, grad_kl, grad_kl_row, grad_mu, grad_logvar);
}

}  // namespace fastgen::FASTGEN_ISA

// fastgen: per-isa
// Of every image, with mean and var those of a group of channels over all positions:
//
//     output = activation((x - mean) / sqrt(var + eps) * weight + bias)
//
// The positions of an image are cut into chunks, by the shape alone. Pass 1 reads a chunk once and leaves its mean and its
// squared deviations from that, per group; they are merged in double. Pass 2 normalises. Within a chunk each channel is
// summed as d = x - pivot, the pivot near its mean, a few rows in T and beyond in double: a mean that is large against the
// deviations costs no digits, and neither does a pivot that happens to be far off, as the rows that it is the mean of are then
// far off themselves and most of the variance. So the bits depend on neither threads nor batch.
//
// Images in another layout are copied to channels-last in pass 1, into the output, where pass 2 finds them.

#include "group_norm_act.h"

#include <omp.h>

#include <cmath>
#include <type_traits>

#include "conv_products.h"
#include "integers.h"
#include "vec.h"

namespace fastgen::FASTGEN_ISA {
namespace {

constexpr int64_t kShortestRow = 64;       // images of few channels are read as if they had several times as many
constexpr int64_t kChunkElements = 16384;  // at least, as long as there are as many
constexpr int64_t kPivotRows = 8;
constexpr int64_t kRowsInT = 32;            // summed before they are added in double
constexpr int64_t kTileVecs = 4;            // of a row that are summed together
constexpr int64_t kImageBytes = 256 << 10;  // an image that a processor's own cache keeps from pass 1 to pass 2

template <class E>
struct Norm {
    using T = SumOf<E>;
    const GroupNormAct<E>& job;
    double* scratch;

    FASTGEN_INLINE int64_t positions() const { return job.height * job.width; }
    FASTGEN_INLINE int64_t repeats() const { return ceil_div(kShortestRow, job.channels); }
    FASTGEN_INLINE int64_t row() const { return repeats() * job.channels; }
    FASTGEN_INLINE int64_t padded() const { return aligned<T>(row()); }
    FASTGEN_INLINE int64_t chunks() const {
        return max_of(1, positions() / (repeats() * max_of(kRowsInT, kChunkElements / row())));
    }
    FASTGEN_INLINE int64_t first_position(int64_t chunk) const { return positions() * chunk / chunks(); }
    FASTGEN_INLINE double per_group() const { return static_cast<double>(job.channels / job.groups); }

    // Of a chunk or of an image: means and squared deviations, [2][groups].
    FASTGEN_INLINE int64_t moments_size() const { return aligned<double>(2 * job.groups); }
    FASTGEN_INLINE int64_t image_size() const { return chunks() * moments_size(); }
    FASTGEN_INLINE int64_t thread_size() const { return moments_size() + 5 * aligned<double>(padded()); }
    FASTGEN_INLINE int64_t scratch_size() const {
        return max_of(job.threads, 2) * image_size() + job.threads * thread_size();
    }

    // The part of the scratch that belongs to one thread.
    struct Own {
        double *moments, *means, *squares;  // of the image per group; of a chunk per column of its rows
        T *centre, *scale, *shift;          // y = (x - centre) * scale + shift, per column
    };
    FASTGEN_INLINE Own own(int64_t thread) const {
        double* next = scratch + max_of(job.threads, 2) * image_size() + thread * thread_size();
        const auto take = [&](int64_t size) {
            double* p = next;
            next += size;
            return p;
        };
        const int64_t columns = aligned<double>(padded());
        Own own;
        own.moments = take(moments_size());
        own.means = take(columns);
        own.squares = take(columns);
        own.centre = reinterpret_cast<T*>(take(columns));
        own.scale = reinterpret_cast<T*>(take(columns));
        own.shift = reinterpret_cast<T*>(take(columns));
        return own;
    }

    FASTGEN_INLINE bool is_dense() const {
        return job.input.c == 1 && job.input.w == job.channels && job.input.h == job.width * job.channels;
    }
    FASTGEN_INLINE E* output(int64_t n, int64_t position) const {
        return job.output + (n * positions() + position) * job.channels;
    }
    FASTGEN_INLINE const E* source(int64_t n, int64_t position) const {
        return is_dense() ? job.input.data + n * job.input.n + position * job.channels : output(n, position);
    }

    void fetch_positions(int64_t n, int64_t begin, int64_t end) const {
        const Image<E>& from = job.input;
        const bool one_line = from.h == job.width * from.w;
        for (int64_t p = begin; p < end;) {
            const int64_t y = one_line ? 0 : p / job.width, x = p - y * job.width;
            const int64_t count = one_line ? end - p : min_of(end - p, job.width - x);
            const Image<E> line{from.data + y * from.h + x * from.w, from.n, from.c, 0, from.w};
            fetch_rows(line, n, 0, 1, count, job.channels, DenseLines<E>{output(n, p), 0, count, job.channels});
            p += count;
        }
    }

    // Pass 1.
    void summarise(int64_t n, int64_t chunk, double* moments, const Own& own) const {
        const int64_t begin = first_position(chunk), end = first_position(chunk + 1);
        if (!is_dense()) fetch_positions(n, begin, end);
        const E* from = source(n, begin);
        const int64_t rows = (end - begin) / repeats();
        if (rows) {
            int64_t j = 0;
            for (; j + kTileVecs * kLanes<T> <= row(); j += kTileVecs * kLanes<T>)
                sum_columns<kTileVecs>(from + j, rows, kLanes<T>, own.means + j, own.squares + j);
            for (; j < row(); j += kLanes<T>) {
                const int lanes = static_cast<int>(min_of(kLanes<T>, row() - j));
                sum_columns<1>(from + j, rows, lanes, own.means + j, own.squares + j);
            }
        }
        // Positions beyond the last whole row are few.
        const E* rest = from + rows * row();
        const int64_t in_rows = rows ? repeats() : 0, rest_positions = (end - begin) - rows * repeats();
        const double count = static_cast<double>(end - begin) * per_group(), in_column = static_cast<double>(rows);
        double *mean = moments, *square = moments + job.groups;
        for (int64_t g = 0; g < 2 * job.groups; ++g) moments[g] = 0;
        add(in_rows, mean, [&](int64_t j, int64_t) { return own.means[j] * in_column; });
        add(rest_positions, mean, [&](int64_t j, int64_t) { return to_double(rest[j]); });
        for (int64_t g = 0; g < job.groups; ++g) mean[g] /= count;
        add(in_rows, square, [&](int64_t j, int64_t g) {
            const double d = own.means[j] - mean[g];
            return own.squares[j] + in_column * (d * d);
        });
        add(rest_positions, square, [&](int64_t j, int64_t g) {
            const double d = to_double(rest[j]) - mean[g];
            return d * d;
        });
    }

    // Adds value(j, g) of all channels j at `count` positions side by side to the sums of their groups g.
    template <class Value>
    FASTGEN_INLINE void add(int64_t count, double* sums, const Value& value) const {
        const int64_t groups = job.groups, channels = job.channels, size = channels / groups;
        for (int64_t p = 0; p < count; ++p) {
            const int64_t j = p * channels;
            if (size == 1) {
                for (int64_t g = 0; g < groups; ++g) sums[g] += value(j + g, g);
                continue;
            }
            for (int64_t g = 0; g < groups; ++g) {
                double parts[4] = {};  // so that no sum waits for the one before
                int64_t c = 0;
                for (; c + 4 <= size; c += 4) {
                    for (int64_t i = 0; i < 4; ++i) parts[i] += value(j + g * size + c + i, g);
                }
                for (; c < size; ++c) parts[c % 4] += value(j + g * size + c, g);
                sums[g] += (parts[0] + parts[1]) + (parts[2] + parts[3]);
            }
        }
    }

    // Mean and squared deviations of columns. The last of the vectors has `lanes`, others are full.
    template <int Vecs>
    FASTGEN_INLINE void sum_columns(const E* from, int64_t rows, int lanes, double* means, double* squares) const {
        constexpr int64_t kColumns = Vecs * kLanes<T>;
        const int64_t pitch = row();
        const auto element = [&](int64_t r, int v) __attribute__((always_inline)) {
            const E* p = from + r * pitch + v * kLanes<T>;
            if constexpr (Vecs > 1) return load(p);
            return load_some(p, lanes);
        };
        Vec<T> pivot[Vecs] = {};
        const int64_t few = min_of(rows, kPivotRows);
        for (int64_t r = 0; r < few; ++r) {
            for (int v = 0; v < Vecs; ++v) pivot[v] += element(r, v);
        }
        for (int v = 0; v < Vecs; ++v) pivot[v] *= broadcast(T(1) / static_cast<T>(few));
        T sums[2][kColumns];
        double totals[2][kColumns] = {};
        for (int64_t first = 0; first < rows; first += kRowsInT) {
            const int64_t last = min_of(rows, first + kRowsInT);
            Vec<T> sum[Vecs] = {}, square[Vecs] = {};
            for (int64_t r = first; r < last; ++r) {
                if constexpr (Vecs > 1) {  // the next tile of the row
                    for (int64_t i = 0; i < kColumns * static_cast<int64_t>(sizeof(E)); i += 64)
                        __builtin_prefetch(reinterpret_cast<const char*>(from + r * pitch + kColumns) + i);
                }
                for (int v = 0; v < Vecs; ++v) {
                    const Vec<T> d = element(r, v) - pivot[v];
                    sum[v] += d;
                    square[v] = fma(d, d, square[v]);
                }
            }
            for (int v = 0; v < Vecs; ++v) {
                store(sums[0] + v * kLanes<T>, sum[v]);
                store(sums[1] + v * kLanes<T>, square[v]);
            }
            for (int64_t j = 0; j < kColumns; ++j) {
                totals[0][j] += sums[0][j];
                totals[1][j] += sums[1][j];
            }
        }
        for (int v = 0; v < Vecs; ++v) store(sums[0] + v * kLanes<T>, pivot[v]);
        const double share = 1 / static_cast<double>(rows);
        for (int64_t j = 0; j < kColumns; ++j) {
            const double mean = totals[0][j] * share;
            means[j] = sums[0][j] + mean;
            squares[j] = totals[1][j] - totals[0][j] * mean;
        }
    }

    // From the moments of the chunks of an image those of the image, and what pass 2 multiplies by and adds.
    void merge(const double* moments, const Own& own) const {
        const int64_t groups = job.groups;
        double *means = own.moments, *squares = own.moments + groups;
        const double all = static_cast<double>(positions());
        for (int64_t g = 0; g < 2 * groups; ++g) own.moments[g] = 0;
        for (int64_t k = 0; k < chunks(); ++k) {
            const double share = static_cast<double>(first_position(k + 1) - first_position(k)) / all;
            const double* of_chunk = moments + k * moments_size();
            for (int64_t g = 0; g < groups; ++g) means[g] += of_chunk[g] * share;
        }
        for (int64_t k = 0; k < chunks(); ++k) {
            const double count = static_cast<double>(first_position(k + 1) - first_position(k)) * per_group();
            const double* of_chunk = moments + k * moments_size();
            for (int64_t g = 0; g < groups; ++g) {
                const double d = of_chunk[g] - means[g];
                squares[g] += of_chunk[groups + g] + count * (d * d);
            }
        }
        const int64_t size = job.channels / groups;
        for (int64_t g = 0; g < groups; ++g) {
            const double var = squares[g] / (all * per_group());
            const double inverse_std = 1 / std::sqrt((var < 0 ? 0 : var) + job.eps);  // a NaN stays one
            const T centre = static_cast<T>(means[g]);
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                const double scale = inverse_std * (job.weight ? to_double(job.weight[c]) : 1);
                const double bias = job.bias ? to_double(job.bias[c]) : 0;
                const double shift = (centre - means[g]) * scale + bias;
                for (int64_t j = c; j < row(); j += job.channels) {
                    own.centre[j] = centre;
                    own.scale[j] = static_cast<T>(scale);
                    own.shift[j] = static_cast<T>(shift);
                }
            }
        }
        for (int64_t j = row(); j < padded(); ++j) own.centre[j] = own.scale[j] = own.shift[j] = T(0);
    }

    // Pass 2.
    template <Activation A>
    void apply(int64_t n, int64_t chunk, const Own& own) const {
        const int64_t begin = first_position(chunk), elements = (first_position(chunk + 1) - begin) * job.channels;
        const int64_t pitch = row();
        const E* from = source(n, begin);
        E* to = output(n, begin);
        const T *centre = own.centre, *scale = own.scale, *shift = own.shift;
        const Vec<T> parameter = broadcast(job.parameter);
        const auto value = [=](Vec<T> x, int64_t j) __attribute__((always_inline)) {
            return activate<A>(fma(x - load(centre + j), load(scale + j), load(shift + j)), parameter);
        };
        for (int64_t left = elements; left > 0; left -= pitch, from += pitch, to += pitch) {
            const int64_t length = min_of(pitch, left);
            const int64_t whole = length - length % kLanes<T>;
            // Rounding has a loop of its own, so that more vectors are on their way at a time.
            T* line = std::is_same_v<E, T> ? reinterpret_cast<T*>(to) : reinterpret_cast<T*>(own.means);
            for (int64_t j = 0; j < whole; j += kLanes<T>) store(line + j, value(load(from + j), j));
            if constexpr (!std::is_same_v<E, T>) {
                for (int64_t j = 0; j < whole; j += kLanes<T>) store(to + j, load(line + j));
            }
            if (whole == length) continue;
            const int lanes = static_cast<int>(length - whole);
            store_n(to + whole, value(load_n(from + whole, lanes), whole), lanes);
        }
    }

    // Small images are normalised by the thread that summed them. Large ones come one after the other, all threads at
    // each; a thread goes back over its chunks, as the last are still in its cache.
    template <Activation A>
    void run() const {
        const int64_t bytes = positions() * job.channels * static_cast<int64_t>(sizeof(E));
        const bool apart = job.batch >= job.threads && bytes <= kImageBytes;
#pragma omp parallel num_threads(job.threads)
        {
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            const Own mine = own(thread);
            if (apart) {
                double* moments = scratch + thread * image_size();
                for (int64_t n = job.batch * thread / threads; n < job.batch * (thread + 1) / threads; ++n) {
                    for (int64_t k = 0; k < chunks(); ++k) summarise(n, k, moments + k * moments_size(), mine);
                    merge(moments, mine);
                    for (int64_t k = chunks(); k-- > 0;) apply<A>(n, k, mine);
                }
            } else {
                const int64_t begin = chunks() * thread / threads, end = chunks() * (thread + 1) / threads;
                for (int64_t n = 0; n < job.batch; ++n) {
                    // Two in turn: some threads still read those of the image before.
                    double* moments = scratch + n % 2 * image_size();
                    for (int64_t k = begin; k < end; ++k) summarise(n, k, moments + k * moments_size(), mine);
#pragma omp barrier
                    if (begin == end) continue;
                    merge(moments, mine);
                    for (int64_t k = end; k-- > begin;) apply<A>(n, k, mine);
                }
            }
        }
    }
};

}  // namespace

#define FASTGEN_DEFINE_GROUP_NORM_ACT(E)                                                                             \
    int64_t group_norm_act_scratch_size(const GroupNormAct<E>& job) { return Norm<E>{job, nullptr}.scratch_size(); } \
    void group_norm_act(const GroupNormAct<E>& job, double* scratch) {                                               \
        const Norm<E> norm{job, scratch};                                                                            \
        with_activation(job.activation, [&](auto tag) { norm.template run<decltype(tag)::value>(); });               \
    }

FASTGEN_DEFINE_GROUP_NORM_ACT(BFloat16)
FASTGEN_DEFINE_GROUP_NORM_ACT(float)
FASTGEN_DEFINE_GROUP_NORM_ACT(double)

}  // namespace fastgen::FASTGEN_ISA

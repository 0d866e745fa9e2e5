// fastgen._cpu.concat_elu_*: ELU of features and of their negatives, with dropout.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/concat_elu.h"
#include "cpu/isa.h"
#include "large_pages.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_CONCAT_ELU)

namespace fastgen {
namespace {

template <class T>
struct Kernels {
    void (*forward)(const ConcatElu<T>&, T*);
    void (*gradient)(const ConcatElu<T>&, const T*, T* const*);
};

template <class T>
const Kernels<T>& kernels() {
    static constexpr Kernels<T> table[] = {
#define FASTGEN_KERNELS(ISA) {ISA::concat_elu, ISA::concat_elu_gradient},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

using Addresses = std::vector<uintptr_t>;
using Channels = std::vector<int64_t>;

template <class T>
std::vector<T*> pointers(const Addresses& addresses) {
    std::vector<T*> result;
    for (const uintptr_t address : addresses) result.push_back(pointer<T>(address));
    return result;
}

int64_t features(const Channels& channels, bool negate) {
    int64_t sum = 0;
    for (const int64_t count : channels) sum += count;
    return negate ? 2 * sum : sum;
}

// What of a job does not point to memory of the call.
template <class T>
ConcatElu<T> job_of(int64_t samples, int64_t pixels, const Channels& channels, bool negate, int64_t dropped,
                    double scale, uint64_t seed, int64_t threads) {
    if (dropped && features(channels, negate) > kConcatEluMaxDropout) {
        throw std::invalid_argument("with dropout, outputs must have at most " + std::to_string(kConcatEluMaxDropout) +
                                    " channels");
    }
    const auto count = static_cast<int64_t>(channels.size());
    return {samples, pixels, count, nullptr, channels.data(), negate, dropped, scale, seed, threads};
}

template <class T>
void forward(int64_t samples, int64_t pixels, const Addresses& inputs, const Channels& channels, bool negate,
             int64_t dropped, double scale, uint64_t seed, int64_t threads, uintptr_t output) {
    ConcatElu<T> job = job_of<T>(samples, pixels, channels, negate, dropped, scale, seed, threads);
    const std::vector<const T*> from = pointers<const T>(inputs);
    job.inputs = from.data();
    advise_large_pages(output, samples * pixels * features(channels, negate) * sizeof(T));
    kernels<T>().forward(job, pointer<T>(output));
}

template <class T>
void gradient(int64_t samples, int64_t pixels, const Addresses& inputs, const Channels& channels, bool negate,
              int64_t dropped, double scale, uint64_t seed, int64_t threads, uintptr_t grad,
              const Addresses& grad_inputs) {
    ConcatElu<T> job = job_of<T>(samples, pixels, channels, negate, dropped, scale, seed, threads);
    const std::vector<const T*> from = pointers<const T>(inputs);
    const std::vector<T*> to = pointers<T>(grad_inputs);
    job.inputs = from.data();
    for (size_t i = 0; i < to.size(); ++i) {
        advise_large_pages(grad_inputs[i], samples * pixels * channels[i] * sizeof(T));
    }
    kernels<T>().gradient(job, pointer<const T>(grad), to.data());
}

template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def(("concat_elu_" + dtype).c_str(), forward<T>, release(),
               "(samples, pixels, inputs, channels, negate, dropped, scale, seed, threads, output)");
    module.def(("concat_elu_gradient_" + dtype).c_str(), gradient<T>, release(),
               "(samples, pixels, inputs, channels, negate, dropped, scale, seed, threads, grad, grad_inputs)");
}

}  // namespace

void bind_concat_elu(pybind11::module_& module) {
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

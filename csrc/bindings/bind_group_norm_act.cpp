// fastgen._cpu.group_norm_act_*: normalisation by groups of channels with an activation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "cpu/group_norm_act.h"
#include "cpu/isa.h"
#include "large_pages.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_GROUP_NORM_ACT)

namespace fastgen {
namespace {

using Sizes = std::array<int64_t, 4>;

template <class E>
struct Kernels {
    int64_t (*scratch_size)(const GroupNormAct<E>&);
    void (*run)(const GroupNormAct<E>&, double*);
};

template <class E>
const Kernels<E>& kernels() {
    static constexpr Kernels<E> table[] = {
#define FASTGEN_KERNELS(ISA) {ISA::group_norm_act_scratch_size, ISA::group_norm_act},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

template <class E>
GroupNormAct<E> job_of(const Sizes& shape, int64_t groups, int64_t threads) {
    GroupNormAct<E> job{};
    job.batch = shape[0];
    job.channels = shape[1];
    job.height = shape[2];
    job.width = shape[3];
    job.groups = groups;
    job.threads = threads;
    return job;
}

template <class E>
int64_t scratch_size(const Sizes& shape, int64_t groups, int64_t threads) {
    return kernels<E>().scratch_size(job_of<E>(shape, groups, threads));
}

template <class E>
void run(const Sizes& shape, int64_t groups, int64_t threads, uintptr_t input, Sizes strides, uintptr_t weight,
         uintptr_t bias, double eps, Activation activation, double parameter, uintptr_t output, uintptr_t scratch) {
    // A dimension of one element may have any stride: here that of channels-last memory, or one that makes lines one.
    if (shape[1] == 1) strides[1] = 1;
    if (shape[3] == 1) strides[3] = strides[1] == 1 ? shape[1] : 1;
    if (shape[2] == 1) strides[2] = shape[3] * strides[3];
    GroupNormAct<E> job = job_of<E>(shape, groups, threads);
    job.input = {pointer<const E>(input), strides[0], strides[1], strides[2], strides[3]};
    job.weight = pointer<const E>(weight);
    job.bias = pointer<const E>(bias);
    job.eps = eps;
    job.activation = activation;
    job.parameter = static_cast<SumOf<E>>(parameter);
    job.output = pointer<E>(output);
    advise_large_pages(output, shape[0] * shape[1] * shape[2] * shape[3] * sizeof(E));
    kernels<E>().run(job, pointer<double>(scratch));
}

// Arguments by position: names cost a call a microsecond.
template <class E>
void define(pybind11::module_& module, const std::string& dtype) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def(("group_norm_act_scratch_size_" + dtype).c_str(), scratch_size<E>,
               "(shape, groups, threads): in doubles");
    module.def(("group_norm_act_" + dtype).c_str(), run<E>, release(),
               "(shape, groups, threads, input, strides, weight or 0, bias or 0, eps, activation, parameter, output, "
               "scratch)");
}

}  // namespace

void bind_group_norm_act(pybind11::module_& module) {
    define<BFloat16>(module, "bfloat16");
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

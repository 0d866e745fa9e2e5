// fastgen._cpu.channel_* and conv_weight_gradient_*: what a step of training a convolution needs beside convolutions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>

#include "conv_tensors.h"
#include "cpu/channel_pass.h"
#include "cpu/conv_weight_gradient.h"
#include "cpu/isa.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_CHANNEL_PASS)
FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_CONV_WEIGHT_GRADIENT)

namespace fastgen {
namespace {

template <class T>
struct TrainingKernels {
    int64_t (*pass_scratch_size)(const ChannelPass<T>&);
    void (*statistics)(const ChannelPass<T>&, T*, T*, T*);
    void (*forward)(const ChannelPass<T>&, T*, T*);
    void (*reductions)(const ChannelPass<T>&, T*, T*, T*);
    void (*backward)(const ChannelPass<T>&, const T*, const T*, T*, T*);
    int64_t (*weight_scratch_size)(const WeightGradientShape&, const T*);
    void (*weight_gradient)(const WeightGradientShape&, const Image<T>&, const Image<T>&, T*, T*);
};

template <class T>
const TrainingKernels<T>& kernels() {
    static constexpr TrainingKernels<T> table[] = {
#define FASTGEN_KERNELS(ISA)                                                                          \
    {ISA::channel_pass_scratch_size, ISA::channel_statistics, ISA::channel_forward,                   \
     ISA::channel_reductions,        ISA::channel_backward,   ISA::conv_weight_gradient_scratch_size, \
     ISA::conv_weight_gradient},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

// The first part of a pass's scratch holds vectors of the channels.
enum ChannelVector : int64_t { kScale, kShift, kMean, kInverseStd, kGradMean, kGradNormalisedMean, kVectors };

template <class T>
T* channel_vector(uintptr_t scratch, int64_t channels, int64_t i) {
    return pointer<T>(scratch) + i * line_up<T>(channels);
}

template <class T>
int64_t channel_scratch_size(int64_t positions, int64_t channels) {
    ChannelPass<T> pass{};
    pass.positions = positions;
    pass.channels = channels;
    return kVectors * line_up<T>(channels) + kernels<T>().pass_scratch_size(pass);
}

template <class T>
ChannelPass<T> channel_pass(const Pair& size, int64_t threads, uintptr_t conv, const ChannelTensors& tensors,
                            double eps, uintptr_t scratch) {
    const int64_t channels = size[1];
    const auto vector = [&](int64_t i) { return channel_vector<T>(scratch, channels, i); };
    fold<T>({0, tensors[1], tensors[2], tensors[3], tensors[4]}, eps, channels, vector(kScale), vector(kShift));
    const T *mean = pointer<const T>(tensors[1]), *var = pointer<const T>(tensors[2]);
    for (int64_t c = 0; c < channels; ++c) {
        vector(kMean)[c] = mean ? mean[c] : T(0);
        vector(kInverseStd)[c] = static_cast<T>(var ? 1 / std::sqrt(var[c] + eps) : 1);
    }
    return {size[0],
            channels,
            threads,
            pointer<const T>(conv),
            nullptr,
            vector(kScale),
            vector(kShift),
            vector(kMean),
            vector(kInverseStd),
            Activation::none,
            T(0)};
}

template <class T>
void statistics(const Pair& size, int64_t threads, uintptr_t conv, uintptr_t mean, uintptr_t var, uintptr_t scratch) {
    ChannelPass<T> pass{};
    pass.positions = size[0];
    pass.channels = size[1];
    pass.threads = threads;
    pass.conv = pointer<const T>(conv);
    kernels<T>().statistics(pass, pointer<T>(mean), pointer<T>(var), channel_vector<T>(scratch, size[1], kVectors));
}

template <class T>
void channel_forward(const Pair& size, int64_t threads, uintptr_t conv, const ChannelTensors& tensors, double eps,
                     Activation activation, double parameter, uintptr_t output, uintptr_t scratch) {
    ChannelPass<T> pass = channel_pass<T>(size, threads, conv, tensors, eps, scratch);
    pass.activation = activation;
    pass.parameter = static_cast<T>(parameter);
    kernels<T>().forward(pass, pointer<T>(output), channel_vector<T>(scratch, size[1], kVectors));
}

// Writes the gradients of the convolution's result, and of shift and scale of the BatchNorm.
template <class T>
void channel_backward(const Pair& size, int64_t threads, uintptr_t conv, uintptr_t grad, const ChannelTensors& tensors,
                      double eps, Activation activation, double parameter, bool batch_statistics, uintptr_t result,
                      uintptr_t grad_sum, uintptr_t grad_normalised_sum, uintptr_t scratch) {
    const int64_t channels = size[1];
    ChannelPass<T> pass = channel_pass<T>(size, threads, conv, tensors, eps, scratch);
    pass.grad = pointer<const T>(grad);
    pass.activation = activation;
    pass.parameter = static_cast<T>(parameter);
    T* rest = channel_vector<T>(scratch, channels, kVectors);
    T *first = pointer<T>(grad_sum), *second = pointer<T>(grad_normalised_sum);
    kernels<T>().reductions(pass, first, second, rest);
    T* grad_mean = channel_vector<T>(scratch, channels, kGradMean);
    T* grad_normalised_mean = channel_vector<T>(scratch, channels, kGradNormalisedMean);
    for (int64_t c = 0; c < channels; ++c) {
        grad_mean[c] = batch_statistics ? first[c] / static_cast<T>(size[0]) : T(0);
        grad_normalised_mean[c] = batch_statistics ? second[c] / static_cast<T>(size[0]) : T(0);
    }
    kernels<T>().backward(pass, grad_mean, grad_normalised_mean, pointer<T>(result), rest);
}

WeightGradientShape weight_shape(int64_t batch, int64_t threads, int64_t groups, const Pair& channels,
                                 const Pair& in_size, const Pair& out_size, const Pair& kernel, const Pair& stride,
                                 const Pair& padding, const Pair& dilation) {
    return {batch,
            threads,
            groups,
            channels[0] / groups,
            channels[1] / groups,
            {in_size[0], in_size[1]},
            {out_size[0], out_size[1]},
            {kernel[0], kernel[1]},
            {stride[0], stride[1]},
            {padding[0], padding[1]},
            {dilation[0], dilation[1]}};
}

template <class T>
void weight_gradient(const WeightGradientShape& shape, uintptr_t input, const Strides& input_strides, uintptr_t grad,
                     const Strides& grad_strides, uintptr_t result, uintptr_t scratch) {
    kernels<T>().weight_gradient(shape, image<T>(input, input_strides), image<T>(grad, grad_strides),
                                 pointer<T>(result), pointer<T>(scratch));
}

template <class T>
void define_training(pybind11::module_& module, const std::string& dtype) {
    namespace py = pybind11;
    using release = py::call_guard<py::gil_scoped_release>;
    module.def(("channel_scratch_size_" + dtype).c_str(), channel_scratch_size<T>, py::arg("positions"),
               py::arg("channels"));
    module.def(("channel_statistics_" + dtype).c_str(), statistics<T>, py::arg("size"), py::arg("threads"),
               py::arg("conv"), py::arg("mean"), py::arg("var"), py::arg("scratch"), release());
    module.def(("channel_forward_" + dtype).c_str(), channel_forward<T>, py::arg("size"), py::arg("threads"),
               py::arg("conv"), py::arg("tensors"), py::arg("eps"), py::arg("activation"), py::arg("parameter"),
               py::arg("output"), py::arg("scratch"), release());
    module.def(("channel_backward_" + dtype).c_str(), channel_backward<T>, py::arg("size"), py::arg("threads"),
               py::arg("conv"), py::arg("grad"), py::arg("tensors"), py::arg("eps"), py::arg("activation"),
               py::arg("parameter"), py::arg("batch_statistics"), py::arg("result"), py::arg("grad_sum"),
               py::arg("grad_normalised_sum"), py::arg("scratch"), release());
    module.def(("conv_weight_gradient_scratch_size_" + dtype).c_str(),
               [](const WeightGradientShape& shape) { return kernels<T>().weight_scratch_size(shape, nullptr); },
               py::arg("shape"));
    module.def(("conv_weight_gradient_" + dtype).c_str(), weight_gradient<T>, py::arg("shape"), py::arg("input"),
               py::arg("input_strides"), py::arg("grad"), py::arg("grad_strides"), py::arg("result"),
               py::arg("scratch"), release());
}

}  // namespace

void bind_conv_training(pybind11::module_& module) {
    namespace py = pybind11;
    py::class_<WeightGradientShape>(module, "WeightGradientShape", "As of a transposed convolution.")
        .def(py::init(&weight_shape), py::arg("batch"), py::arg("threads"), py::arg("groups"), py::arg("channels"),
             py::arg("in_size"), py::arg("out_size"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
             py::arg("dilation"))
        .def_property_readonly("minimal", &WeightGradientShape::minimal);
    define_training<float>(module, "float32");
    define_training<double>(module, "float64");
}

}  // namespace fastgen

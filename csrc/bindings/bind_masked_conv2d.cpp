// fastgen._cpu.masked_conv2d_*: masked and shifted convolutions of float32 and float64 tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "conv_tensors.h"
#include "cpu/isa.h"
#include "cpu/masked_conv2d.h"
#include "large_pages.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_MASKED_CONV2D)

namespace fastgen {
namespace {

template <class T>
struct Kernels {
    int64_t (*forward_scratch)(const MaskedConv2d&, const T*);
    int64_t (*input_gradient_scratch)(const MaskedConv2d&, const T*);
    int64_t (*weight_gradient_scratch)(const MaskedConv2d&, const T*);
    void (*forward)(const MaskedConv2d&, const Image<T>&, const T*, const T*, T*, T*);
    void (*input_gradient)(const MaskedConv2d&, const Image<T>&, const T*, T*, T*);
    void (*weight_gradient)(const MaskedConv2d&, const Image<T>&, const Image<T>&, T*, T*, T*);
};

template <class T>
const Kernels<T>& kernels() {
    static constexpr Kernels<T> table[] = {
#define FASTGEN_KERNELS(ISA)                                                                \
    {ISA::masked_conv2d_forward_scratch,         ISA::masked_conv2d_input_gradient_scratch, \
     ISA::masked_conv2d_weight_gradient_scratch, ISA::masked_conv2d_forward,                \
     ISA::masked_conv2d_input_gradient,          ISA::masked_conv2d_weight_gradient},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

MaskedConv2d checked(const MaskedConv2d& conv) {
    if (conv.above + conv.splits > kMaskedConv2dMaxTaps) {
        throw std::invalid_argument("rows above the own one, and splits, must be at most " +
                                    std::to_string(kMaskedConv2dMaxTaps));
    }
    return conv;
}

using Sizes = std::array<int64_t, 4>;
using Kernel = std::array<int64_t, 2>;

MaskedConv2d make_masked(const Sizes& input, int64_t out_channels, const Kernel& kernel, bool own_color, int64_t colors,
                         int64_t splits, int64_t threads) {
    const int64_t above = kernel[0] / 2, left = kernel[1] / 2;
    return checked({input[0], input[1], out_channels, input[2], input[3], kernel[0], kernel[1], above, left, left + 1,
                    own_color, colors, splits, threads});
}

// Over a window whose last row is the pixel's own, of which `left` columns lie to the left.
MaskedConv2d make_shifted(const Sizes& input, int64_t out_channels, const Kernel& kernel, int64_t left,
                          int64_t threads) {
    if (left < 0 || left >= kernel[1]) throw std::invalid_argument("left must be a column of the kernel");
    return checked({input[0], input[1], out_channels, input[2], input[3], kernel[0], kernel[1], kernel[0] - 1, left,
                    kernel[1], true, 1, 1, threads});
}

template <class T>
std::array<int64_t, 3> scratch(const MaskedConv2d& conv) {
    const Kernels<T>& of = kernels<T>();
    return {of.forward_scratch(conv, nullptr), of.input_gradient_scratch(conv, nullptr),
            of.weight_gradient_scratch(conv, nullptr)};
}

template <class T>
void forward(const MaskedConv2d& conv, uintptr_t input, const Strides& strides, uintptr_t weight, uintptr_t bias,
             uintptr_t output, uintptr_t scratch) {
    advise_large_pages(output, conv.batch * conv.height * conv.width * conv.out_channels * sizeof(T));
    kernels<T>().forward(conv, image<T>(input, strides), pointer<T>(weight), pointer<T>(bias), pointer<T>(output),
                         pointer<T>(scratch));
}

template <class T>
void input_gradient(const MaskedConv2d& conv, uintptr_t grad, const Strides& strides, uintptr_t weight,
                    uintptr_t grad_input, uintptr_t scratch) {
    advise_large_pages(grad_input, conv.batch * conv.height * conv.width * conv.in_channels * sizeof(T));
    kernels<T>().input_gradient(conv, image<T>(grad, strides), pointer<T>(weight), pointer<T>(grad_input),
                                pointer<T>(scratch));
}

template <class T>
void weight_gradient(const MaskedConv2d& conv, uintptr_t input, const Strides& input_strides, uintptr_t grad,
                     const Strides& grad_strides, uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t scratch) {
    kernels<T>().weight_gradient(conv, image<T>(input, input_strides), image<T>(grad, grad_strides),
                                 pointer<T>(grad_weight), pointer<T>(grad_bias), pointer<T>(scratch));
}

template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    namespace py = pybind11;
    using release = py::call_guard<py::gil_scoped_release>;
    module.def(("masked_conv2d_scratch_" + dtype).c_str(), scratch<T>, py::arg("conv"),
               "Elements of scratch for forward, input gradient, weight gradient.");
    module.def(("masked_conv2d_forward_" + dtype).c_str(), forward<T>, py::arg("conv"), py::arg("input"),
               py::arg("strides"), py::arg("weight"), py::arg("bias"), py::arg("output"), py::arg("scratch"),
               release());
    module.def(("masked_conv2d_input_gradient_" + dtype).c_str(), input_gradient<T>, py::arg("conv"), py::arg("grad"),
               py::arg("strides"), py::arg("weight"), py::arg("grad_input"), py::arg("scratch"), release());
    module.def(("masked_conv2d_weight_gradient_" + dtype).c_str(), weight_gradient<T>, py::arg("conv"),
               py::arg("input"), py::arg("input_strides"), py::arg("grad"), py::arg("grad_strides"),
               py::arg("grad_weight"), py::arg("grad_bias"), py::arg("scratch"), release());
}

}  // namespace

void bind_masked_conv2d(pybind11::module_& module) {
    namespace py = pybind11;
    py::class_<MaskedConv2d>(module, "MaskedConv2d", "Sizes and open taps of one call.")
        .def(py::init(&make_masked), py::arg("input"), py::arg("out_channels"), py::arg("kernel"), py::arg("own_color"),
             py::arg("colors"), py::arg("splits"), py::arg("threads"))
        .def_static("shifted", &make_shifted, py::arg("input"), py::arg("out_channels"), py::arg("kernel"),
                    py::arg("left"), py::arg("threads"));
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

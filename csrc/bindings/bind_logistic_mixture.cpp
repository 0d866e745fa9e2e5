// fastgen._cpu.logistic_mixture_*: the likelihood of float32 and float64 tensors, and a draw for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/logistic_mixture.h"
#include "cpu/isa.h"
#include "cpu/logistic_mixture_nll.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_LOGISTIC_MIXTURE_NLL)

namespace fastgen {
namespace {

template <class T>
struct Kernels {
    int64_t (*scratch)(const LogisticMixtureNll&, const T*);
    void (*nll)(const LogisticMixtureNll&, const PixelTensor<const T>&, const PixelTensor<const uint8_t>&, T*, T*);
    void (*gradient)(const LogisticMixtureNll&, const PixelTensor<const T>&, const PixelTensor<const uint8_t>&,
                     const PixelTensor<const T>&, const PixelTensor<T>&, T*);
};

template <class T>
const Kernels<T>& kernels() {
    static constexpr Kernels<T> table[] = {
#define FASTGEN_KERNELS(ISA) \
    {ISA::logistic_mixture_nll_scratch, ISA::logistic_mixture_nll, ISA::logistic_mixture_nll_gradient},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

using Strides = std::array<int64_t, 4>;

template <class T>
PixelTensor<T> tensor(uintptr_t data, const Strides& strides) {
    return {pointer<T>(data), strides[0], strides[1], strides[2], strides[3]};
}

template <class T>
int64_t scratch(const LogisticMixtureNll& job) {
    return kernels<T>().scratch(job, nullptr);
}

template <class T>
void nll(const LogisticMixtureNll& job, uintptr_t params, const Strides& strides, uintptr_t images,
         const Strides& image_strides, uintptr_t nll, uintptr_t scratch) {
    kernels<T>().nll(job, tensor<const T>(params, strides), tensor<const uint8_t>(images, image_strides),
                     pointer<T>(nll), pointer<T>(scratch));
}

template <class T>
void gradient(const LogisticMixtureNll& job, uintptr_t params, const Strides& strides, uintptr_t images,
              const Strides& image_strides, uintptr_t grad, const std::array<int64_t, 3>& grad_strides,
              uintptr_t gradient, const Strides& gradient_strides, uintptr_t scratch) {
    const PixelTensor<const T> of_nll{pointer<const T>(grad), grad_strides[0], 0, grad_strides[1], grad_strides[2]};
    kernels<T>().gradient(job, tensor<const T>(params, strides), tensor<const uint8_t>(images, image_strides), of_nll,
                          tensor<T>(gradient, gradient_strides), pointer<T>(scratch));
}

void draw(uintptr_t params, int64_t pixels, int64_t components, int64_t colours, int64_t levels, uintptr_t uniforms,
          double inverse_temperature, uintptr_t encoding, uintptr_t drawn) {
    const int64_t count = logistic_mixture_params(colours, components);
    for (int64_t i = 0; i < pixels; ++i) {
        logistic_mixture_draw(pointer<const float>(params) + i * count, components, colours, levels,
                              pointer<const float>(uniforms) + i * (1 + colours), inverse_temperature,
                              pointer<const float>(encoding), pointer<int32_t>(drawn) + i * colours);
    }
}

template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    namespace py = pybind11;
    using release = py::call_guard<py::gil_scoped_release>;
    module.def(("logistic_mixture_nll_scratch_" + dtype).c_str(), scratch<T>, py::arg("job"), "Elements of scratch.");
    module.def(("logistic_mixture_nll_" + dtype).c_str(), nll<T>, py::arg("job"), py::arg("params"), py::arg("strides"),
               py::arg("images"), py::arg("image_strides"), py::arg("nll"), py::arg("scratch"), release());
    module.def(("logistic_mixture_nll_gradient_" + dtype).c_str(), gradient<T>, py::arg("job"), py::arg("params"),
               py::arg("strides"), py::arg("images"), py::arg("image_strides"), py::arg("grad"),
               py::arg("grad_strides"), py::arg("gradient"), py::arg("gradient_strides"), py::arg("scratch"),
               release());
}

}  // namespace

void bind_logistic_mixture(pybind11::module_& module) {
    namespace py = pybind11;
    py::class_<LogisticMixtureNll>(module, "LogisticMixtureNll", "Sizes of one call.")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(), py::arg("batch"),
             py::arg("height"), py::arg("width"), py::arg("colours"), py::arg("components"), py::arg("levels"),
             py::arg("threads"));
    define<float>(module, "float32");
    define<double>(module, "float64");
    module.def("logistic_mixture_draw", draw, py::arg("params"), py::arg("pixels"), py::arg("components"),
               py::arg("colours"), py::arg("levels"), py::arg("uniforms"), py::arg("inverse_temperature"),
               py::arg("encoding"), py::arg("drawn"), "Levels [pixels, colours] of dense float32 tensors, for tests.");
}

}  // namespace fastgen

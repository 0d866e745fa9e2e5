// fastgen._cpu.ConvPlan and conv_bn_act_*: convolutions by phases with BatchNorm and activation in the epilogue.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "conv_tensors.h"
#include "cpu/isa.h"
#include "cpu/phase_plan.h"
#include "cpu/tap_conv.h"
#include "large_pages.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_TAP_CONV)

namespace fastgen {
namespace {

template <class E>
struct ConvKernels {
    int64_t (*packed_size)(const ConvPlan&, const E*);
    int64_t (*scratch_size)(const ConvPlan&, const TapConvCall<E>&);
    void (*pack)(const ConvPlan&, const ConvWeight<E>&, E*, int64_t);
    void (*run)(const ConvPlan&, const TapConvCall<E>&, SumOf<E>*);
};

template <class E>
const ConvKernels<E>& conv_kernels() {
    static constexpr ConvKernels<E> table[] = {
#define FASTGEN_KERNELS(ISA) {ISA::tap_conv_packed_size, ISA::tap_conv_scratch_size, ISA::tap_conv_pack, ISA::tap_conv},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

struct Plan {
    ConvShape shape;
    const ConvElement* element;
    std::shared_ptr<const ConvPlan> conv;
    std::string layout;

    const ConvPlan& get() const { return *conv; }

    int64_t in_channels() const { return shape.groups * shape.in_channels; }
    int64_t out_channels() const { return shape.groups * shape.out_channels; }
};

// All that packed weights depend on, but the weights: plans of equal layout share them, so that images of another size
// find them packed.
std::string layout_of(const ConvPlan& conv, const ConvShape& shape) {
    std::vector<int64_t> numbers{shape.transposed, shape.groups, shape.in_channels, shape.out_channels, shape.y.kernel,
                                 shape.x.kernel,   conv.minimal, conv.overlap_add,  conv.element_row,   conv.depthwise};
    if (conv.element_row || conv.depthwise) {
        // All kernel elements in order.
    } else if (conv.overlap_add) {
        for (const OverlapAxis* axis : {&conv.overlap_y, &conv.overlap_x}) numbers.push_back(axis->stride);
    } else {
        for (const AxisPlan* axis : {&conv.y, &conv.x}) {
            numbers.insert(numbers.end(), {axis->in_step, axis->phases, axis->num_slots});
            for (int64_t i = 0; i < axis->num_slots; ++i) {
                const AxisSlot& slot = axis->slots[i];
                numbers.push_back(slot.taps);
                numbers.insert(numbers.end(), slot.kernel, slot.kernel + slot.taps * axis->phases);
            }
        }
    }
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
}

const ConvElement& element_of(const std::string& dtype) {
    if (dtype == "bfloat16") return kConvElement<BFloat16>;
    return dtype == "float64" ? kConvElement<double> : kConvElement<float>;
}

Plan plan_of(const ConvShape& shape, const ConvElement& element) {
    if (shape.y.out_size < 1 || shape.x.out_size < 1) throw std::invalid_argument("a convolution without output");
    const auto plan = make_conv_plan(shape, element);
    return {shape, &element, plan, layout_of(*plan, shape)};
}

Plan make(bool transposed, int64_t groups, const Pair& channels, const Pair& in_size, const Pair& out_size,
          const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& dilation, bool minimal,
          const std::string& dtype) {
    const auto axis = [&](int i) {
        return ConvAxis{in_size[i], out_size[i], kernel[i], stride[i], padding[i], dilation[i]};
    };
    return plan_of({transposed, groups, channels[0] / groups, channels[1] / groups, axis(0), axis(1), minimal},
                   element_of(dtype));
}

// The same convolution of an input of another size; none if that has no output.
std::optional<Plan> resized(const Plan& plan, const Pair& in_size) {
    ConvShape shape = plan.shape;
    for (int i = 0; i < 2; ++i) {
        ConvAxis& axis = i ? shape.x : shape.y;
        if (shape.transposed) {
            axis.out_size += (in_size[i] - axis.in_size) * axis.stride;
        } else {
            const int64_t room = in_size[i] + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1;
            axis.out_size = room < 0 ? 0 : room / axis.stride + 1;
        }
        axis.in_size = in_size[i];
        if (axis.out_size < 1) return std::nullopt;
    }
    return plan_of(shape, *plan.element);
}

constexpr int64_t kMinThreadWork = 1000000;  // multiply-adds: below, waking a thread costs more than it saves
constexpr int64_t kMinPositions = 8;         // in whose multiply-adds a weight comes from memory

// At most `threads`, where each of the positions meets all of the weights.
int64_t worthwhile_threads(int64_t positions, int64_t weights, int64_t threads) {
    return std::max<int64_t>(1, std::min(threads, std::max(positions, kMinPositions) * weights / kMinThreadWork));
}

template <class E>
TapConvCall<E> call_of(int64_t batch, int64_t threads, uintptr_t input, const Strides& strides) {
    TapConvCall<E> call{};
    call.batch = batch;
    call.threads = threads;
    call.input = image<E>(input, strides);
    return call;
}

template <class E>
int64_t scratch_size(const Plan& plan, int64_t batch, int64_t threads, const Strides& strides) {
    return 2 * line_up<SumOf<E>>(plan.out_channels()) +
           conv_kernels<E>().scratch_size(plan.get(), call_of<E>(batch, threads, 0, strides));
}

template <class E>
void pack(const Plan& plan, uintptr_t weight, const std::array<int64_t, 5>& strides, uintptr_t packed,
          int64_t threads) {
    conv_kernels<E>().pack(plan.get(),
                           {pointer<const E>(weight), strides[0], strides[1], strides[2], strides[3], strides[4]},
                           pointer<E>(packed), threads);
}

template <class E>
void run(const Plan& plan, int64_t batch, int64_t threads, uintptr_t input, const Strides& strides, uintptr_t packed,
         const ChannelTensors& tensors, double eps, Activation activation, double parameter, uintptr_t output,
         uintptr_t scratch) {
    using T = SumOf<E>;
    TapConvCall<E> call = call_of<E>(batch, threads, input, strides);
    T* scale = pointer<T>(scratch);
    T* shift = scale + line_up<T>(plan.out_channels());
    fold<E>(tensors, eps, plan.out_channels(), scale, shift);
    call.packed = pointer<const E>(packed);
    call.scale = scale;
    call.shift = shift;
    call.activation = activation;
    call.parameter = static_cast<T>(parameter);
    call.output = pointer<E>(output);
    advise_large_pages(output, batch * plan.shape.y.out_size * plan.shape.x.out_size * plan.out_channels() * sizeof(E));
    conv_kernels<E>().run(plan.get(), call, shift + line_up<T>(plan.out_channels()));
}

// A hash of all bytes, or, of more than 32 KiB, of 64 runs of eight cache lines spread evenly from the first byte to the
// last: when the weights left the caches it is the places that cost, as each is in another page. Eight chains side by
// side, so that neither a multiplication nor a cache miss waits for the one before.
uint64_t fingerprint(uintptr_t data, int64_t bytes) {
    constexpr int64_t kRuns = 64, kRunLines = 8, kLineBytes = 64, kWords = 8, kRunBytes = kRunLines * kLineBytes;
    uint64_t chains[kWords];
    for (int64_t i = 0; i < kWords; ++i) chains[i] = 0xcbf29ce484222325u + i;
    const auto mix = [](uint64_t hash, uint64_t word) {
        hash = (hash ^ word) * 0x100000001b3u;
        return hash ^ hash >> 29;
    };
    const auto mix_lines = [&](const char* from, int64_t lines) {
        for (; lines > 0; --lines, from += kLineBytes) {
            uint64_t words[kWords];
            std::memcpy(words, from, sizeof words);
            for (int64_t i = 0; i < kWords; ++i) chains[i] = mix(chains[i], words[i]);
        }
    };
    const char* const from = pointer<const char>(data);
    if (bytes <= kRuns * kRunBytes) {
        const int64_t lines = bytes / kLineBytes;
        mix_lines(from, lines);
        char last[kLineBytes] = {};
        std::memcpy(last, from + lines * kLineBytes, bytes % kLineBytes);
        mix_lines(last, 1);
    } else {
        constexpr int64_t kAhead = 4;  // runs on their way from memory
        const int64_t spread = bytes - kRunBytes;
        const auto run = [&](int64_t i) { return from + i * spread / (kRuns - 1); };
        for (int64_t i = 0; i < kRuns; ++i) {
            for (int64_t line = 0; line < kRunLines && i + kAhead < kRuns; ++line)
                __builtin_prefetch(run(i + kAhead) + line * kLineBytes);
            mix_lines(run(i), kRunLines);
        }
    }
    uint64_t hash = 0;
    for (const uint64_t chain : chains) hash = mix(hash, chain);
    return hash;
}

// Blocks that each take the result of the one before, in one call: for one image it is the calls that cost. Large
// batches run in groups of images, whose results between blocks stay in the caches and in memory that the allocator
// keeps: it returns more than 32 MB to the system at once, and touching them anew took a fifth of the time. What is
// given when a block is added must stay as it is while the sequence is used; whether the weights did is looked at in
// each run.
template <class E>
class ConvSequence {
    static constexpr int64_t kGroupBytes = 8 << 20;  // of the largest result between two blocks

public:
    explicit ConvSequence(bool contiguous) : contiguous_(contiguous) {}

    void add(const Plan& plan, int64_t threads, uintptr_t packed, const ChannelTensors& tensors, double eps,
             Activation activation, double parameter, uintptr_t weight, int64_t weight_bytes) {
        blocks_.push_back({plan, threads, packed, tensors, eps, activation, parameter, weight, weight_bytes,
                           fingerprint(weight, weight_bytes)});
    }

    // For inputs of another size, if every block takes what it gets then; and the blocks that need another pack.
    std::optional<std::pair<ConvSequence, std::vector<int64_t>>> resized(int64_t batch, int64_t channels, Pair size,
                                                                         int64_t threads) const {
        ConvSequence result = *this;
        std::vector<int64_t> unpacked;
        for (Block& block : result.blocks_) {
            const auto plan = fastgen::resized(block.plan, size);
            if (!plan || channels != plan->in_channels()) return std::nullopt;
            const ConvShape& shape = plan->shape;
            const int64_t weights = channels * shape.out_channels * shape.y.kernel * shape.x.kernel;
            if (plan->layout != block.plan.layout) unpacked.push_back(&block - result.blocks_.data());
            const Pair out_size{shape.y.out_size, shape.x.out_size};
            const Pair& positions = shape.transposed ? size : out_size;  // that meet all weights
            block.plan = *plan;
            block.threads = worthwhile_threads(batch * positions[0] * positions[1], weights, threads);
            channels = plan->out_channels();
            size = out_size;
        }
        return {{result, unpacked}};
    }

    const Plan& plan(int64_t block) const { return blocks_.at(block).plan; }
    void set_packed(int64_t block, uintptr_t packed) { blocks_.at(block).packed = packed; }

    // In sums: two results between blocks, the last one where it is not yet contiguous, and what one block needs.
    int64_t scratch_size(int64_t batch, const Strides& strides) const {
        const int64_t images = (batch + groups(batch) - 1) / groups(batch);
        int64_t most = 0;
        for (size_t i = 0; i < blocks_.size(); ++i) {
            const Strides& from = i ? blocks_[i - 1].strides() : strides;
            most = std::max(most, fastgen::scratch_size<E>(blocks_[i].plan, images, blocks_[i].threads, from));
        }
        return 2 * result_size(images) + last_size(images) + most;
    }

    // Whether the weights are what they were when their blocks were added; if not, nothing is computed.
    bool run(int64_t batch, uintptr_t input, const Strides& strides, uintptr_t output, uintptr_t scratch) const {
        if (!weights_are_the_same()) return false;
        const int64_t count = groups(batch);
        for (int64_t group = 0; group < count; ++group) {
            const int64_t begin = batch * group / count, end = batch * (group + 1) / count;
            run_group(end - begin, input + begin * strides[0] * sizeof(E), strides,
                      output + begin * blocks_.back().image() * sizeof(E), scratch);
        }
        return true;
    }

private:
    struct Block {
        Plan plan;
        int64_t threads;
        uintptr_t packed;
        ChannelTensors tensors;
        double eps;
        Activation activation;
        double parameter;
        uintptr_t weight;
        int64_t weight_bytes;
        uint64_t fingerprint;

        int64_t image() const { return plan.shape.y.out_size * plan.shape.x.out_size * plan.out_channels(); }
        Strides strides() const {  // of its result
            const int64_t channels = plan.out_channels();
            return {image(), 1, plan.shape.x.out_size * channels, channels};
        }
    };

    // By all threads, as of one image it is a thirtieth of the time when the weights left the caches.
    bool weights_are_the_same() const {
        int64_t threads = 1;
        for (const Block& block : blocks_) threads = std::max(threads, block.threads);
        bool same = true;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(&& : same)
        for (size_t i = 0; i < blocks_.size(); ++i)
            same = same && fingerprint(blocks_[i].weight, blocks_[i].weight_bytes) == blocks_[i].fingerprint;
        return same;
    }

    void run_group(int64_t images, uintptr_t input, const Strides& strides, uintptr_t output, uintptr_t scratch) const {
        const int64_t size = result_size(images) * sizeof(SumOf<E>), last = last_size(images) * sizeof(SumOf<E>);
        for (size_t i = 0; i < blocks_.size(); ++i) {
            const Block& block = blocks_[i];
            const uintptr_t result = i + 1 < blocks_.size() ? scratch + i % 2 * size
                                     : last                 ? scratch + 2 * size
                                                            : output;
            fastgen::run<E>(block.plan, images, block.threads, input, i ? blocks_[i - 1].strides() : strides,
                            block.packed, block.tensors, block.eps, block.activation, block.parameter, result,
                            scratch + 2 * size + last);
            input = result;
        }
        if (last) make_contiguous(images, pointer<const E>(input), pointer<E>(output));
    }

    // Of the largest result between two blocks, of one image.
    int64_t largest() const {
        int64_t most = 0;
        for (size_t i = 0; i + 1 < blocks_.size(); ++i) most = std::max(most, blocks_[i].image());
        return most;
    }

    int64_t groups(int64_t batch) const {
        const int64_t bytes = std::max<int64_t>(1, largest()) * sizeof(E);
        const int64_t images = std::max<int64_t>(1, kGroupBytes / bytes);
        return std::max<int64_t>(1, (batch + images - 1) / images);
    }

    // In sums, as scratch is counted.
    static int64_t sums_for(int64_t elements) {
        return line_up<SumOf<E>>((elements * sizeof(E) + sizeof(SumOf<E>) - 1) / sizeof(SumOf<E>));
    }

    int64_t result_size(int64_t images) const { return sums_for(images * largest()); }

    // Of the last result, where it is not the output.
    int64_t last_size(int64_t images) const { return contiguous_ ? sums_for(images * blocks_.back().image()) : 0; }

    void make_contiguous(int64_t images, const E* from, E* to) const {
        constexpr int64_t kRun = 64;  // positions that stay in the first-level cache
        const Block& last = blocks_.back();
        const int64_t channels = last.plan.out_channels(), positions = last.image() / channels;
        const int64_t runs = (positions + kRun - 1) / kRun;
#pragma omp parallel for num_threads(last.threads)
        for (int64_t i = 0; i < images * runs; ++i) {
            const int64_t begin = i % runs * kRun, end = std::min(positions, begin + kRun);
            const int64_t image = i / runs * last.image();
            for (int64_t c = 0; c < channels; ++c) {
                for (int64_t p = begin; p < end; ++p) to[image + c * positions + p] = from[image + p * channels + c];
            }
        }
    }

    bool contiguous_;
    std::vector<Block> blocks_;
};

template <class E>
void define_conv(pybind11::module_& module, const std::string& dtype) {
    namespace py = pybind11;
    using release = py::call_guard<py::gil_scoped_release>;
    using Sequence = ConvSequence<E>;
    py::class_<Sequence>(module, ("ConvSequence_" + dtype).c_str(), "Fused blocks, one after the other in one call")
        .def(py::init<bool>(), py::arg("contiguous"))
        .def("add", &Sequence::add, py::arg("plan"), py::arg("threads"), py::arg("packed"), py::arg("tensors"),
             py::arg("eps"), py::arg("activation"), py::arg("parameter"), py::arg("weight"), py::arg("weight_bytes"))
        .def("resized", &Sequence::resized, py::arg("batch"), py::arg("channels"), py::arg("size"), py::arg("threads"),
             "for inputs of another size: a sequence, and the blocks that need another pack; None if one does not fit")
        .def("plan", &Sequence::plan, py::arg("block"))
        .def("set_packed", &Sequence::set_packed, py::arg("block"), py::arg("packed"))
        .def("scratch_size", &Sequence::scratch_size, py::arg("batch"), py::arg("strides"))
        .def("run", &Sequence::run, py::arg("batch"), py::arg("input"), py::arg("strides"), py::arg("output"),
             py::arg("scratch"), release(), "False, with nothing computed, if a weight has changed");
    module.def(("conv_packed_size_" + dtype).c_str(),
               [](const Plan& plan) { return conv_kernels<E>().packed_size(plan.get(), nullptr); }, py::arg("plan"));
    module.def(("conv_pack_" + dtype).c_str(), pack<E>, py::arg("plan"), py::arg("weight"), py::arg("strides"),
               py::arg("packed"), py::arg("threads"), release(),
               "strides: of group, input channel, output channel, kernel row, kernel column");
    module.def(("conv_scratch_size_" + dtype).c_str(), scratch_size<E>, py::arg("plan"), py::arg("batch"),
               py::arg("threads"), py::arg("strides"), "in float32 where the dtype is bfloat16");
    module.def(("conv_bn_act_" + dtype).c_str(), run<E>, py::arg("plan"), py::arg("batch"), py::arg("threads"),
               py::arg("input"), py::arg("strides"), py::arg("packed"), py::arg("tensors"), py::arg("eps"),
               py::arg("activation"), py::arg("parameter"), py::arg("output"), py::arg("scratch"), release());
}

}  // namespace

void bind_conv(pybind11::module_& module) {
    namespace py = pybind11;
    py::class_<Plan>(module, "ConvPlan", "How a convolution of one size is cut into products.")
        .def(py::init(&make), py::arg("transposed"), py::arg("groups"), py::arg("channels"), py::arg("in_size"),
             py::arg("out_size"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
             py::arg("minimal"), py::arg("dtype"))
        .def_property_readonly("groups", [](const Plan& plan) { return plan.shape.groups; })
        .def_property_readonly(
            "out_size", [](const Plan& plan) { return py::make_tuple(plan.shape.y.out_size, plan.shape.x.out_size); })
        .def_property_readonly("layout", [](const Plan& plan) { return py::bytes(plan.layout); })
        .def_property_readonly("minimal", [](const Plan& plan) { return plan.conv->minimal; })
        .def_property_readonly("overlap_add", [](const Plan& plan) { return plan.conv->overlap_add; });
    py::enum_<Activation>(module, "Activation")
        .value("none", Activation::none)
        .value("relu", Activation::relu)
        .value("leaky_relu", Activation::leaky_relu)
        .value("elu", Activation::elu)
        .value("tanh", Activation::tanh)
        .value("sigmoid", Activation::sigmoid)
        .value("silu", Activation::silu)
        .value("gelu", Activation::gelu);
    module.def("worthwhile_threads", &worthwhile_threads, py::arg("positions"), py::arg("weights"), py::arg("threads"),
               "at most `threads`, where each of the positions meets all of the weights");
    module.def("fingerprint", &fingerprint, py::arg("data"), py::arg("bytes"));
    define_conv<BFloat16>(module, "bfloat16");
    define_conv<float>(module, "float32");
    define_conv<double>(module, "float64");
}

}  // namespace fastgen

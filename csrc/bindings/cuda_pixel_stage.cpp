// fastgen._cuda.PixelStage: the tables of a plan's pixel stage on the GPU, and the launch of the kernel that runs them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/pixel_stage_kernel.h"

namespace fastgen::cuda {
namespace {

namespace py = pybind11;

class PixelStageLaunch {
public:
    PixelStageLaunch(const std::map<std::string, uintptr_t>& tables, const std::map<std::string, int64_t>& sizes,
                     const py::bytes& steps) {
        for_each_pixel_table(stage_, [&](const char* name, auto& pointer) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(tables.at(name));
        });
        for_each_pixel_size(stage_, [&](const char* name, int64_t& value) { value = sizes.at(name); });
        const std::string rows = steps;
        if (rows.size() != stage_.num_steps * sizeof(PixelStep)) {
            throw std::invalid_argument("steps must be those of the table");
        }
        steps_.resize(stage_.num_steps);
        std::memcpy(steps_.data(), rows.data(), rows.size());
    }

    int64_t clusters(int64_t size, int64_t share) const { return pixel_clusters(stage_, steps_.data(), size, share); }

    void run(uintptr_t actions, int64_t num_actions, int64_t count, int64_t streams, uintptr_t workspace,
             uintptr_t where, uintptr_t state, uintptr_t inverse_temperature, uintptr_t top_k, uintptr_t top_p,
             uintptr_t guidance, uintptr_t levels, uintptr_t known, uintptr_t mask, int64_t size, int64_t share,
             int64_t clusters, uintptr_t stream) const {
        if (streams < 1 || streams > 2 || count % streams) {
            throw std::invalid_argument("streams must be 1 or 2, and each sample have as many rows");
        }
        if (size < 1 || share < 1 || clusters < 1 || clusters > count / streams) {
            throw std::invalid_argument("size, share and clusters must be positive, and no cluster without samples");
        }
        PixelBatch batch{};
        batch.actions = reinterpret_cast<const PixelAction*>(actions);
        batch.num_actions = num_actions;
        batch.count = count;
        batch.streams = streams;
        batch.workspace = reinterpret_cast<float*>(workspace);
        batch.where = reinterpret_cast<const int64_t*>(where);
        batch.state = reinterpret_cast<const int64_t*>(state);
        batch.inverse_temperature = reinterpret_cast<const double*>(inverse_temperature);
        batch.top_k = reinterpret_cast<const int32_t*>(top_k);
        batch.top_p = reinterpret_cast<const double*>(top_p);
        batch.guidance = reinterpret_cast<const float*>(guidance);
        batch.levels = reinterpret_cast<int32_t*>(levels);
        batch.known = reinterpret_cast<const int32_t*>(known);
        batch.mask = reinterpret_cast<const uint8_t*>(mask);
        run_pixel_stage(stage_, steps_.data(), batch, size, share, clusters, reinterpret_cast<CUstream_st*>(stream));
    }

private:
    PixelStage stage_{};
    std::vector<PixelStep> steps_;
};

}  // namespace

void bind_pixel_stage(py::module_& module) {
    py::class_<PixelStageLaunch>(module, "PixelStage",
                                 "Runs the pixel stage of image rows on the GPU; see csrc/cuda/pixel_stage.h for the "
                                 "tables, which are used in place.")
        .def(py::init<const std::map<std::string, uintptr_t>&, const std::map<std::string, int64_t>&,
                      const py::bytes&>(),
             py::kw_only(), py::arg("tables"), py::arg("sizes"), py::arg("steps"))
        .def("clusters", &PixelStageLaunch::clusters, py::arg("size"), py::arg("share"),
             "How many clusters of so many blocks run at a time; 0 where the GPU has no such clusters.")
        .def("run", &PixelStageLaunch::run, py::kw_only(), py::arg("actions"), py::arg("num_actions"), py::arg("count"),
             py::arg("streams"), py::arg("workspace"), py::arg("where"), py::arg("state"),
             py::arg("inverse_temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("guidance"), py::arg("levels"),
             py::arg("known"), py::arg("mask"), py::arg("size"), py::arg("share"), py::arg("clusters"),
             py::arg("stream"));
}

}  // namespace fastgen::cuda

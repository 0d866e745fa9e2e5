// fastgen._cuda.PlanExecutor: a plan's tables on the host and on the GPU, and the launch of the kernel that runs them.
#include "cuda/plan_executor.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace fastgen::cuda {
namespace {

namespace py = pybind11;

using Table = std::pair<uintptr_t, int64_t>;  // pointer, rows

PlanTables tables_of(const std::map<std::string, Table>& tables, const std::map<std::string, int64_t>& sizes) {
    PlanTables plan{};
    for_each_table(plan, [&](const char* name, auto& pointer, int64_t* count) {
        const auto& [data, rows] = tables.at(name);
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(data);
        if (count) *count = rows;
    });
    for_each_size(plan, [&](const char* name, auto& value) {
        value = static_cast<std::remove_reference_t<decltype(value)>>(sizes.at(name));
    });
    return plan;
}

class PlanExecutor {
public:
    PlanExecutor(const std::map<std::string, Table>& host, const std::map<std::string, Table>& device,
                 const std::map<std::string, int64_t>& sizes)
        : host_(tables_of(host, sizes)), device_(tables_of(device, sizes)) {}

    void sample(int64_t count, uint64_t seed, uint64_t start, double temperature, uintptr_t workspace, uintptr_t levels,
                uintptr_t known, uintptr_t mask, uintptr_t arrivals, int64_t strategy, int64_t row_begin,
                int64_t row_end, uintptr_t stream) const {
        if (strategy < 0 || strategy > 2) {
            throw std::invalid_argument("strategy must be 0, 1 or 2, got " + std::to_string(strategy));
        }
        PlanBatch batch{};
        batch.count = count;
        batch.seed = seed;
        batch.start = start;
        batch.inverse_temperature = plan_inverse_temperature(temperature);
        batch.workspace = reinterpret_cast<float*>(workspace);
        batch.levels = reinterpret_cast<int32_t*>(levels);
        batch.known = reinterpret_cast<const int32_t*>(known);
        batch.mask = reinterpret_cast<const uint8_t*>(mask);
        sample_plan(host_, device_, batch, strategy, reinterpret_cast<uint64_t*>(arrivals), row_begin, row_end,
                    reinterpret_cast<CUstream_st*>(stream));
    }

private:
    PlanTables host_, device_;
};

}  // namespace

void bind_plan_executor(py::module_& module) {
    py::class_<PlanExecutor>(module, "PlanExecutor",
                             "Runs a sampling plan on the GPU; see csrc/common/plan_tables.h for the tables, which are "
                             "used in place.")
        .def(py::init<const std::map<std::string, Table>&, const std::map<std::string, Table>&,
                      const std::map<std::string, int64_t>&>(),
             py::kw_only(), py::arg("host"), py::arg("device"), py::arg("sizes"))
        .def("sample", &PlanExecutor::sample, py::kw_only(), py::arg("count"), py::arg("seed"), py::arg("start"),
             py::arg("temperature"), py::arg("workspace"), py::arg("levels"), py::arg("known"), py::arg("mask"),
             py::arg("arrivals"), py::arg("strategy"), py::arg("row_begin"), py::arg("row_end"), py::arg("stream"));
}

}  // namespace fastgen::cuda

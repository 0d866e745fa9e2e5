// fastgen._cpu.PlanExecutor: a plan's tables, copied once, and the threads that run them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <future>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/plan_executor.h"

namespace fastgen {
namespace {

namespace py = pybind11;

const PlanWorker kWorkers[] = {
#define FASTGEN_WORKER(ISA) &ISA::plan_worker,
    FASTGEN_FOR_EACH_ISA(FASTGEN_WORKER)
#undef FASTGEN_WORKER
};

// Rows of int64 columns -> structs of int64 members, in the order of declaration.
template <class T>
std::vector<T> rows_of(const char* name, uintptr_t data, int64_t count, int64_t columns) {
    if (columns * sizeof(int64_t) != sizeof(T)) {
        throw std::invalid_argument(std::string(name) + " must have " + std::to_string(sizeof(T) / sizeof(int64_t)) +
                                    " columns, got " + std::to_string(columns));
    }
    const T* first = reinterpret_cast<const T*>(data);
    return std::vector<T>(first, first + count);
}

std::vector<float> floats_of(uintptr_t data, int64_t count) {
    const float* first = reinterpret_cast<const float*>(data);
    return std::vector<float>(first, first + count);
}

using Table = std::tuple<uintptr_t, int64_t, int64_t>;  // pointer, rows, columns
using Floats = std::pair<uintptr_t, int64_t>;           // pointer, count

class PlanExecutor {
public:
    PlanExecutor(const std::string& head, Table planes, Table steps, Table taps, Table instrs, Table draws,
                 Floats biases, Floats constants, Floats encoding, uintptr_t weights, int64_t row_steps, int64_t height,
                 int64_t width, int64_t image, int64_t first_row, int64_t first_column, int64_t end_column,
                 int64_t workspace, int64_t buffers)
        : planes_(make<PlanPlane>("planes", planes)),
          steps_(make<PlanStep>("steps", steps)),
          taps_(make<PlanTap>("taps", taps)),
          instrs_(make<PlanInstr>("instrs", instrs)),
          draws_(make<PlanDraw>("draws", draws)),
          biases_(floats_of(biases.first, biases.second)),
          constants_(floats_of(constants.first, constants.second)),
          encoding_(floats_of(encoding.first, encoding.second)) {
        if (head != "categorical" && head != "bernoulli") {
            throw std::invalid_argument("head must be categorical or bernoulli, got '" + head + "'");
        }
        tables_.planes = planes_.data();
        tables_.steps = steps_.data();
        tables_.taps = taps_.data();
        tables_.instrs = instrs_.data();
        tables_.draws = draws_.data();
        tables_.weights = reinterpret_cast<const float*>(weights);
        tables_.biases = biases_.data();
        tables_.constants = constants_.data();
        tables_.encoding = encoding_.data();
        tables_.num_planes = static_cast<int64_t>(planes_.size());
        tables_.num_steps = static_cast<int64_t>(steps_.size());
        tables_.row_steps = row_steps;
        tables_.colours = static_cast<int64_t>(draws_.size());
        tables_.height = height;
        tables_.width = width;
        tables_.image = image;
        tables_.levels = encoding.second;
        tables_.first_row = first_row;
        tables_.first_column = first_column;
        tables_.end_column = end_column;
        tables_.workspace = workspace;
        tables_.buffers = buffers;
        for (const PlanStep& step : steps_) {
            tables_.max_taps = std::max(tables_.max_taps, step.num_taps);
            tables_.max_instrs = std::max(tables_.max_instrs, step.num_instrs);
            tables_.max_groups = std::max(tables_.max_groups, step.groups);
        }
        tables_.head = head == "categorical" ? PlanHead::categorical : PlanHead::bernoulli;
    }

    int64_t scratch() const { return plan_scratch(tables_); }

    // Draws rows [row_begin, row_end) of a batch; whether all teams stayed together to the end.  groups: (first sample,
    // count, workspace) of each group; team: threads per group; scratch: scratch() floats for each thread.
    bool run(const std::vector<std::tuple<int64_t, int64_t, uintptr_t>>& groups, int team, uintptr_t scratch,
             uint64_t seed, uint64_t start, double temperature, uintptr_t levels, uintptr_t known, uintptr_t mask,
             int64_t row_begin, int64_t row_end) const {
        if (team < 1) throw std::invalid_argument("team must be at least 1, got " + std::to_string(team));
        const int64_t pixels = tables_.height * tables_.width, elements = pixels * tables_.colours;
        const PlanWorker worker = kWorkers[active_isa()];
        std::vector<PlanBatch> batches;
        std::deque<PlanTeam> teams;
        std::vector<PlanArrival> arrivals(groups.size() * team);
        batches.reserve(groups.size());
        for (const auto& [first, count, workspace] : groups) {
            PlanBatch batch{};
            batch.count = count;
            batch.seed = seed;
            batch.start = start + static_cast<uint64_t>(first);
            // Finite, so that times the zero of the likeliest level it is zero.
            batch.inverse_temperature =
                static_cast<float>(std::min(1.0 / temperature, double{std::numeric_limits<float>::max()}));
            batch.workspace = reinterpret_cast<float*>(workspace);
            batch.levels = reinterpret_cast<uint8_t*>(levels) + first * elements;
            if (known) batch.known = reinterpret_cast<const uint8_t*>(known) + first * elements;
            if (mask) batch.mask = reinterpret_cast<const uint8_t*>(mask) + first * pixels;
            batches.push_back(batch);
            teams.emplace_back(team, arrivals.data() + teams.size() * team);
        }
        const auto work = [&](size_t thread) {
            float* own = reinterpret_cast<float*>(scratch) + static_cast<int64_t>(thread) * plan_scratch(tables_);
            const size_t group = thread / team;
            worker(tables_, batches[group], teams[group], static_cast<int>(thread % team), own, row_begin, row_end);
        };
        std::vector<std::thread> threads;
        const size_t count = groups.size() * team;
        threads.reserve(count);
        // They begin when all have started: a team that lacks a member would wait for it forever.
        std::promise<bool> begin;
        const std::shared_future<bool> complete = begin.get_future().share();
        const auto join = [&] {
            for (std::thread& thread : threads) thread.join();
        };
        try {
            for (size_t thread = 1; thread < count; ++thread) {
                threads.emplace_back([&work, complete, thread] {
                    if (complete.get()) work(thread);
                });
            }
        } catch (const std::system_error& error) {
            begin.set_value(false);
            join();
            throw std::runtime_error("cannot start " + std::to_string(count) + " threads (" + error.what() +
                                     "): lower torch.set_num_threads");
        }
        begin.set_value(true);
        work(0);
        join();
        for (const PlanTeam& each : teams) {
            if (each.disbanded()) return false;
        }
        return true;
    }

private:
    template <class T>
    static std::vector<T> make(const char* name, const Table& table) {
        return rows_of<T>(name, std::get<0>(table), std::get<1>(table), std::get<2>(table));
    }

    std::vector<PlanPlane> planes_;
    std::vector<PlanStep> steps_;
    std::vector<PlanTap> taps_;
    std::vector<PlanInstr> instrs_;
    std::vector<PlanDraw> draws_;
    std::vector<float> biases_, constants_, encoding_;
    PlanTables tables_{};
};

}  // namespace

void bind_plan_executor(py::module_& module) {
    py::class_<PlanExecutor>(module, "PlanExecutor",
                             "Runs a sampling plan; see csrc/cpu/plan_executor.h for the tables.")
        .def(py::init<const std::string&, Table, Table, Table, Table, Table, Floats, Floats, Floats, uintptr_t, int64_t,
                      int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(),
             py::kw_only(), py::arg("head"), py::arg("planes"), py::arg("steps"), py::arg("taps"), py::arg("instrs"),
             py::arg("draws"), py::arg("biases"), py::arg("constants"), py::arg("encoding"), py::arg("weights"),
             py::arg("row_steps"), py::arg("height"), py::arg("width"), py::arg("image"), py::arg("first_row"),
             py::arg("first_column"), py::arg("end_column"), py::arg("workspace"), py::arg("buffers"))
        .def("scratch", &PlanExecutor::scratch, "Floats of scratch memory for each thread.")
        .def("run", &PlanExecutor::run, py::kw_only(), py::arg("groups"), py::arg("team"), py::arg("scratch"),
             py::arg("seed"), py::arg("start"), py::arg("temperature"), py::arg("levels"), py::arg("known"),
             py::arg("mask"), py::arg("row_begin"), py::arg("row_end"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastgen

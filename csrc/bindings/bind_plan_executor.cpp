// fastgen._cpu.PlanExecutor: a plan's tables, copied once, and the threads that run them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <future>
#include <map>
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

using Table = std::tuple<uintptr_t, int64_t, int64_t>;  // pointer, rows, columns
using Floats = std::pair<uintptr_t, int64_t>;           // pointer, count

std::vector<float> floats_of(const Floats& floats) {
    const float* first = reinterpret_cast<const float*>(floats.first);
    return std::vector<float>(first, first + floats.second);
}

PlanHead head_of(const std::string& name) {
    if (name == "categorical") return PlanHead::categorical;
    if (name == "bernoulli") return PlanHead::bernoulli;
    if (name == "logisticmixture") return PlanHead::logistic_mixture;
    throw std::invalid_argument("head must be categorical, bernoulli or logisticmixture, got '" + name + "'");
}

class PlanExecutor {
public:
    PlanExecutor(const std::string& head, const std::map<std::string, Table>& tables,
                 const std::map<std::string, Floats>& floats, const std::map<std::string, int64_t>& sizes,
                 uintptr_t weights, uintptr_t shared)
        : planes_(make<PlanPlane>(tables, "planes")),
          addresses_(make<PlanAddress>(tables, "addresses")),
          steps_(make<PlanStep>(tables, "steps")),
          taps_(make<PlanTap>(tables, "taps")),
          instrs_(make<PlanInstr>(tables, "instrs")),
          stores_(make<PlanStore>(tables, "stores")),
          sources_(make<int64_t>(tables, "sources")),
          spans_(make<int64_t>(tables, "spans")),
          attentions_(make<PlanAttention>(tables, "attentions")),
          draws_(make<PlanDraw>(tables, "draws")),
          encodings_(make<PlanEncoding>(tables, "encodings")),
          biases_(floats_of(floats.at("biases"))),
          constants_(floats_of(floats.at("constants"))),
          encoding_tables_(floats_of(floats.at("tables"))),
          levels_(floats_of(floats.at("levels"))),
          attention_floats_(floats_of(floats.at("attentions"))) {
        tables_.planes = planes_.data();
        tables_.addresses = addresses_.data();
        tables_.steps = steps_.data();
        tables_.taps = taps_.data();
        tables_.instrs = instrs_.data();
        tables_.stores = stores_.data();
        tables_.sources = sources_.data();
        tables_.attentions = attentions_.data();
        tables_.spans = spans_.data();
        tables_.attention_floats = attention_floats_.data();
        tables_.draws = draws_.data();
        tables_.encodings = encodings_.data();
        tables_.weights = reinterpret_cast<const void*>(weights);
        tables_.shared = reinterpret_cast<const float*>(shared);
        tables_.biases = biases_.data();
        tables_.constants = constants_.data();
        tables_.tables = encoding_tables_.data();
        tables_.levels = levels_.data();
        tables_.num_planes = static_cast<int64_t>(planes_.size());
        tables_.num_addresses = static_cast<int64_t>(addresses_.size());
        tables_.num_steps = static_cast<int64_t>(steps_.size());
        tables_.num_draws = static_cast<int64_t>(draws_.size());
        tables_.num_encodings = static_cast<int64_t>(encodings_.size());
        tables_.num_levels = static_cast<int64_t>(levels_.size());
        tables_.row_steps = sizes.at("row_steps");
        tables_.colours = sizes.at("colours");
        tables_.height = sizes.at("height");
        tables_.width = sizes.at("width");
        tables_.components = sizes.at("components");
        tables_.first_column = sizes.at("first_column");
        tables_.end_column = sizes.at("end_column");
        tables_.workspace = sizes.at("workspace");
        tables_.buffers = sizes.at("buffers");
        for (const PlanStep& step : steps_) {
            tables_.max_taps = std::max(tables_.max_taps, step.num_taps);
            tables_.max_instrs = std::max(tables_.max_instrs, step.num_instrs);
            tables_.max_groups = std::max(tables_.max_groups, step.groups);
            int64_t filtered = 0;
            for (int64_t i = step.first_tap; i < step.first_tap + step.num_filters; ++i) {
                filtered += (taps_[i].count + kPlanPanel - 1) / kPlanPanel * kPlanPanel;
            }
            tables_.max_filtered = std::max(tables_.max_filtered, filtered);
        }
        for (const PlanAttention& attention : attentions_) {
            const PlanPlane& keys = planes_[attention.keys];
            tables_.max_keys = std::max(tables_.max_keys, keys.height * keys.width);
        }
        tables_.head = head_of(head);
    }

    int64_t scratch() const { return plan_scratch(tables_).total(); }

    // Draws rows [row_begin, row_end) of a batch; whether all teams stayed together to the end.  groups: (first sample,
    // count, workspace) of each group; team: threads per group; scratch: scratch() bytes for each thread.
    bool run(const std::vector<std::tuple<int64_t, int64_t, uintptr_t>>& groups, int team, uintptr_t scratch,
             uint64_t seed, uint64_t start, double temperature, int64_t top_k, double top_p, int64_t streams,
             double guidance, uintptr_t levels, uintptr_t known, uintptr_t mask, uintptr_t params, int64_t num_params,
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
            batch.count = count * streams;
            batch.streams = streams;
            batch.guidance = static_cast<float>(guidance);
            batch.seed = seed;
            batch.start = start + static_cast<uint64_t>(first);
            batch.inverse_temperature = plan_inverse_temperature(temperature);
            batch.top_k = top_k;
            batch.top_p = top_p;
            batch.workspace = reinterpret_cast<float*>(workspace);
            batch.levels = reinterpret_cast<int32_t*>(levels) + first * elements;
            if (known) batch.known = reinterpret_cast<const int32_t*>(known) + first * elements;
            batch.num_params = num_params;
            if (params) batch.params = reinterpret_cast<float*>(params) + first * num_params * pixels;
            if (mask) batch.mask = reinterpret_cast<const uint8_t*>(mask) + first * pixels;
            batches.push_back(batch);
            teams.emplace_back(team, arrivals.data() + teams.size() * team);
        }
        const auto work = [&](size_t thread) {
            char* own = reinterpret_cast<char*>(scratch) + static_cast<int64_t>(thread) * this->scratch();
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
        const int processor = this_processor();
        try {
            for (size_t thread = 1; thread < count; ++thread) {
                threads.emplace_back([&work, complete, thread, processor] {
                    if (!complete.get()) return;
                    leave_processor(processor);
                    work(thread);
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
    static std::vector<T> make(const std::map<std::string, Table>& tables, const char* name) {
        const Table& table = tables.at(name);
        return rows_of<T>(name, std::get<0>(table), std::get<1>(table), std::get<2>(table));
    }

    std::vector<PlanPlane> planes_;
    std::vector<PlanAddress> addresses_;
    std::vector<PlanStep> steps_;
    std::vector<PlanTap> taps_;
    std::vector<PlanInstr> instrs_;
    std::vector<PlanStore> stores_;
    std::vector<int64_t> sources_, spans_;
    std::vector<PlanAttention> attentions_;
    std::vector<PlanDraw> draws_;
    std::vector<PlanEncoding> encodings_;
    std::vector<float> biases_, constants_, encoding_tables_, levels_, attention_floats_;
    PlanTables tables_{};
};

}  // namespace

void bind_plan_executor(py::module_& module) {
    py::class_<PlanExecutor>(module, "PlanExecutor",
                             "Runs a sampling plan; see csrc/cpu/plan_executor.h for the tables.")
        .def(py::init<const std::string&, const std::map<std::string, Table>&, const std::map<std::string, Floats>&,
                      const std::map<std::string, int64_t>&, uintptr_t, uintptr_t>(),
             py::kw_only(), py::arg("head"), py::arg("tables"), py::arg("floats"), py::arg("sizes"), py::arg("weights"),
             py::arg("shared"))
        .def("scratch", &PlanExecutor::scratch, "Bytes of scratch memory for each thread.")
        .def("run", &PlanExecutor::run, py::kw_only(), py::arg("groups"), py::arg("team"), py::arg("scratch"),
             py::arg("seed"), py::arg("start"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
             py::arg("streams"), py::arg("guidance"), py::arg("levels"), py::arg("known"), py::arg("mask"),
             py::arg("params"), py::arg("num_params"), py::arg("row_begin"), py::arg("row_end"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastgen

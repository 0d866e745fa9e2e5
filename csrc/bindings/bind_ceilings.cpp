// fastgen._cpu.ceilings: the loops of csrc/cpu/ceilings.cpp on any number of threads, timed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/ceilings.h"
#include "cpu/isa.h"
#include "fastgen_build.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_CEILINGS)

namespace fastgen {
namespace {

struct Loops {
    const char* isa;
    double (*fma_float32)(int64_t);
    double (*fma_float64)(int64_t);
    double (*dot_bfloat16)(int64_t);
    uint64_t (*read_bytes)(const void*, int64_t, int64_t);
    int64_t flops_float32, flops_float64, flops_bfloat16;
};

const Loops kLoops[] = {
#define FASTGEN_LOOPS(ISA) \
    {#ISA,                 \
     ISA::fma_float32,     \
     ISA::fma_float64,     \
     ISA::dot_bfloat16,    \
     ISA::read_bytes,      \
     ISA::flops_float32,   \
     ISA::flops_float64,   \
     ISA::flops_bfloat16},
    FASTGEN_FOR_EACH_ISA(FASTGEN_LOOPS)
#undef FASTGEN_LOOPS
};

const Loops& find(const std::string& isa) {
    const std::vector<std::string> names = isa_names();
    for (const Loops& loops : kLoops) {
        if (isa == loops.isa && std::find(names.begin(), names.end(), isa) != names.end()) return loops;
    }
    throw std::invalid_argument("isa must be one of ceilings.isas(), got '" + isa + "'");
}

// Holds the calling thread on one processor: the index-th of those the process may use. On a busy machine the scheduler
// otherwise leaves a team that runs for milliseconds on one core together.
class Pin {
public:
    explicit Pin(int index) {
#ifdef __linux__
        saved_ = sched_getaffinity(0, sizeof old_, &old_) == 0;
        for (int cpu = 0; saved_ && cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &old_) || index-- > 0) continue;
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            sched_setaffinity(0, sizeof one, &one);
            break;
        }
#else
        (void)index;
#endif
    }
    ~Pin() {
#ifdef __linux__
        if (saved_) sched_setaffinity(0, sizeof old_, &old_);
#endif
    }
    Pin(const Pin&) = delete;

private:
#ifdef __linux__
    cpu_set_t old_;
    bool saved_ = false;
#endif
};

// Slices start at multiples of 64 bytes.
int64_t slice(int64_t bytes, int part, int parts) { return part == parts ? bytes : bytes / 64 * part / parts * 64; }

int64_t flops(const std::string& isa, const std::string& dtype) {
    const Loops& loops = find(isa);
    if (dtype == "float32") return loops.flops_float32;
    if (dtype == "float64") return loops.flops_float64;
    if (dtype == "bfloat16") return loops.flops_bfloat16;
    throw std::invalid_argument("dtype must be float32, float64 or bfloat16, got '" + dtype + "'");
}

// Runs body(thread) on every thread at once, each on its own processor; the seconds from the common start to the last end.
// The start is a spinning barrier: a thread that the scheduler keeps waiting delays the start, not the measurement.
template <typename Body>
double timed(int threads, Body body) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
    using clock = std::chrono::steady_clock;
    std::atomic<int> missing{threads};
    double seconds = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(max : seconds)
    for (int thread = 0; thread < threads; ++thread) {
        Pin pin(thread);
        --missing;
        while (missing.load(std::memory_order_acquire) > 0) {
        }
        const auto start = clock::now();
        body(thread);
        seconds = std::chrono::duration<double>(clock::now() - start).count();
    }
    return seconds;
}

double compute(const std::string& isa, const std::string& dtype, int64_t iterations, int threads) {
    if (flops(isa, dtype) == 0) throw std::invalid_argument(isa + " has no " + dtype + " multiply-add");
    const Loops& loops = find(isa);
    auto* loop = dtype == "float32" ? loops.fma_float32 : dtype == "float64" ? loops.fma_float64 : loops.dot_bfloat16;
    return timed(threads, [&](int) {
        volatile double sink = loop(iterations);
        (void)sink;
    });
}

double read(const std::string& isa, uintptr_t data, int64_t bytes, int64_t repeats, int threads) {
    auto* loop = find(isa).read_bytes;
    const char* base = reinterpret_cast<const char*>(data);
    return timed(threads, [&](int thread) {
        const int64_t start = slice(bytes, thread, threads), end = slice(bytes, thread + 1, threads);
        volatile uint64_t sink = loop(base + start, end - start, repeats);
        (void)sink;
    });
}

double copy(uintptr_t target, uintptr_t source, int64_t bytes, int64_t repeats, int threads) {
    char* to = reinterpret_cast<char*>(target);
    const char* from = reinterpret_cast<const char*>(source);
    return timed(threads, [&](int thread) {
        const int64_t start = slice(bytes, thread, threads), end = slice(bytes, thread + 1, threads);
        for (int64_t r = 0; r < repeats; ++r) std::memcpy(to + start, from + start, end - start);
    });
}

}  // namespace

void bind_ceilings(pybind11::module_& module) {
    namespace py = pybind11;
    using release = py::call_guard<py::gil_scoped_release>;
    py::module_ m =
        module.def_submodule("ceilings", "Loops that reach the limits of the processor; each returns its seconds.");
    m.def("isas", isa_names, "Instruction sets compiled in that this processor has, slowest first.");
    m.def(
        "flops", flops, py::arg("isa"), py::arg("dtype"),
        "Floating-point operations of one iteration of compute() on one thread; 0 where there is no such instruction.");
    m.def("compute", compute, py::arg("isa"), py::arg("dtype"), py::arg("iterations"), py::arg("threads"), release(),
          "Multiply-adds (bfloat16: dot products) on registers alone; seconds.");
    m.def("read", read, py::arg("isa"), py::arg("data"), py::arg("bytes"), py::arg("repeats"), py::arg("threads"),
          release(), "Each thread reads its own slice of the array, `repeats` times; seconds.");
    m.def("copy", copy, py::arg("target"), py::arg("source"), py::arg("bytes"), py::arg("repeats"), py::arg("threads"),
          release(), "Each thread copies its own slice, `repeats` times; seconds.");
}

}  // namespace fastgen

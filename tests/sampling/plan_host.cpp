// Runs csrc/cuda/plan_schedule.h, the code of the persistent kernel, on threads of the host.
//
//     plan_host CALL RESULT
//
// CALL holds entries: a name of 16 bytes, the number of rows and of bytes as int64, and the bytes. RESULT takes the
// levels, int32.
#include "cuda/plan_schedule.h"

#include <atomic>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

using namespace fastgen;

class Barrier {
public:
    explicit Barrier(int size) : size_(size) {}
    void wait() {
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
        } else {
            while (round_.load(std::memory_order_acquire) == round) std::this_thread::yield();
        }
    }

private:
    const int size_;
    std::atomic<int> arrived_{0}, round_{0};
};

// What the lanes of a worker share.
struct Worker {
    Worker(int lanes, int64_t bytes) : lanes(lanes), memory(bytes + 16) {}
    Barrier lanes;
    std::vector<char> memory;
};

class HostTeam {
public:
    HostTeam(Barrier& all, Worker& worker, int rank, int size, int lane, int lanes)
        : all_(all), worker_(worker), rank_(rank), size_(size), lane_(lane), lanes_(lanes) {}
    int rank() const { return rank_; }
    int size() const { return size_; }
    int lane() const { return lane_; }
    int lanes() const { return lanes_; }
    void sync() { worker_.lanes.wait(); }
    void barrier() { all_.wait(); }
    char* scratch() const {
        return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(worker_.memory.data()) + 15) / 16 * 16);
    }

private:
    Barrier& all_;
    Worker& worker_;
    const int rank_, size_, lane_, lanes_;
};

struct Entry {
    int64_t rows;
    std::vector<char> bytes;
    template <class T>
    T* as() {
        return bytes.empty() ? nullptr : reinterpret_cast<T*>(bytes.data());
    }
};

std::map<std::string, Entry> read(const char* path) {
    std::map<std::string, Entry> entries;
    std::ifstream file(path, std::ios::binary);
    char name[17] = {};
    int64_t sizes[2];
    while (file.read(name, 16) && file.read(reinterpret_cast<char*>(sizes), sizeof(sizes))) {
        Entry& entry = entries[name];
        entry.rows = sizes[0];
        entry.bytes.resize(sizes[1]);
        file.read(entry.bytes.data(), sizes[1]);
    }
    return entries;
}

}  // namespace

int main(int, char** arguments) {
    std::map<std::string, Entry> entries = read(arguments[1]);
    const auto number = [&](const char* name) { return *entries.at(name).as<int64_t>(); };
    PlanTables plan{};
    for_each_table(plan, [&](const char* name, auto& pointer, int64_t* count) {
        Entry& entry = entries.at(name);
        pointer = entry.as<std::remove_pointer_t<std::remove_reference_t<decltype(pointer)>>>();
        if (count) *count = entry.rows;
    });
    for_each_size(plan, [&](const char* name, auto& value) {
        value = static_cast<std::remove_reference_t<decltype(value)>>(number(name));
    });
    PlanBatch batch{};
    batch.count = number("count");
    batch.seed = static_cast<uint64_t>(number("seed"));
    batch.start = static_cast<uint64_t>(number("start"));
    batch.inverse_temperature = plan_inverse_temperature(*entries.at("temperature").as<double>());
    batch.workspace = entries.at("planes of batch").as<float>();
    batch.known = entries.at("known").as<int32_t>();
    batch.mask = entries.at("mask").as<uint8_t>();
    std::vector<int32_t> levels(batch.count * plan.colours * plan.height * plan.width, -1);
    batch.levels = levels.data();

    const int workers = static_cast<int>(number("workers")), lanes = static_cast<int>(number("lanes"));
    const PlanSpace space = plan_space(plan, lanes);
    Barrier all(workers * lanes);
    std::vector<std::unique_ptr<Worker>> shared;
    for (int i = 0; i < workers; ++i) shared.push_back(std::make_unique<Worker>(lanes, space.total()));
    std::vector<std::thread> threads;
    for (int i = 0; i < workers * lanes; ++i) {
        threads.emplace_back([&, i] {
            HostTeam team(all, *shared[i / lanes], i / lanes, workers, i % lanes, lanes);
            PlanSchedule<HostTeam>(plan, batch, static_cast<PlanStrategy>(number("strategy")), space, team)
                .run(number("first_row"), plan.height);
        });
    }
    for (std::thread& thread : threads) thread.join();
    std::ofstream(arguments[2], std::ios::binary)
        .write(reinterpret_cast<const char*>(levels.data()), static_cast<std::streamsize>(levels.size() * 4));
    return 0;
}

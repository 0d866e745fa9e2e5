// Runs a sampling plan (common/plan_tables.h) for a batch of images: the worker that every thread of a team runs.
#pragma once

#include <chrono>
#include <cstdint>

#include "common/plan_tables.h"
#include "fastgen_build.h"

namespace fastgen {

// The rounds in which a member has come to the barrier; a cache line for each, so that one transfer between two cores
// tells one of them that the other has come.
struct alignas(64) PlanArrival {
    int64_t rounds = 0;
};

// The threads of a group, with an arrival for each. wait() returns when all members have called it: whether the team
// goes on. It is `brief` behind the steps of a pixel, but not behind a draw.
//
// A team works as long as all its threads run at the same time. Where they do not, because something else wants the
// processors, a barrier costs a time slice of the scheduler, or its members take turns on one processor: a hundred to a
// thousand times what a step costs, and one thread alone is faster. So waits of such a length are added up; before each
// barrier member 0 decides whether they take a large part of the time, and behind it all members have the answer: then
// member 0 goes on alone.
class PlanTeam {
public:
    PlanTeam(int size, PlanArrival* arrivals) : size_(size), arrivals_(arrivals) {}
    int size() const { return size_; }
    bool wait(int member, bool brief);
    bool disbanded() const { return last_round_ != kForever; }

private:
    static constexpr int64_t kForever = INT64_MAX;

    bool is_late() const;

    const int size_;
    PlanArrival* const arrivals_;
    const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
    alignas(64) std::chrono::steady_clock::rep late_ = 0;  // time spent in long waits
    int64_t last_round_ = kForever;  // a round, for one who comes late from a barrier may see the next one's decision
};

// The processor that the calling thread runs on; -1 where the system does not tell.
int this_processor();
// A thread that runs on this processor moves to another one. The system starts it on that of its maker where all are
// taken, if only by threads of OpenMP that spin for some milliseconds after their work, and leaves it there for long.
void leave_processor(int processor);

// A tile of the results that are computed while they are in the cache; the tile of their product is as large, but for
// a step with so many groups that a single panel of all of them is wider.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 160;
constexpr int64_t kTileFloats = kTileRows * kTileColumns;

// Bytes of scratch memory that each thread needs, all rounded up to cache lines.
struct PlanScratch {
    int64_t product, shared, filtered, buffers, rows, taps, values, active, ran, probabilities, guided, scores;
    int64_t total() const {
        return product + shared + filtered + buffers + rows + taps + values + active + ran + probabilities + guided +
               scores;
    }
};

constexpr int64_t kScratchRecord = 64;  // room for the address of a tap or an operand

constexpr int64_t kPlanHeads = 8;  // of attention whose scores are kept at a time

// Floats for the scores of a head: what reads and writes whole vectors may go past the last by one and more.
inline int64_t plan_attention_pitch(int64_t keys) { return (keys / kPlanPanel + 3) * kPlanPanel; }

inline PlanScratch plan_scratch(const PlanTables& plan) {
    const auto cache_lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t panel = plan.max_groups * kPlanPanel;
    PlanScratch sizes{};
    sizes.product = cache_lines(kTileRows * (panel > kTileColumns ? panel : kTileColumns) * sizeof(float));
    sizes.shared = plan.max_filtered > 0 ? 2 * sizes.product : 0;
    sizes.filtered = cache_lines(kTileRows * plan.max_filtered * sizeof(float));
    sizes.buffers = cache_lines(plan.buffers * kTileFloats * sizeof(float));
    sizes.rows = cache_lines(plan.num_addresses * sizeof(void*));
    sizes.taps = plan.max_taps * kScratchRecord;
    sizes.values = plan.max_instrs * kScratchRecord;
    sizes.active = cache_lines(plan.num_steps * sizeof(int64_t));
    sizes.ran = cache_lines(plan.num_steps * sizeof(int64_t));
    sizes.probabilities = cache_lines(2 * plan.num_levels * sizeof(float));
    sizes.guided = cache_lines(plan.num_levels * sizeof(float));
    sizes.scores =
        plan.max_keys > 0 ? cache_lines(kPlanHeads * plan_attention_pitch(plan.max_keys) * sizeof(float)) : 0;
    return sizes;
}

using PlanWorker = void (*)(const PlanTables& plan, const PlanBatch& batch, PlanTeam& team, int member, char* scratch,
                            int64_t row_begin, int64_t row_end);

#define FASTGEN_DECLARE_PLAN_WORKER(ISA)                                                            \
    namespace ISA {                                                                                 \
    void plan_worker(const PlanTables&, const PlanBatch&, PlanTeam&, int, char*, int64_t, int64_t); \
    }
FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_PLAN_WORKER)
#undef FASTGEN_DECLARE_PLAN_WORKER

}  // namespace fastgen

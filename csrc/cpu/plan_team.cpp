#include <chrono>
#include <thread>

#include "plan_executor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fastgen {
namespace {

constexpr int kSpins = 2000;
constexpr auto kSpun = std::chrono::microseconds(50);  // about; longer than any step of a pixel
constexpr auto kLate =
    std::chrono::microseconds(500);  // a wait for a step of a row that only the scheduler can have caused
constexpr auto kTolerated = std::chrono::milliseconds(10);  // a processor may have to wake up first
constexpr int kTolerableShare = 4;                          // a quarter of the time

}  // namespace

// Steps are microseconds long, so waiting threads spin; but where there are more threads than processors the awaited one
// may need this one's processor, so they spin briefly and then yield.
bool PlanTeam::wait(int member, bool brief) {
    const int64_t round = arrivals_[member].rounds + 1;
    if (member == 0 && is_late()) __atomic_store_n(&last_round_, round, __ATOMIC_RELAXED);
    __atomic_store_n(&arrivals_[member].rounds, round, __ATOMIC_RELEASE);
    for (int other = 0; other < size_; ++other) {
        const auto arrived = [&] { return __atomic_load_n(&arrivals_[other].rounds, __ATOMIC_ACQUIRE) >= round; };
        for (int spin = 0; spin < kSpins && !arrived(); ++spin) {
#if defined(__x86_64__)
            _mm_pause();
#elif defined(__aarch64__)
            asm volatile("isb");  // takes some ten nanoseconds, where "yield" takes none
#endif
        }
        if (arrived()) continue;
        const auto start = std::chrono::steady_clock::now();
        while (!arrived()) std::this_thread::yield();
        const auto waited = std::chrono::steady_clock::now() - start + kSpun;
        if (brief || waited > kLate) __atomic_add_fetch(&late_, waited.count(), __ATOMIC_RELAXED);
    }
    return round < __atomic_load_n(&last_round_, __ATOMIC_RELAXED);
}

#if defined(__linux__)
int this_processor() { return sched_getcpu(); }

void leave_processor(int processor) {
    cpu_set_t allowed;
    if (processor < 0 || this_processor() != processor || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    cpu_set_t others = allowed;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
    sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int this_processor() { return -1; }
void leave_processor(int) {}
#endif

bool PlanTeam::is_late() const {
    const std::chrono::steady_clock::duration late(__atomic_load_n(&late_, __ATOMIC_RELAXED));
    return late > kTolerated && late > kTolerated + (std::chrono::steady_clock::now() - begin_) / kTolerableShare;
}

}  // namespace fastgen

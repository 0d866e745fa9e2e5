#include <chrono>
#include <thread>

#include "plan_executor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgen {
namespace {

constexpr int kSpins = 2000;  // some 50 microseconds, longer than any step of a small batch
constexpr auto kLate = std::chrono::microseconds(500);
constexpr int kLateWaits = 3;

}  // namespace

// Steps are microseconds long, so waiting threads spin; but where there are more threads than processors the awaited one
// may need this one's processor, so they spin briefly and then yield.
void PlanTeam::wait(int member) {
    const int64_t round = arrivals_[member].rounds + 1;
    __atomic_store_n(&arrivals_[member].rounds, round, __ATOMIC_RELEASE);
    for (int other = 0; other < size_; ++other) {
        const auto arrived = [&] { return __atomic_load_n(&arrivals_[other].rounds, __ATOMIC_ACQUIRE) >= round; };
        for (int spin = 0; spin < kSpins && !arrived(); ++spin) {
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        if (arrived()) continue;
        const auto start = std::chrono::steady_clock::now();
        while (!arrived()) std::this_thread::yield();
        if (std::chrono::steady_clock::now() - start > kLate) __atomic_add_fetch(&late_, 1, __ATOMIC_RELAXED);
    }
}

void PlanTeam::decide() { disbanded_ = __atomic_load_n(&late_, __ATOMIC_RELAXED) >= kLateWaits; }

}  // namespace fastgen

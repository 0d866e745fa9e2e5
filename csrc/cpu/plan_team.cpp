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

// The last to arrive opens the next round. Steps are microseconds long, so waiting threads spin; but where there are
// more threads than processors the awaited one may need this one's processor, so they spin briefly and then yield.
void PlanTeam::wait() {
    if (size_ == 1) return;
    const int round = __atomic_load_n(&round_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size_) {
        __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
        return;
    }
    const auto opened = [&] { return __atomic_load_n(&round_, __ATOMIC_ACQUIRE) != round; };
    for (int spin = 0; spin < kSpins; ++spin) {
        if (opened()) return;
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
    const auto start = std::chrono::steady_clock::now();
    while (!opened()) std::this_thread::yield();
    if (std::chrono::steady_clock::now() - start > kLate) __atomic_add_fetch(&late_, 1, __ATOMIC_RELAXED);
}

void PlanTeam::decide() { disbanded_ = __atomic_load_n(&late_, __ATOMIC_RELAXED) >= kLateWaits; }

}  // namespace fastgen

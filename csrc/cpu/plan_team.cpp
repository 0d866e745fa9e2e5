#include <thread>

#include "plan_executor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgen {

// The last to arrive opens the next round.  Steps are microseconds long, so waiting threads spin; but where there are more threads
// than processors the awaited one may need this one's processor, so they spin briefly and then yield.
void PlanTeam::wait() {
    if (size_ == 1) return;
    const int round = __atomic_load_n(&round_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size_) {
        __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
        return;
    }
    constexpr int kSpins = 2000;
    for (int spins = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++spins) {
        if (spins < kSpins) {
#if defined(__x86_64__)
            _mm_pause();
#endif
        } else {
            std::this_thread::yield();
        }
    }
}

}  // namespace fastgen

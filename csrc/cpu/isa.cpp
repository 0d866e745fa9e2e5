#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastgen {
namespace {

constexpr const char* kNames[] = {
#define FASTGEN_NAME(ISA) #ISA,
    FASTGEN_FOR_EACH_ISA(FASTGEN_NAME)
#undef FASTGEN_NAME
};
constexpr int kCount = sizeof kNames / sizeof *kNames;

bool supported(const std::string& name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (name == "avx2") return avx2;
    if (name == "avx512") return avx512;
    if (name == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return name == "baseline";
}

// -1 where the name is not compiled in or not supported.
int find(const std::string& name) {
    for (int i = 0; i < kCount; ++i) {
        if (name == kNames[i]) return supported(name) ? i : -1;
    }
    return -1;
}

std::string available() {
    std::string text;
    for (const std::string& name : isa_names()) text += (text.empty() ? "" : ", ") + name;
    return text;
}

int choose() {
    const char* asked = std::getenv("FASTGEN_ISA");
    if (asked && *asked) {
        const int i = find(asked);
        if (i < 0) throw std::runtime_error("FASTGEN_ISA must be one of " + available() + " here, got '" + asked + "'");
        return i;
    }
    int best = 0;
    for (int i = 0; i < kCount; ++i) {
        if (supported(kNames[i])) best = i;
    }
    return best;
}

std::atomic<int> forced{-1};

}  // namespace

int active_isa() {
    static const int chosen = choose();
    const int i = forced.load(std::memory_order_relaxed);
    return i < 0 ? chosen : i;
}

std::string isa_name() { return kNames[active_isa()]; }

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const char* name : kNames) {
        if (supported(name)) names.push_back(name);
    }
    return names;
}

void set_isa(const std::string& name) {
    const int i = name.empty() ? -1 : find(name);
    if (i < 0 && !name.empty())
        throw std::invalid_argument("isa must be one of " + available() + " here, got '" + name + "'");
    forced = i;
}

}  // namespace fastgen

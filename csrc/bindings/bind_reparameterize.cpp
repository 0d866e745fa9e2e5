// fastgen._cpu.reparameterize_*: float32 and float64 tensors.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/reparameterize.h"
#include "pointer.h"

FASTGEN_FOR_EACH_ISA(FASTGEN_DECLARE_REPARAMETERIZE)

namespace fastgen {
namespace {

template <class T>
struct Kernels {
    void (*forward)(const Reparameterize&, const T*, const T*, T*, T*);
    void (*gradient)(const Reparameterize&, const T*, const T*, const T*, const T*, int64_t, T*, T*);
};

template <class T>
const Kernels<T>& kernels() {
    static constexpr Kernels<T> table[] = {
#define FASTGEN_KERNELS(ISA) {ISA::reparameterize, ISA::reparameterize_gradient},
        FASTGEN_FOR_EACH_ISA(FASTGEN_KERNELS)
#undef FASTGEN_KERNELS
    };
    return table[active_isa()];
}

// Lets other Python threads run, unless the job is over in less time than they would need to start.
class Unlocked {
public:
    explicit Unlocked(int64_t elements) : state_(elements > 16384 ? PyEval_SaveThread() : nullptr) {}
    ~Unlocked() {
        if (state_) PyEval_RestoreThread(state_);
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

private:
    PyThreadState* state_;
};

template <class T>
void forward(int64_t rows, int64_t columns, int64_t draws, uint64_t seed, int64_t start, int64_t threads, uintptr_t mu,
             int64_t mu_row, uintptr_t logvar, int64_t logvar_row, uintptr_t z, uintptr_t kl) {
    const Reparameterize job{rows, columns, draws, mu_row, logvar_row, seed, start, threads};
    const Unlocked unlocked(rows * columns * draws);
    kernels<T>().forward(job, pointer<const T>(mu), pointer<const T>(logvar), pointer<T>(z), pointer<T>(kl));
}

template <class T>
void gradient(int64_t rows, int64_t columns, int64_t draws, uint64_t seed, int64_t start, int64_t threads, uintptr_t mu,
              int64_t mu_row, uintptr_t logvar, int64_t logvar_row, uintptr_t grad_z, uintptr_t grad_kl,
              int64_t grad_kl_row, uintptr_t grad_mu, uintptr_t grad_logvar) {
    const Reparameterize job{rows, columns, draws, mu_row, logvar_row, seed, start, threads};
    const Unlocked unlocked(rows * columns * draws);
    kernels<T>().gradient(job, pointer<const T>(mu), pointer<const T>(logvar), pointer<const T>(grad_z),
                          pointer<const T>(grad_kl), grad_kl_row, pointer<T>(grad_mu), pointer<T>(grad_logvar));
}

// Arguments by position: names cost a call a microsecond.
template <class T>
void define(pybind11::module_& module, const std::string& dtype) {
    module.def(("reparameterize_" + dtype).c_str(), forward<T>,
               "(rows, columns, draws, seed, start, threads, mu, mu_row, logvar, logvar_row, z, kl)");
    module.def(
        ("reparameterize_gradient_" + dtype).c_str(), gradient<T>,
        "(rows, columns, draws, seed, start, threads, mu, mu_row, logvar, logvar_row, grad_z or 0, grad_kl or 0, "
        "grad_kl_row, grad_mu, grad_logvar)");
}

}  // namespace

void bind_reparameterize(pybind11::module_& module) {
    define<float>(module, "float32");
    define<double>(module, "float64");
}

}  // namespace fastgen

// Reparameterised normal samples and their Kullback-Leibler divergence; the formulas are in reparameterize.cpp.
#pragma once

#include <cstdint>

namespace fastgen {

struct Reparameterize {
    int64_t rows, columns;
    int64_t draws;               // samples of each row, at least 1
    int64_t mu_row, logvar_row;  // elements from one row to the next; columns are dense
    uint64_t seed;
    int64_t start;  // index of the first row in the sequence of the seed
    int64_t threads;
};

}  // namespace fastgen

// z and grad_z are dense [draws, rows, columns]; kl is [rows]; gradients are dense [rows, columns]. grad_z or grad_kl
// may be null: then it is zero. grad_kl_row: elements from one to the next.
#define FASTGEN_DECLARE_REPARAMETERIZE_OF(T)                                                               \
    void reparameterize(const Reparameterize& job, const T* mu, const T* logvar, T* z, T* kl);             \
    void reparameterize_gradient(const Reparameterize& job, const T* mu, const T* logvar, const T* grad_z, \
                                 const T* grad_kl, int64_t grad_kl_row, T* grad_mu, T* grad_logvar);

#define FASTGEN_DECLARE_REPARAMETERIZE(ISA)   \
    namespace fastgen::ISA {                  \
    FASTGEN_DECLARE_REPARAMETERIZE_OF(float)  \
    FASTGEN_DECLARE_REPARAMETERIZE_OF(double) \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_REPARAMETERIZE(FASTGEN_ISA)
#endif

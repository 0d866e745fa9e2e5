// The functions of vec_math.h over arrays, for tests.
#pragma once

#include <cstdint>

#define FASTGEN_DECLARE_VEC_MATH(ISA)                                  \
    namespace fastgen::ISA {                                           \
    void array_exp(const float* x, float* y, int64_t count);           \
    void array_exp_flushed(const float* x, float* y, int64_t count);   \
    void array_lack(const float* x, float* y, int64_t count);          \
    void array_log(const float* x, float* y, int64_t count);           \
    void array_sigmoid(const float* x, float* y, int64_t count);       \
    void array_tanh(const float* x, float* y, int64_t count);          \
    void array_erf(const float* x, float* y, int64_t count);           \
    void array_exp(const double* x, double* y, int64_t count);         \
    void array_exp_flushed(const double* x, double* y, int64_t count); \
    void array_lack(const double* x, double* y, int64_t count);        \
    void array_log(const double* x, double* y, int64_t count);         \
    void array_sigmoid(const double* x, double* y, int64_t count);     \
    void array_tanh(const double* x, double* y, int64_t count);        \
    void array_erf(const double* x, double* y, int64_t count);         \
    }

#ifdef FASTGEN_ISA
FASTGEN_DECLARE_VEC_MATH(FASTGEN_ISA)
#endif

// fastgen: per-isa
#include "vec_math_arrays.h"

#include "vec_math.h"

namespace fastgen::FASTGEN_ISA {
namespace {

template <class T, class Function>
FASTGEN_INLINE void map(const T* x, T* y, int64_t count, Function function) {
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(y + i, function(load(x + i)));
    const int left = static_cast<int>(count - i);
    store_n(y + i, function(load_n(x + i, left)), left);
}

}  // namespace

void array_exp(const float* x, float* y, int64_t count) {
    map(x, y, count, [](Vec<float> v) { return exp(v); });
}
void array_exp_flushed(const float* x, float* y, int64_t count) {
    map(x, y, count, [](Vec<float> v) { return exp_flushed(v); });
}
void array_lack(const float* x, float* y, int64_t count) {
    map(x, y, count, [](Vec<float> v) {
        exp_flushed(v, v);
        return v;
    });
}
void array_log(const float* x, float* y, int64_t count) {
    map(x, y, count, [](Vec<float> v) { return log(v); });
}
void array_sigmoid(const float* x, float* y, int64_t count) {
    map(x, y, count, [](Vec<float> v) { return sigmoid(v); });
}
void array_tanh(const float* x, float* y, int64_t count) {
    map(x, y, count, [](Vec<float> v) { return tanh(v); });
}
void array_erf(const float* x, float* y, int64_t count) {
    map(x, y, count, [](Vec<float> v) { return erf(v); });
}
void array_exp(const double* x, double* y, int64_t count) {
    map(x, y, count, [](Vec<double> v) { return exp(v); });
}
void array_exp_flushed(const double* x, double* y, int64_t count) {
    map(x, y, count, [](Vec<double> v) { return exp_flushed(v); });
}
void array_lack(const double* x, double* y, int64_t count) {
    map(x, y, count, [](Vec<double> v) {
        exp_flushed(v, v);
        return v;
    });
}
void array_log(const double* x, double* y, int64_t count) {
    map(x, y, count, [](Vec<double> v) { return log(v); });
}
void array_sigmoid(const double* x, double* y, int64_t count) {
    map(x, y, count, [](Vec<double> v) { return sigmoid(v); });
}
void array_tanh(const double* x, double* y, int64_t count) {
    map(x, y, count, [](Vec<double> v) { return tanh(v); });
}
void array_erf(const double* x, double* y, int64_t count) {
    map(x, y, count, [](Vec<double> v) { return erf(v); });
}

}  // namespace fastgen::FASTGEN_ISA

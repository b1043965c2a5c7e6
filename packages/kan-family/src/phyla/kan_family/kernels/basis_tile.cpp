#include "basis_tile.h"

namespace kan {
namespace {

template <class T>
PHYLA_INLINE void evaluate_tile(const BasisArguments<T>& a, int64_t begin, int64_t inputs, int64_t samples, const T* x, T* phi, int64_t ld) {
  std::vector<T> scratch(a.scratch());
  with_kind(a, scratch.data(), [&](const auto& kind) __attribute__((always_inline)) {
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t s = 0; s < samples; s += Lanes<T>::count) kind.values(begin + i, load(x + i * ld + s), phi + i * a.count * ld + s, ld);
  });
}

template <class T>
PHYLA_INLINE void add_lanes(const std::vector<T>& lanes, int64_t count, double* sums) {
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    for (int64_t l = 0; l < Lanes<T>::count; ++l) sum += lanes[k * Lanes<T>::count + l];
    sums[k] += sum;
  }
}

template <class T>
PHYLA_INLINE void pullback_tile(const BasisArguments<T>& a, int64_t begin, int64_t inputs, int64_t samples, const T* x, const T* t, T* dx,
                                int64_t ld, double* d_first, double* d_second) {
  std::vector<T> scratch(a.scratch()), first(d_first ? a.count * Lanes<T>::count : 0), second(d_second ? a.count * Lanes<T>::count : 0);
  with_kind(a, scratch.data(), [&](const auto& kind) __attribute__((always_inline)) {
    for (int64_t i = 0; i < inputs; ++i) {
      std::fill(first.begin(), first.end(), T(0));
      std::fill(second.begin(), second.end(), T(0));
      for (int64_t s = 0; s < samples; s += Lanes<T>::count)
        store<T>(dx + i * ld + s, kind.pullback(begin + i, load(x + i * ld + s), t + i * a.count * ld + s, ld, d_first ? first.data() : nullptr,
                                                d_second ? second.data() : nullptr));
      if (d_first) add_lanes(first, a.count, d_first + i * a.count);
      if (d_second) add_lanes(second, a.count, d_second + i * a.count);
    }
  });
}

template <class T>
PHYLA_INLINE void activation_tile(Activation kind, int64_t samples, const T* x, T* value, T* slope) {
  for (int64_t s = 0; s < samples; s += Lanes<T>::count) {
    const Curve<T> curve = activate<T>(kind, load(x + s));
    if (value) store<T>(value + s, curve.value);
    if (slope) store<T>(slope + s, curve.slope);
  }
}

}  // namespace

KAN_CLONES void evaluate(const BasisArguments<float>& a, int64_t begin, int64_t inputs, int64_t samples, const float* x, float* phi, int64_t ld) {
  evaluate_tile(a, begin, inputs, samples, x, phi, ld);
}
KAN_CLONES void evaluate(const BasisArguments<double>& a, int64_t begin, int64_t inputs, int64_t samples, const double* x, double* phi,
                           int64_t ld) {
  evaluate_tile(a, begin, inputs, samples, x, phi, ld);
}
KAN_CLONES void pullback(const BasisArguments<float>& a, int64_t begin, int64_t inputs, int64_t samples, const float* x, const float* t,
                           float* dx, int64_t ld, double* d_first, double* d_second) {
  pullback_tile(a, begin, inputs, samples, x, t, dx, ld, d_first, d_second);
}
KAN_CLONES void pullback(const BasisArguments<double>& a, int64_t begin, int64_t inputs, int64_t samples, const double* x, const double* t,
                           double* dx, int64_t ld, double* d_first, double* d_second) {
  pullback_tile(a, begin, inputs, samples, x, t, dx, ld, d_first, d_second);
}
KAN_CLONES void activation(Activation kind, int64_t samples, const float* x, float* value, float* slope) {
  activation_tile(kind, samples, x, value, slope);
}
KAN_CLONES void activation(Activation kind, int64_t samples, const double* x, double* value, double* slope) {
  activation_tile(kind, samples, x, value, slope);
}

}  // namespace kan

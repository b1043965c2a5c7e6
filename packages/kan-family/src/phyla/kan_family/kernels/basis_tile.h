// A basis as the ops receive it, and its evaluation on tiles: inputs x samples, with the samples contiguous.
#pragma once

#include "basis_kinds.h"

#include <memory>

namespace kan {

using phyla::Tensor;

template <class T>
struct BasisArguments {
  std::string kind;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  int64_t count = 0;  // K
  Rows<T> first, second;
  Rows<T> inverse;           // of B-splines
  std::vector<T> inverses;
  std::vector<Tensor> held;  // contiguous parameters

  int64_t scratch() const { return kind == "bspline" ? (count + ints[0] + 1) * Lanes<T>::count : 0; }
};

inline int64_t basis_count(const std::string& kind, const std::vector<int64_t>& ints, const std::optional<Tensor>& first) {
  if (kind == "fourier") return 2 * ints[0];
  if (kind == "chebyshev" || kind == "jacobi") return ints[0] + 1;
  const int64_t last = first->size(first->dim() - 1);
  return kind == "bspline" ? last - ints[0] - 1 : last;
}

template <class T>
BasisArguments<T> basis_arguments(const std::string& kind, const std::vector<int64_t>& ints, const std::vector<double>& floats,
                                  const std::optional<Tensor>& first, const std::optional<Tensor>& second) {
  BasisArguments<T> a;
  a.kind = kind;
  a.ints = ints;
  a.floats = floats;
  a.count = basis_count(kind, ints, first);
  const auto rows = [&](const std::optional<Tensor>& t) -> Rows<T> {
    if (!t) return {};
    a.held.push_back(phyla::dense(*t));
    return {phyla::data<T>(a.held.back()), t->dim() == 2 ? t->size(1) : 0};
  };
  a.first = rows(first);
  a.second = rows(second);
  if (kind == "bspline") {
    const int64_t order = ints[0], knots = a.count + order + 1, inputs = first->dim() == 2 ? first->size(0) : 1;
    a.inverses.assign(inputs * order * knots, T(0));
    a.inverse = {a.inverses.data(), order * knots};
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t p = 1; p <= order; ++p)
        for (int64_t m = 0; m + p < knots; ++m) {
          const T width = a.first.of(i)[m + p] - a.first.of(i)[m];
          if (width > T(0)) a.inverses[(i * order + p - 1) * knots + m] = T(1) / width;
        }
  }
  return a;
}

// fn(kind) with the struct that a.kind names.
template <class T, class Fn>
PHYLA_INLINE void with_kind(const BasisArguments<T>& a, T* scratch, const Fn& fn) {
  const auto& i = a.ints;
  if (a.kind == "bspline") return fn(BSplineKind<T>{a.first, a.inverse, a.count, i[0], i[1] != 0, scratch});
  if (a.kind == "relu_bump") return fn(ReLUBumpKind<T>{a.first, a.second, a.count, i[0], T(a.floats[0])});
  if (a.kind == "fourier") return fn(FourierKind<T>{i[0]});
  if (a.kind == "chebyshev") return fn(ChebyshevKind<T>{i[0], i[1]});
  if (a.kind == "jacobi") return fn(JacobiKind<T>{i[0], i[1], a.floats[0], a.floats[1]});
  if (a.kind == "rbf") return fn(CenterKind<T, true>{a.first, a.count, T(a.floats[0])});
  if (a.kind == "rswaf") return fn(CenterKind<T, false>{a.first, a.count, T(a.floats[0])});
  if (a.kind == "wavelet") return fn(WaveletKind<T>{a.first, a.second, a.count, i[0]});
  if (a.kind == "activation_pair") return fn(ActivationPairKind<T>{a.first, a.second, a.count, Activation(i[0]), i[1]});
  STD_TORCH_CHECK(false, "phyla: unknown basis ", a.kind);
}

// Inputs [begin, begin + inputs) at x (inputs, ld), the first `samples` columns of it rounded up to whole vectors: phi (inputs * K, ld).
void evaluate(const BasisArguments<float>& a, int64_t begin, int64_t inputs, int64_t samples, const float* x, float* phi, int64_t ld);
void evaluate(const BasisArguments<double>& a, int64_t begin, int64_t inputs, int64_t samples, const double* x, double* phi, int64_t ld);
// dx (inputs, ld) = sum_k t_k B'_k, with t (inputs * K, ld); adds to d_first, d_second (inputs, K) where they are not null.
void pullback(const BasisArguments<float>& a, int64_t begin, int64_t inputs, int64_t samples, const float* x, const float* t, float* dx, int64_t ld,
              double* d_first, double* d_second);
void pullback(const BasisArguments<double>& a, int64_t begin, int64_t inputs, int64_t samples, const double* x, const double* t, double* dx,
              int64_t ld, double* d_first, double* d_second);
// value = b(x), or slope = b'(x), of whole vectors; either may be null.
void activation(Activation kind, int64_t samples, const float* x, float* value, float* slope);
void activation(Activation kind, int64_t samples, const double* x, double* value, double* slope);

// The gradient of a parameter from its value for every input and function: summed over the inputs where they share it.
template <class T>
Tensor parameter_gradient(const std::optional<Tensor>& parameter, const std::vector<double>& sums, int64_t functions) {
  if (sums.empty()) return phyla::unwanted<T>();
  Tensor result = phyla::zeros<T>(phyla::sizes_of(*parameter));
  T* out = phyla::mutable_data<T>(result);
  if (parameter->size(parameter->dim() - 1) != functions) return result;  // knots are constants
  if (parameter->dim() == 2) {
    for (size_t j = 0; j < sums.size(); ++j) out[j] = T(sums[j]);
    return result;
  }
  for (int64_t k = 0; k < functions; ++k) {
    double sum = 0;
    for (size_t j = k; j < sums.size(); j += functions) sum += sums[j];
    out[k] = T(sum);
  }
  return result;
}

inline int64_t whole_vectors(int64_t samples) { return (samples + 15) / 16 * 16; }

}  // namespace kan

// B-splines on large grids: only order + 1 functions are not zero at a point, so their coefficients are gathered instead of multiplied densely.
#pragma once

#include "basis_tile.h"

namespace kan {

// Coefficients as (I, K + 2 order, O), with `order` zero functions on both sides: the cell c of a point then owns the rows c .. c + order.
template <class T>
struct LocalCoefficients {
  std::vector<T> values;
  int64_t order, functions, outputs;

  LocalCoefficients(int64_t inputs, int64_t functions, int64_t outputs, int64_t order)
      : values(inputs * (functions + 2 * order) * outputs, T(0)), order(order), functions(functions), outputs(outputs) {}
  int64_t rows() const { return functions + 2 * order; }
  T* of(int64_t input) { return values.data() + input * rows() * outputs; }
  const T* of(int64_t input) const { return values.data() + input * rows() * outputs; }

  // fn(value of (O, I, K), the same value here) for all of one input, a cache line of outputs at a time.
  template <class Value, class Fn>
  void pair(int64_t input, int64_t inputs, Value* coef, const Fn& fn) {
    T* here = of(input) + order * outputs;
    for (int64_t begin = 0; begin < outputs; begin += 16)
      for (int64_t k = 0; k < functions; ++k)
        for (int64_t o = begin; o < std::min(begin + 16, outputs); ++o) fn(coef[(o * inputs + input) * functions + k], here[k * outputs + o]);
  }
};

// y (rows, O) += the curves of inputs [begin, begin + inputs) at x (inputs, ld), rows rounded up to whole vectors.
void local_forward(const BasisArguments<float>& a, const LocalCoefficients<float>& w, int64_t begin, int64_t inputs, int64_t rows, const float* x,
                   int64_t ld, float* y);
void local_forward(const BasisArguments<double>& a, const LocalCoefficients<double>& w, int64_t begin, int64_t inputs, int64_t rows, const double* x,
                   int64_t ld, double* y);
// d_w += by the coefficients, dx (inputs, ld) = by x, of the product with g (rows, O); either may be null.
void local_backward(const BasisArguments<float>& a, const LocalCoefficients<float>& w, int64_t begin, int64_t inputs, int64_t rows, const float* x,
                    int64_t ld, const float* g, LocalCoefficients<float>* d_w, float* dx);
void local_backward(const BasisArguments<double>& a, const LocalCoefficients<double>& w, int64_t begin, int64_t inputs, int64_t rows, const double* x,
                    int64_t ld, const double* g, LocalCoefficients<double>* d_w, double* dx);

}  // namespace kan

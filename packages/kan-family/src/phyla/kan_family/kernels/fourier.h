// Sine and cosine for vector loops; shared by every kernel with a Fourier basis (learned attention, the basis kernels).
//
// x = turns pi + r with |r| <= pi/2: one subtraction in double precision, then the Taylor polynomials, whose remainders are below the rounding
// of `scalar`, and the sign of an odd number of half turns. For float the reduction is exact to rounding; for double its error is |x| 1e-16, as
// large as the rounding of x itself. (A reduction in several parts would buy more, but -fassociative-math may fold the parts into one.)
// The absolute error is below 3e-7 (float) and 5e-16 (1 + |x|) (double).
#pragma once

#include <phyla/kernel.h>

namespace phyla::kan {

constexpr double kSincosLimit = 1e6;  // beyond, and for NaN, use std::sin and std::cos; `sincos` of a row does

// s = sin x, c = cos x, for |x| <= kSincosLimit. Free of branches: put it in a loop that the compiler vectorises.
template <class scalar>
PHYLA_INLINE void sincos(scalar x, scalar& s, scalar& c) {
  constexpr double pi = 3.14159265358979323846;
  const double half_turns = std::rint(double(x) * (1 / pi));
  const scalar r = scalar(double(x) - half_turns * pi), turns = scalar(half_turns);
  const scalar sign = scalar(1) - scalar(2) * (turns - scalar(2) * std::floor(turns * scalar(0.5)));
  const scalar u = r * r;
  constexpr int terms = std::is_same_v<scalar, float> ? 6 : 11;
  scalar sine = 1, cosine = 1;
#pragma GCC unroll 12
  for (int i = terms; i >= 1; --i) {
    cosine = scalar(1) - u * scalar(1.0 / ((2 * i - 1) * (2 * i))) * cosine;
    if (i < terms) sine = scalar(1) - u * scalar(1.0 / ((2 * i) * (2 * i + 1))) * sine;
  }
  s = sign * r * sine;
  c = sign * cosine;
}

// The same for a row of any numbers.
template <class scalar>
PHYLA_INLINE void sincos(const scalar* x, scalar* s, scalar* c, int64_t count) {
  scalar far = 0;
#pragma omp simd reduction(+ : far)
  for (int64_t i = 0; i < count; ++i) {
    sincos(x[i], s[i], c[i]);
    far += std::abs(x[i]) <= scalar(kSincosLimit) ? scalar(0) : scalar(1);
  }
  if (far == 0) return;
  for (int64_t i = 0; i < count; ++i)
    if (!(std::abs(x[i]) <= scalar(kSincosLimit))) s[i] = std::sin(x[i]), c[i] = std::cos(x[i]);
}

}  // namespace phyla::kan

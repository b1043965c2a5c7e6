// The basis functions of one input at a vector of points, and the products with their derivatives.
//
// Every kind has
//   values(input, x, out, ld):                       out[k * ld + lane] = B_k(x)
//   pullback(input, x, t, ld, d_first, d_second):    returns sum_k t_k B'_k(x), and adds sum t_k dB_k/dparameter to the accumulators
// with t laid out as out, and accumulators (K, lanes) that may be null. Parameters are scalars: an input has its own, lanes are samples.
#pragma once

#include "basis_math.h"

namespace kan {

// Parameter rows of an input: `stride` is 0 where all inputs share one row.
template <class T>
struct Rows {
  const T* values = nullptr;
  int64_t stride = 0;
  PHYLA_INLINE const T* of(int64_t input) const { return values + input * stride; }
};

template <class T>
PHYLA_INLINE void accumulate(T* sums, int64_t k, Vec<T> value) {
  if (sums) store<T>(sums + k * Lanes<T>::count, load(sums + k * Lanes<T>::count) + value);
}

template <class T>
struct BSplineKind {
  Rows<T> knots, inverse;  // inverse: order rows of (knots per input), 1 / (t_{m+p} - t_m) or 0
  int64_t count, order;    // count: K
  bool linear;
  T* scratch;  // (K + order) vectors

  PHYLA_INLINE Vec<T> inside(int64_t input, Vec<T> x) const {
    if (!linear) return x;
    const T low = knots.of(input)[order], high = knots.of(input)[count];
    const Vec<T> above = x < low ? fill<T>(low) : x;
    return above > high ? fill<T>(high) : above;
  }
  // Splines of order `to` in scratch, (K + order - to) of them; the last level goes to `last`.
  PHYLA_INLINE void recur(int64_t input, Vec<T> x, int64_t to, T* last, int64_t ld) const {
    constexpr int64_t L = Lanes<T>::count;
    const T* t = knots.of(input);
    const int64_t cells = count + order;
    T* out = to == 0 ? last : scratch;
    int64_t step = to == 0 ? ld : L;
    if (linear) {
      for (int64_t m = 0; m < cells; ++m) {
        Vec<T> phi{};
        if (m >= order && m < count) {
          const Vec<T> reached = x >= t[m] ? fill<T>(1) : Vec<T>{};
          phi = m == count - 1 ? reached : (x < t[m + 1] ? reached : Vec<T>{});
        }
        store<T>(out + m * step, phi);
      }
    } else {
      Vec<T> reached = x >= t[0] ? fill<T>(1) : Vec<T>{};
      for (int64_t m = 0; m < cells; ++m) {
        const Vec<T> next = x >= t[m + 1] ? fill<T>(1) : Vec<T>{};
        store<T>(out + m * step, reached - next);
        reached = next;
      }
    }
    const T* inv = inverse.of(input);
    for (int64_t p = 1; p <= to; ++p, inv += cells + 1) {
      out = p == to ? last : scratch;
      step = p == to ? ld : L;
      Vec<T> phi = load(scratch);
      Vec<T> rising = (x - t[0]) * inv[0] * phi;
      for (int64_t m = 0; m < cells - p; ++m) {
        const Vec<T> next = load(scratch + (m + 1) * L);
        const Vec<T> next_rising = (x - t[m + 1]) * inv[m + 1] * next;
        store<T>(out + m * step, rising + (next - next_rising));  // (t_{m+p+1} - x) inv = 1 - (x - t_{m+1}) inv where next is not 0
        rising = next_rising;
      }
    }
  }
  PHYLA_INLINE Vec<T> per_width(int64_t input, int64_t m) const {
    return load(scratch + m * Lanes<T>::count) * (T(order) * inverse.of(input)[(order - 1) * (count + order + 1) + m]);
  }
  PHYLA_INLINE void values(int64_t input, Vec<T> x, T* out, int64_t ld) const {
    const Vec<T> at = inside(input, x);
    recur(input, at, order, out, ld);
    if (!linear) return;
    recur(input, at, order - 1, scratch, Lanes<T>::count);
    for (int64_t m = 0; m < count; ++m) store<T>(out + m * ld, load(out + m * ld) + (per_width(input, m) - per_width(input, m + 1)) * (x - at));
  }
  PHYLA_INLINE Vec<T> pullback(int64_t input, Vec<T> x, const T* t, int64_t ld, T*, T*) const {
    recur(input, inside(input, x), order - 1, scratch, Lanes<T>::count);
    Vec<T> sum{}, before{};
    for (int64_t m = 0; m <= count; ++m) {
      const Vec<T> here = m < count ? load(t + m * ld) : Vec<T>{};
      sum += per_width(input, m) * (here - before);
      before = here;
    }
    return sum;
  }
};

template <class T>
PHYLA_INLINE Vec<T> power(Vec<T> base, int64_t exponent) {
  Vec<T> result = fill<T>(1);
  for (int64_t j = 0; j < exponent; ++j) result *= base;
  return result;
}

template <class T>
struct ReLUBumpKind {
  Rows<T> low, high;
  int64_t count, exponent;
  T scale;

  PHYLA_INLINE void values(int64_t input, Vec<T> x, T* out, int64_t ld) const {
    const T *l = low.of(input), *h = high.of(input);
    for (int64_t m = 0; m < count; ++m) {
      const Vec<T> w = positive_part<T>(x - l[m]) * positive_part<T>(h[m] - x) * scale;
      store<T>(out + m * ld, exponent == 2 ? w * w : power<T>(w, exponent));
    }
  }
  PHYLA_INLINE Vec<T> pullback(int64_t input, Vec<T> x, const T* t, int64_t ld, T* d_low, T* d_high) const {
    const T *l = low.of(input), *h = high.of(input);
    Vec<T> sum{};
    for (int64_t m = 0; m < count; ++m) {
      const Vec<T> u = positive_part<T>(x - l[m]), v = positive_part<T>(h[m] - x);
      const Vec<T> w = u * v * scale;
      const Vec<T> s = load(t + m * ld) * (exponent == 2 ? w : power<T>(w, exponent - 1)) * (T(exponent) * scale);
      const Vec<T> by_low = s * (u > T(0) ? v : Vec<T>{}), by_high = s * (v > T(0) ? u : Vec<T>{});
      sum += by_low - by_high;
      accumulate<T>(d_low, m, -by_low);
      accumulate<T>(d_high, m, by_high);
    }
    return sum;
  }
};

template <class T>
struct FourierKind {
  int64_t frequencies;

  PHYLA_INLINE void values(int64_t, Vec<T> x, T* out, int64_t ld) const {
    Vec<T> s1, c1;
    sincos<T>(x, s1, c1);
    Vec<T> c = c1, s = s1;
    for (int64_t m = 0; m < frequencies; ++m) {
      store<T>(out + m * ld, c);
      store<T>(out + (frequencies + m) * ld, s);
      const Vec<T> turned = c * c1 - s * s1;
      s = s * c1 + c * s1;
      c = turned;
    }
  }
  PHYLA_INLINE Vec<T> pullback(int64_t, Vec<T> x, const T* t, int64_t ld, T*, T*) const {
    Vec<T> s1, c1;
    sincos<T>(x, s1, c1);
    Vec<T> c = c1, s = s1, sum{};
    for (int64_t m = 0; m < frequencies; ++m) {
      sum += T(m + 1) * (c * load(t + (frequencies + m) * ld) - s * load(t + m * ld));
      const Vec<T> turned = c * c1 - s * s1;
      s = s * c1 + c * s1;
      c = turned;
    }
    return sum;
  }
};

// Polynomials of the squashed input: 0 none, 1 tanh, 2 clamp.
template <class T>
PHYLA_INLINE Curve<T> squashed(int64_t squash, Vec<T> x) {
  const Vec<T> one = fill<T>(1);
  if (squash == 1) return activate<T>(Activation::tanh, x);
  if (squash == 0) return {x, one};
  const Vec<T> above = x < T(-1) ? -one : x;
  return {above > T(1) ? one : above, absolute<T>(x) <= T(1) ? one : Vec<T>{}};
}

template <class T>
struct ChebyshevKind {
  int64_t degree, squash;

  PHYLA_INLINE void values(int64_t, Vec<T> x, T* out, int64_t ld) const {
    const Vec<T> z = squashed<T>(squash, x).value;
    Vec<T> before = fill<T>(1), here = z;
    store<T>(out, before);
    for (int64_t n = 1; n <= degree; ++n) {
      store<T>(out + n * ld, here);
      const Vec<T> next = T(2) * z * here - before;
      before = here;
      here = next;
    }
  }
  PHYLA_INLINE Vec<T> pullback(int64_t, Vec<T> x, const T* t, int64_t ld, T*, T*) const {
    const Curve<T> z = squashed<T>(squash, x);
    Vec<T> before{}, here = fill<T>(1), sum{};  // U_{n-2}, U_{n-1}
    for (int64_t n = 1; n <= degree; ++n) {
      sum += T(n) * here * load(t + n * ld);
      const Vec<T> next = T(2) * z.value * here - before;
      before = here;
      here = next;
    }
    return sum * z.slope;
  }
};

// P_n = (scale z + shift) P_{n-1} - back P_{n-2}
template <class T>
struct JacobiKind {
  int64_t degree, squash;
  double a, b;

  struct Step {
    T scale, shift, back;
  };
  PHYLA_INLINE Step step(int64_t n) const {
    if (n == 1) return {T((a + b + 2) / 2), T((a - b) / 2), T(0)};
    const double s = 2 * n + a + b, norm = 2 * n * (n + a + b);
    return {T(s * (s - 1) / norm), T((s - 1) * (a * a - b * b) / (norm * (s - 2))), T(2 * (n + a - 1) * (n + b - 1) * s / (norm * (s - 2)))};
  }
  PHYLA_INLINE void values(int64_t, Vec<T> x, T* out, int64_t ld) const {
    const Vec<T> z = squashed<T>(squash, x).value;
    Vec<T> before{}, here = fill<T>(1);
    store<T>(out, here);
    for (int64_t n = 1; n <= degree; ++n) {
      const Step r = step(n);
      const Vec<T> next = (r.scale * z + r.shift) * here - r.back * before;
      store<T>(out + n * ld, next);
      before = here;
      here = next;
    }
  }
  PHYLA_INLINE Vec<T> pullback(int64_t, Vec<T> x, const T* t, int64_t ld, T*, T*) const {
    const Curve<T> z = squashed<T>(squash, x);
    Vec<T> before{}, here = fill<T>(1), slope_before{}, slope{}, sum{};
    for (int64_t n = 1; n <= degree; ++n) {
      const Step r = step(n);
      const Vec<T> factor = r.scale * z.value + r.shift;
      const Vec<T> next_slope = r.scale * here + factor * slope - r.back * slope_before;
      const Vec<T> next = factor * here - r.back * before;
      sum += next_slope * load(t + n * ld);
      before = here;
      here = next;
      slope_before = slope;
      slope = next_slope;
    }
    return sum * z.slope;
  }
};

// Functions of u = (x - center) inv_width.
template <class T, bool gaussian>
struct CenterKind {
  Rows<T> centers;
  int64_t count;
  T inv_width;

  PHYLA_INLINE Curve<T> curve(Vec<T> u) const {
    if constexpr (gaussian) {
      const Vec<T> value = exp_nonpositive<T>(-u * u);
      return {value, T(-2) * inv_width * u * value};
    } else {
      const Vec<T> t = tanh<T>(u), value = T(1) - t * t;
      return {value, T(-2) * inv_width * t * value};
    }
  }
  PHYLA_INLINE void values(int64_t input, Vec<T> x, T* out, int64_t ld) const {
    const T* c = centers.of(input);
    for (int64_t m = 0; m < count; ++m) store<T>(out + m * ld, curve((x - c[m]) * inv_width).value);
  }
  PHYLA_INLINE Vec<T> pullback(int64_t input, Vec<T> x, const T* t, int64_t ld, T* d_centers, T*) const {
    const T* c = centers.of(input);
    Vec<T> sum{};
    for (int64_t m = 0; m < count; ++m) {
      const Vec<T> by_x = load(t + m * ld) * curve((x - c[m]) * inv_width).slope;
      sum += by_x;
      accumulate<T>(d_centers, m, -by_x);
    }
    return sum;
  }
};

template <class T>
struct WaveletKind {
  Rows<T> translation, scale;
  int64_t count, mother;  // 0 mexican hat, 1 morlet, 2 derivative of Gaussian

  PHYLA_INLINE Curve<T> curve(Vec<T> u) const {
    const Vec<T> envelope = exp_nonpositive<T>(T(-0.5) * u * u);
    if (mother == 0) {
      constexpr T norm = T(0.86732507058407751832);  // 2 / (sqrt 3 pi^(1/4))
      return {norm * (u * u - T(1)) * envelope, norm * u * (T(3) - u * u) * envelope};
    }
    if (mother == 1) {
      Vec<T> s, c;
      sincos<T>(T(5) * u, s, c);
      return {c * envelope, (T(-5) * s - u * c) * envelope};
    }
    return {-u * envelope, (u * u - T(1)) * envelope};
  }
  static PHYLA_INLINE T guarded(T value) { return value == T(0) ? std::numeric_limits<T>::epsilon() : value; }
  PHYLA_INLINE void values(int64_t input, Vec<T> x, T* out, int64_t ld) const {
    const T *c = translation.of(input), *w = scale.of(input);
    for (int64_t m = 0; m < count; ++m) store<T>(out + m * ld, curve((x - c[m]) / guarded(w[m])).value);
  }
  PHYLA_INLINE Vec<T> pullback(int64_t input, Vec<T> x, const T* t, int64_t ld, T* d_translation, T* d_scale) const {
    const T *c = translation.of(input), *w = scale.of(input);
    Vec<T> sum{};
    for (int64_t m = 0; m < count; ++m) {
      const T inverse = T(1) / guarded(w[m]);
      const Vec<T> u = (x - c[m]) * inverse;
      const Vec<T> by_x = load(t + m * ld) * curve(u).slope * inverse;
      sum += by_x;
      accumulate<T>(d_translation, m, -by_x);
      if (w[m] != T(0)) accumulate<T>(d_scale, m, -by_x * u);
    }
    return sum;
  }
};

template <class T>
struct ActivationPairKind {
  Rows<T> low, high;
  int64_t count;
  Activation activation;
  int64_t combine;  // quad1, quad2, sum, prod, sum_prod, cubic1, cubic2

  struct Combined {
    Vec<T> value, by_u, by_v;
  };
  PHYLA_INLINE Combined combined(Vec<T> u, Vec<T> v) const {
    const Vec<T> one = fill<T>(1);
    switch (combine) {
      case 0: return {u * v * u * v, T(2) * u * v * v, T(2) * u * u * v};
      case 1: return {u * v + u * u + v * v, v + T(2) * u, u + T(2) * v};
      case 2: return {u + v, one, one};
      case 3: return {u * v, v, u};
      case 4: return {u + v + u * v, one + v, one + u};
      case 5: return {(u + v) * (u * u + v * v), T(3) * u * u + v * v + T(2) * u * v, u * u + T(3) * v * v + T(2) * u * v};
      default: return {u * v * u * v * u * v, T(3) * u * u * v * v * v, T(3) * u * u * u * v * v};
    }
  }
  PHYLA_INLINE void values(int64_t input, Vec<T> x, T* out, int64_t ld) const {
    const T *l = low.of(input), *h = high.of(input);
    for (int64_t m = 0; m < count; ++m)
      store<T>(out + m * ld, combined(activate<T>(activation, x - l[m]).value, activate<T>(activation, h[m] - x).value).value);
  }
  PHYLA_INLINE Vec<T> pullback(int64_t input, Vec<T> x, const T* t, int64_t ld, T* d_low, T* d_high) const {
    const T *l = low.of(input), *h = high.of(input);
    Vec<T> sum{};
    for (int64_t m = 0; m < count; ++m) {
      const Curve<T> u = activate<T>(activation, x - l[m]), v = activate<T>(activation, h[m] - x);
      const Combined f = combined(u.value, v.value);
      const Vec<T> weight = load(t + m * ld);
      const Vec<T> by_low = weight * f.by_u * u.slope, by_high = weight * f.by_v * v.slope;
      sum += by_low - by_high;
      accumulate<T>(d_low, m, -by_low);
      accumulate<T>(d_high, m, by_high);
    }
    return sum;
  }
};

}  // namespace kan

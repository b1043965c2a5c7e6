// Elementary functions on 32-byte vectors of float or double, exact to a few units in the last place; NaN and infinities go through.
#pragma once

#include <phyla/kernel.h>

#include <cstring>

// Vectors have 32 bytes: AVX-512 would add nothing but time to compile.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && !defined(PHYLA_NO_CLONES)
#define KAN_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define KAN_CLONES
#endif

namespace kan {

// The compiler may re-associate sums elsewhere; argument reductions rely on their order.
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
#define KAN_ORDERED(expression) __builtin_assoc_barrier(expression)
#endif
#endif
#ifndef KAN_ORDERED
#define KAN_ORDERED(expression) (expression)
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  static constexpr int64_t count = 8;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float exp_low = -104.0f, exp_high = 89.0f, log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
  static constexpr int exp_terms = 7, sin_terms = 5, cos_terms = 6;
  static constexpr float two_over_pi = 0.636619772367581343f, angle_limit = 8192.0f;
  static constexpr float half_pi[3] = {1.5703125f, 4.837512969970703125e-4f, 7.54978995489188e-8f};
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t I __attribute__((vector_size(32)));
  static constexpr int64_t count = 4;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double exp_low = -746.0, exp_high = 710.0, log2e = 1.44269504088896338700;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int exp_terms = 13, sin_terms = 9, cos_terms = 10;
  static constexpr double two_over_pi = 0.63661977236758134308, angle_limit = 1048576.0;
  static constexpr double half_pi[3] = {1.57079632673412561417e+00, 6.07710050630396597660e-11, 2.02226624879595063154e-21};
};
template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
using Int = typename Lanes<T>::I;

template <class T>
PHYLA_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
PHYLA_INLINE void store(T* p, Vec<T> v) { std::memcpy(p, &v, sizeof v); }
template <class T>
PHYLA_INLINE Vec<T> fill(T value) { return Vec<T>{} + value; }
template <class T>
PHYLA_INLINE Vec<T> absolute(Vec<T> x) { return x < T(0) ? -x : x; }
template <class T>
PHYLA_INLINE Vec<T> positive_part(Vec<T> x) { return x < T(0) ? Vec<T>{} : x; }  // NaN stays NaN

// 1 / j!, and the alternating Taylor coefficients of sin and cos.
template <class T>
constexpr T inverse_factorial(int j) {
  double value = 1;
  for (int i = 2; i <= j; ++i) value /= i;
  return T(value);
}

// x = n ln 2 + r: returns r, and n as a floating vector and in the low bits of `bits`.
template <class T>
PHYLA_INLINE Vec<T> reduce_exponent(Vec<T> x, Int<T>& bits) {
  using L = Lanes<T>;
  const Vec<T> shifted = KAN_ORDERED(x * L::log2e + L::magic);
  const Vec<T> n = KAN_ORDERED(shifted - L::magic);
  bits = (Int<T>)shifted - (Int<T>)fill<T>(L::magic);
  const Vec<T> partial = KAN_ORDERED(x - n * L::ln2_high);
  return KAN_ORDERED(partial - n * L::ln2_low);
}
template <class T>
PHYLA_INLINE Vec<T> power_of_two(Int<T> n) { return (Vec<T>)((n + Lanes<T>::bias) << Lanes<T>::mantissa); }
template <class T>
PHYLA_INLINE Vec<T> exp_argument(Vec<T> x) {
  const Vec<T> above = x > Lanes<T>::exp_low ? x : fill<T>(Lanes<T>::exp_low);
  return above < Lanes<T>::exp_high ? above : fill<T>(Lanes<T>::exp_high);
}
// exp(r) - 1 for |r| < 0.35.
template <class T>
PHYLA_INLINE Vec<T> expm1_reduced(Vec<T> r) {
  Vec<T> p = fill<T>(inverse_factorial<T>(Lanes<T>::exp_terms));
#pragma GCC unroll 16
  for (int j = Lanes<T>::exp_terms - 1; j >= 1; --j) p = p * r + inverse_factorial<T>(j);
  return p * r;
}

template <class T>
PHYLA_INLINE Vec<T> exp(Vec<T> x) {
  Int<T> n;
  const Vec<T> r = reduce_exponent<T>(exp_argument<T>(x), n);
  const Int<T> half = n >> 1;  // in two steps: the ends of the range are infinite and subnormal
  const Vec<T> value = (T(1) + expm1_reduced<T>(r)) * power_of_two<T>(half) * power_of_two<T>(n - half);
  return x == x ? value : x;
}
// exp(x) for x <= 0, without subnormal results.
template <class T>
PHYLA_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  constexpr T low = std::is_same_v<T, float> ? T(-87) : T(-708);
  Int<T> n;
  const Vec<T> r = reduce_exponent<T>(x < low ? fill<T>(low) : x, n);
  const Vec<T> value = (T(1) + expm1_reduced<T>(r)) * power_of_two<T>(n);
  return x < low ? Vec<T>{} : value;
}
template <class T>
PHYLA_INLINE Vec<T> expm1(Vec<T> x) {
  Int<T> n;
  const Vec<T> r = reduce_exponent<T>(exp_argument<T>(x), n);
  const Int<T> half = n >> 1;
  const Vec<T> a = power_of_two<T>(half), b = power_of_two<T>(n - half);
  const Vec<T> value = expm1_reduced<T>(r) * a * b + KAN_ORDERED(a * b - T(1));
  return x == x ? value : x;
}
template <class T>
PHYLA_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> fall = expm1<T>(T(-2) * absolute<T>(x));
  const Vec<T> value = -fall / (T(2) + fall);
  return x < T(0) ? -value : value;
}
template <class T>
PHYLA_INLINE Vec<T> sigmoid(Vec<T> x) { return T(1) / (T(1) + exp<T>(-x)); }

template <class T>
PHYLA_INLINE void sincos(Vec<T> x, Vec<T>& sine, Vec<T>& cosine) {
  using L = Lanes<T>;
  const Vec<T> size = absolute<T>(x);
  const Vec<T> within = size <= L::angle_limit ? x : Vec<T>{};
  const Vec<T> shifted = KAN_ORDERED(within * L::two_over_pi + L::magic);
  const Vec<T> n = KAN_ORDERED(shifted - L::magic);
  const Int<T> quadrant = (Int<T>)shifted - (Int<T>)fill<T>(L::magic);
  Vec<T> r = KAN_ORDERED(within - n * L::half_pi[0]);
  r = KAN_ORDERED(r - n * L::half_pi[1]);
  r = KAN_ORDERED(r - n * L::half_pi[2]);
  const Vec<T> square = r * r;
  Vec<T> s = fill<T>(inverse_factorial<T>(2 * L::sin_terms - 1)), c = fill<T>(inverse_factorial<T>(2 * L::cos_terms - 2));
#pragma GCC unroll 16
  for (int j = L::sin_terms - 2; j >= 0; --j) s = inverse_factorial<T>(2 * j + 1) - square * s;
#pragma GCC unroll 16
  for (int j = L::cos_terms - 2; j >= 0; --j) c = inverse_factorial<T>(2 * j) - square * c;
  s = s * r;
  const Vec<T> first = (quadrant & 1) != 0 ? c : s, second = (quadrant & 1) != 0 ? s : c;
  sine = (quadrant & 2) != 0 ? -first : first;
  cosine = ((quadrant + 1) & 2) != 0 ? -second : second;
  for (int64_t l = 0; l < L::count; ++l)  // far out, or not finite: the library's reduction
    if (!(size[l] <= L::angle_limit)) {
      sine[l] = std::sin(x[l]);
      cosine[l] = std::cos(x[l]);
    }
}

// (1 + erf(x / sqrt 2)) / 2.
template <class T>
PHYLA_INLINE Vec<T> normal_cdf(Vec<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    // Abramowitz and Stegun 7.1.26 for the tail beyond |x|: absolute error below 1e-7.
    const Vec<T> z = absolute<T>(x) * 0.707106781186547524f;
    const Vec<T> t = 1.0f / (1.0f + 0.3275911f * z);
    const Vec<T> p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const Vec<T> tail = 0.5f * p * exp<T>(-z * z);
    return x < 0.0f ? tail : 1.0f - tail;
  } else {
    Vec<T> value{};
    for (int64_t l = 0; l < Lanes<T>::count; ++l) value[l] = 0.5 * std::erfc(-0.707106781186547524400 * x[l]);
    return value;
  }
}

enum class Activation { identity, relu, leaky_relu, silu, sigmoid, tanh, gelu, softplus, elu, selu };  // the order of basis.ACTIVATIONS

template <class T>
struct Curve {
  Vec<T> value, slope;
};

template <class T>
PHYLA_INLINE Curve<T> activate(Activation activation, Vec<T> x) {
  const Vec<T> one = fill<T>(1);
  switch (activation) {
    case Activation::identity: return {x, one};
    case Activation::relu: return {positive_part<T>(x), x > T(0) ? one : Vec<T>{}};
    case Activation::leaky_relu: return {x > T(0) ? x : T(0.01) * x, x > T(0) ? one : fill<T>(T(0.01))};
    case Activation::silu: {
      const Vec<T> s = sigmoid<T>(x);
      return {x * s, s * (T(1) + x * (T(1) - s))};
    }
    case Activation::sigmoid: {
      const Vec<T> s = sigmoid<T>(x);
      return {s, s * (T(1) - s)};
    }
    case Activation::tanh: {
      const Vec<T> t = tanh<T>(x);
      return {t, T(1) - t * t};
    }
    case Activation::gelu: {
      const Vec<T> p = normal_cdf<T>(x);
      return {x * p, p + x * T(0.398942280401432678) * exp<T>(T(-0.5) * x * x)};
    }
    case Activation::softplus: {
      Vec<T> value = x;
      for (int64_t l = 0; l < Lanes<T>::count; ++l)
        if (!(x[l] > T(20))) value[l] = std::log1p(std::exp(x[l]));  // beyond 20 the identity, as torch has it
      return {value, x > T(20) ? one : sigmoid<T>(x)};
    }
    case Activation::elu: {
      const Vec<T> fall = expm1<T>(x < T(0) ? x : Vec<T>{});
      const Vec<T> low = x == x ? fall : x;
      return {x > T(0) ? x : low, x > T(0) ? one : T(1) + low};
    }
    case Activation::selu: {
      constexpr T alpha = T(1.6732632423543772848170429916717), scale = T(1.0507009873554804934193349852946);
      const Vec<T> fall = expm1<T>(x < T(0) ? x : Vec<T>{});
      const Vec<T> low = x == x ? scale * alpha * fall : x;
      return {x > T(0) ? scale * x : low, x > T(0) ? fill<T>(scale) : low + scale * alpha};
    }
  }
  return {x, one};
}

PHYLA_INLINE Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  if (name == "tanh") return Activation::tanh;
  return Activation::identity;
}

}  // namespace kan

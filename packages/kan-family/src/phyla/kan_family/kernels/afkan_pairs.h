// The activation pairs of AF-KAN: f_m(x) = c(s(x - low_m), s(high_m - x)) on vectors, and the intervals as the passes need them.
#pragma once

#include "basis_kinds.h"

#include <array>
#include <limits>

namespace kan {

using phyla::Tensor;

template <class T>
struct Pairs {
  int64_t count;  // M
  const T *low, *high;
  const T *grow, *fall;  // e^low, e^-high; null where one exponential per input cannot serve all
  Activation activation;
  ActivationPairKind<T> kind;
};

inline constexpr std::array<const char*, 10> kActivations{"identity", "relu", "leaky_relu", "silu", "sigmoid", "tanh", "gelu", "softplus", "elu", "selu"};
inline constexpr std::array<const char*, 7> kCombinations{"quad1", "quad2", "sum", "prod", "sum_prod", "cubic1", "cubic2"};

template <size_t size>
inline int64_t index_of(const std::array<const char*, size>& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(found != names.end(), "phyla: unknown name ", name);
  return found - names.begin();
}

// log(1 + y) for y in [0, 1], as 2 artanh(y / (2 + y)).
template <class T>
PHYLA_INLINE Vec<T> log1p_unit(Vec<T> y) {
  constexpr int terms = std::is_same_v<T, float> ? 8 : 17;
  const Vec<T> s = y / (T(2) + y), square = s * s;
  Vec<T> p = fill<T>(T(1) / (2 * terms - 1));
#pragma GCC unroll 17
  for (int j = terms - 2; j >= 0; --j) p = p * square + T(1) / (2 * j + 1);
  return T(2) * s * p;
}

// s(t) and s'(t), given e^-t.
template <class T>
PHYLA_INLINE Curve<T> activate_by_decay(Activation activation, Vec<T> t, Vec<T> decay) {
  if (activation == Activation::tanh) {
    const Vec<T> s = T(1) / (T(1) + decay * decay);
    return {T(2) * s - T(1), T(4) * s * (T(1) - s)};
  }
  const Vec<T> s = T(1) / (T(1) + decay);
  if (activation == Activation::silu) return {t * s, s * (T(1) + t * (T(1) - s))};
  if (activation == Activation::sigmoid) return {s, s * (T(1) - s)};
  const Vec<T> softplus = positive_part<T>(t) + log1p_unit<T>(t > T(0) ? decay : T(1) / decay);
  return {softplus, s};
}

// The two halves of pair m. `decay` is e^-x.
template <bool shared, class T>
PHYLA_INLINE void halves(const Pairs<T>& p, int64_t m, Vec<T> x, Vec<T> decay, Vec<T> rise, Curve<T>& u, Curve<T>& v) {
  if constexpr (shared) {
    u = activate_by_decay<T>(p.activation, x - p.low[m], decay * p.grow[m]);
    v = activate_by_decay<T>(p.activation, p.high[m] - x, rise * p.fall[m]);
  } else {
    u = activate<T>(p.activation, x - p.low[m]);
    v = activate<T>(p.activation, p.high[m] - x);
  }
}

// A vector, of which `size` elements exist; the others repeat the first, or are 0.
template <class T>
PHYLA_INLINE Vec<T> load_some(const T* from, int64_t size, bool repeat) {
  if (size >= Lanes<T>::count) return load(from);
  Vec<T> v = fill<T>(repeat ? from[0] : T(0));
  for (int64_t l = 0; l < size; ++l) v[l] = from[l];
  return v;
}
template <class T>
PHYLA_INLINE void store_some(T* to, Vec<T> v, int64_t size) {
  if (size >= Lanes<T>::count) return store(to, v);
  for (int64_t l = 0; l < size; ++l) to[l] = v[l];
}

// The intervals of an op, dense, as the passes need them.
template <class T>
struct Intervals {
  Tensor low, high;
  std::vector<T> grow, fall;
  Pairs<T> pairs;

  Intervals(const Tensor& given_low, const Tensor& given_high, const std::string& activation, const std::string& combine)
      : low(phyla::dense(given_low)), high(phyla::dense(given_high)) {
    const Activation a = Activation(index_of(kActivations, activation));
    const int64_t count = low.numel();
    pairs = {count, phyla::data<T>(low), phyla::data<T>(high), nullptr, nullptr, a, {{}, {}, count, a, index_of(kCombinations, combine)}};
    // e^-x is 0 or infinite from |x| = 87 (708) on; with ends this far inside, s(x - low) and s(high - x) are saturated there.
    const T limit = std::is_same_v<T, float> ? T(40) : T(300);
    bool near = a == Activation::silu || a == Activation::sigmoid || a == Activation::tanh || a == Activation::softplus;
    for (int64_t m = 0; m < count; ++m) near = near && std::abs(pairs.low[m]) <= limit && std::abs(pairs.high[m]) <= limit;
    if (!near) return;
    for (int64_t m = 0; m < count; ++m) {
      grow.push_back(T(std::exp(double(pairs.low[m]))));
      fall.push_back(T(std::exp(-double(pairs.high[m]))));
    }
    pairs.grow = grow.data();
    pairs.fall = fall.data();
  }
  Intervals(const Intervals&) = delete;
};

}  // namespace kan

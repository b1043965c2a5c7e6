// AF-KAN's features, reduced while they are in registers: sum, weighted sum, minimum and maximum over the pairs
// f_m(x) = c(s(x - low_m), s(high_m - x)); one pass over x forward, one backward, which computes the pairs again.
//
// Work: per input one exponential, per pair two reciprocals (silu, sigmoid, tanh, softplus: e^{-(x-l)} = e^{-x} e^l) and about 25 flops.
// Fewest bytes: x in and two sums out. Units of fixed size are added in float64 in their order, so the number of threads does not matter.
#include "afkan_pairs.h"

#include <numeric>

namespace {

using phyla::Tensor;
using namespace kan;

constexpr int64_t kUnit = 1024;
constexpr int64_t kLow = 0, kHigh = 1, kWeight = 2;  // rows of the accumulators, M each

template <class T>
struct Extremes {
  T smallest, largest;
};

// Running extremes of vectors; NaN is remembered.
template <class T>
struct Range {
  Vec<T> smallest = fill(std::numeric_limits<T>::infinity()), largest = fill(-std::numeric_limits<T>::infinity());
  Int<T> nan{};

  PHYLA_INLINE void see(Vec<T> f) {
    smallest = f < smallest ? f : smallest;
    largest = f > largest ? f : largest;
    nan |= (f != f);
  }
  PHYLA_INLINE Extremes<T> result() const {
    Extremes<T> e{smallest[0], largest[0]};
    for (int64_t l = 0; l < Lanes<T>::count; ++l) {
      e.smallest = std::min<T>(e.smallest, smallest[l]);
      e.largest = std::max<T>(e.largest, largest[l]);
    }
    for (int64_t l = 0; l < Lanes<T>::count; ++l)
      if (nan[l]) e.smallest = e.largest = std::numeric_limits<T>::quiet_NaN();
    return e;
  }
};

template <bool shared, class T>
PHYLA_INLINE Extremes<T> forward_unit(Pairs<T> p, const T* weight, const T* x, int64_t size, T* total, T* score) {
  constexpr int64_t L = Lanes<T>::count;
  Range<T> range;
  for (int64_t at = 0; at < size; at += L) {
    const Vec<T> X = load_some(x + at, size - at, true);
    const Vec<T> decay = shared ? exp<T>(-X) : X, rise = shared ? T(1) / decay : X;
    Vec<T> sum{}, weighted{};
    for (int64_t m = 0; m < p.count; ++m) {
      Curve<T> u, v;
      halves<shared>(p, m, X, decay, rise, u, v);
      const Vec<T> f = p.kind.combined(u.value, v.value).value;
      sum += f;
      weighted += weight[m] * f;
      range.see(f);
    }
    store_some(total + at, sum, size - at);
    store_some(score + at, weighted, size - at);
  }
  return range.result();
}

template <class T>
struct Pull {
  const T *by_total, *by_score;  // gradients of the sums; null: zeros
  T* dx;                         // may be null; added to where by_total is null, else overwritten
  Extremes<T> at, share;         // features equal to `at` receive `share`; NaN equals nothing
};
template <class T>
struct Pulled {
  Extremes<T> extremes;
  int64_t smallest, largest;  // how many features equal `at`
};

// Passes over one unit share this one function, so that equal features are equal bit for bit.
template <bool shared, class T>
PHYLA_INLINE Pulled<T> backward_unit(Pairs<T> p, const T* weight, const T* x, int64_t size, const Pull<T>& pull, T* sums) {
  constexpr int64_t L = Lanes<T>::count;
  Range<T> range;
  Pulled<T> result{};
  std::fill_n(sums, 3 * p.count * L, T(0));
  for (int64_t at = 0; at < size; at += L) {
    const int64_t left = size - at;
    const Vec<T> X = load_some(x + at, left, true);
    const Vec<T> decay = shared ? exp<T>(-X) : X, rise = shared ? T(1) / decay : X;
    const Vec<T> by_total = pull.by_total ? load_some(pull.by_total + at, left, false) : Vec<T>{};
    const Vec<T> by_score = pull.by_score ? load_some(pull.by_score + at, left, false) : Vec<T>{};
    Vec<T> slope{};
    Int<T> exists{}, smallest{}, largest{};
    for (int64_t l = 0; l < L; ++l) exists[l] = l < left ? -1 : 0;
    for (int64_t m = 0; m < p.count; ++m) {
      Curve<T> u, v;
      halves<shared>(p, m, X, decay, rise, u, v);
      const auto f = p.kind.combined(u.value, v.value);
      range.see(f.value);
      const Int<T> is_smallest = (f.value == pull.at.smallest) & exists, is_largest = (f.value == pull.at.largest) & exists;
      smallest -= is_smallest;
      largest -= is_largest;
      Vec<T> g = by_total + weight[m] * by_score;
      g += (is_smallest ? fill<T>(pull.share.smallest) : Vec<T>{}) + (is_largest ? fill<T>(pull.share.largest) : Vec<T>{});
      const Vec<T> by_low = g * f.by_u * u.slope, by_high = g * f.by_v * v.slope;
      slope += by_low - by_high;
      accumulate<T>(sums, kLow * p.count + m, -by_low);
      accumulate<T>(sums, kHigh * p.count + m, by_high);
      accumulate<T>(sums, kWeight * p.count + m, f.value * by_score);
    }
    for (int64_t l = 0; l < L; ++l) {
      result.smallest += smallest[l];
      result.largest += largest[l];
    }
    if (pull.dx) {
      if (!pull.by_total) slope += load_some(pull.dx + at, left, false);
      store_some(pull.dx + at, slope, left);
    }
  }
  result.extremes = range.result();
  return result;
}

// The published pair, with its choices as constants.
template <class T>
PHYLA_INLINE bool is_published(const Pairs<T>& p) { return p.grow && p.activation == Activation::silu && p.kind.combine == 0; }
template <class T>
PHYLA_INLINE Pairs<T> published(Pairs<T> p) {
  p.activation = Activation::silu;
  p.kind.combine = 0;
  return p;
}

#define PHYLA_UNITS(T)                                                                                                               \
  PHYLA_CLONES Extremes<T> forward_pass(const Pairs<T>& p, const T* weight, const T* x, int64_t size, T* total, T* score) {          \
    if (is_published(p)) return forward_unit<true>(published(p), weight, x, size, total, score);                                     \
    return p.grow ? forward_unit<true>(p, weight, x, size, total, score) : forward_unit<false>(p, weight, x, size, total, score);    \
  }                                                                                                                                  \
  PHYLA_CLONES Pulled<T> backward_pass(const Pairs<T>& p, const T* weight, const T* x, int64_t size, const Pull<T>& pull, T* sums) { \
    if (is_published(p)) return backward_unit<true>(published(p), weight, x, size, pull, sums);                                      \
    return p.grow ? backward_unit<true>(p, weight, x, size, pull, sums) : backward_unit<false>(p, weight, x, size, pull, sums);      \
  }
PHYLA_UNITS(float)
PHYLA_UNITS(double)
#undef PHYLA_UNITS

// The arguments of the op.
template <class T>
struct Arguments {
  Tensor x, weight;
  Intervals<T> intervals;
  int64_t size, units;

  Arguments(const Tensor& given_x, const Tensor& low, const Tensor& high, const Tensor& given_weight, const std::string& activation,
            const std::string& combine)
      : x(phyla::dense(given_x)), weight(phyla::dense(given_weight)), intervals(low, high, activation, combine) {
    size = x.numel();
    units = (size + kUnit - 1) / kUnit;
  }

  const Pairs<T>& pairs() const { return intervals.pairs; }
  int64_t length(int64_t unit) const { return std::min(kUnit, size - unit * kUnit); }
};

template <class T>
Extremes<T> common(const std::vector<Extremes<T>>& parts) {
  if (parts.empty()) return {T(0), T(0)};
  Extremes<T> e = parts[0];
  for (const auto& part : parts) {
    if (!(part.smallest >= e.smallest)) e.smallest = part.smallest;
    if (!(part.largest <= e.largest)) e.largest = part.largest;
    if (part.smallest != part.smallest) return part;
  }
  return e;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> sums(const Arguments<T>& a) {
  const std::vector<int64_t> sizes = phyla::sizes_of(a.x);
  Tensor total = phyla::empty<T>(sizes), score = phyla::empty<T>(sizes), smallest = phyla::empty<T>({}), largest = phyla::empty<T>({});
  const T* x = phyla::data<T>(a.x);
  T *to_total = phyla::mutable_data<T>(total), *to_score = phyla::mutable_data<T>(score);
  std::vector<Extremes<T>> parts(a.units);
  phyla::parallel_units(a.units, [&](int64_t unit) {
    const int64_t at = unit * kUnit;
    parts[unit] = forward_pass(a.pairs(), phyla::data<T>(a.weight), x + at, a.length(unit), to_total + at, to_score + at);
  });
  const Extremes<T> extremes = common(parts);
  *phyla::mutable_data<T>(smallest) = extremes.smallest;
  *phyla::mutable_data<T>(largest) = extremes.largest;
  return {total, score, smallest, largest};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> sums_backward(const Arguments<T>& a, const Tensor& grad_total, const Tensor& grad_score, T grad_smallest,
                                                         T grad_largest, int64_t needs) {
  constexpr T nothing = std::numeric_limits<T>::quiet_NaN();
  const Tensor by_total = phyla::dense(grad_total), by_score = phyla::dense(grad_score);
  const T *x = phyla::data<T>(a.x), *g_total = phyla::data<T>(by_total), *g_score = phyla::data<T>(by_score);
  Tensor dx = needs & 1 ? phyla::empty<T>(phyla::sizes_of(a.x)) : phyla::unwanted<T>();
  T* to_dx = needs & 1 ? phyla::mutable_data<T>(dx) : nullptr;
  const int64_t rows = 3 * a.pairs().count;
  std::vector<double> partial(a.units * rows, 0.0);
  std::vector<Extremes<T>> extremes(a.units);

  const auto pass = [&](int64_t unit, const Pull<T>& pull) {
    std::vector<T> lanes(rows * Lanes<T>::count);
    const Pulled<T> pulled = backward_pass(a.pairs(), phyla::data<T>(a.weight), x + unit * kUnit, a.length(unit), pull, lanes.data());
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t l = 0; l < Lanes<T>::count; ++l) partial[unit * rows + row] += double(lanes[row * Lanes<T>::count + l]);
    return pulled;
  };
  phyla::parallel_units(a.units, [&](int64_t unit) {
    const int64_t at = unit * kUnit;
    extremes[unit] = pass(unit, {g_total + at, g_score + at, to_dx ? to_dx + at : nullptr, {nothing, nothing}, {}}).extremes;
  });

  // The gradients of the extremes go to the few units that hold one: these are passed again, to count the ties and then to share.
  const Extremes<T> found = common(extremes);
  if (grad_smallest != T(0) || grad_largest != T(0)) {
    std::vector<int64_t> smallest(a.units, 0), largest(a.units, 0);
    const auto holds = [&](int64_t unit) { return extremes[unit].smallest == found.smallest || extremes[unit].largest == found.largest; };
    phyla::parallel_units(a.units, [&](int64_t unit) {
      if (!holds(unit)) return;
      const Pulled<T> pulled = pass(unit, {nullptr, nullptr, nullptr, found, {}});
      smallest[unit] = pulled.smallest;
      largest[unit] = pulled.largest;
    });
    const Extremes<T> share{grad_smallest / T(std::max<int64_t>(std::accumulate(smallest.begin(), smallest.end(), int64_t(0)), 1)),
                            grad_largest / T(std::max<int64_t>(std::accumulate(largest.begin(), largest.end(), int64_t(0)), 1))};
    phyla::parallel_units(a.units, [&](int64_t unit) {
      if (holds(unit)) pass(unit, {nullptr, nullptr, to_dx ? to_dx + unit * kUnit : nullptr, found, share});
    });
  }

  std::vector<double> summed(rows, 0.0);
  for (int64_t unit = 0; unit < a.units; ++unit)
    for (int64_t row = 0; row < rows; ++row) summed[row] += partial[unit * rows + row];
  const auto parameter = [&](int64_t which) {
    if (!(needs >> (which + 1) & 1)) return phyla::unwanted<T>();
    Tensor gradient = phyla::empty<T>({a.pairs().count});
    for (int64_t m = 0; m < a.pairs().count; ++m) phyla::mutable_data<T>(gradient)[m] = T(summed[which * a.pairs().count + m]);
    return gradient;
  };
  return {dx, parameter(kLow), parameter(kHigh), parameter(kWeight)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> afkan_sums(const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& score_weight,
                                                      std::string activation, std::string combine) {
  return phyla::dispatch(x, [&](auto zero) { return sums(Arguments<decltype(zero)>(x, low, high, score_weight, activation, combine)); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> afkan_sums_backward(const Tensor& grad0, const Tensor& grad1, const Tensor& grad2, const Tensor& grad3,
                                                               const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& score_weight,
                                                               std::string activation, std::string combine, int64_t needs) {
  return phyla::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    return sums_backward(Arguments<T>(x, low, high, score_weight, activation, combine), grad0, grad1, *phyla::data<T>(grad2),
                         *phyla::data<T>(grad3), needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phyla_kan_family, CPU, m) {
  m.impl("afkan_sums", TORCH_BOX(&afkan_sums));
  m.impl("afkan_sums_backward", TORCH_BOX(&afkan_sums_backward));
}

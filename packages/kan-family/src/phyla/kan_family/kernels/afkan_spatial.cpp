// AF-KAN's spatial attention: a softmax over the M features of an input, with scores from a 3-tap filter along the inputs, one a feature.
//
// Lanes are neighbouring inputs. A row's features (M, I + 2), with a zero at both ends, live in scratch alone; backward computes them again.
// Rows are gathered into units of fixed size, whose parameter gradients are added in float64 in their order.
#include "afkan_pairs.h"

#include <numeric>

namespace {

using phyla::Tensor;
using namespace kan;

constexpr int64_t kUnit = 2048;  // inputs of a unit, about

// Sums of the backward pass: M rows each of the first four, 3 M of the filters, one each of the others.
struct Layout {
  int64_t count;
  int64_t low(int64_t m) const { return m; }
  int64_t high(int64_t m) const { return count + m; }
  int64_t bias(int64_t m) const { return 2 * count + m; }
  int64_t weight(int64_t m, int64_t tap) const { return 3 * count + 3 * m + tap; }
  int64_t sharpness() const { return 6 * count; }
  int64_t shift() const { return 6 * count + 1; }
  int64_t span() const { return 6 * count + 2; }
  int64_t rows() const { return 6 * count + 3; }
};

template <class T>
struct Job {
  Pairs<T> pairs;
  const T *x, *weight, *bias;
  T smallest, inverse, sharpness;  // 1 / (largest - smallest), 1 / max(T, 1)
  int64_t inputs, stride;          // stride: of a feature's row in scratch

  int64_t scratch() const { return 3 * pairs.count * stride + 2 * pairs.count * Lanes<T>::count; }
};

// The normalised features of a row, at f + m * stride + 1.
template <bool shared, class T>
PHYLA_INLINE void features(const Job<T>& job, const T* x, T* f) {
  for (int64_t at = 0; at < job.inputs; at += Lanes<T>::count) {
    const int64_t left = job.inputs - at;
    const Vec<T> X = load_some(x + at, left, true);
    const Vec<T> decay = shared ? exp<T>(-X) : X, rise = shared ? T(1) / decay : X;
    for (int64_t m = 0; m < job.pairs.count; ++m) {
      Curve<T> u, v;
      halves<shared>(job.pairs, m, X, decay, rise, u, v);
      store_some(f + m * job.stride + 1 + at, (job.pairs.kind.combined(u.value, v.value).value - job.smallest) * job.inverse, left);
    }
  }
}

// Attention to the features at one vector of inputs: scores before the temperature to `raw`, weights to `p`, both (M, lanes); returns z.
template <class T>
PHYLA_INLINE Vec<T> attend(const Job<T>& job, const T* f, int64_t at, T* raw, T* p) {
  constexpr int64_t L = Lanes<T>::count;
  Vec<T> most{}, total{}, z{};
  for (int64_t m = 0; m < job.pairs.count; ++m) {
    const T *around = f + m * job.stride + at, *w = job.weight + 3 * m;
    const Vec<T> score = w[0] * load(around) + w[1] * load(around + 1) + w[2] * load(around + 2) + job.bias[m];
    store(raw + m * L, score);
    most = m == 0 ? score : (score > most ? score : most);
  }
  for (int64_t m = 0; m < job.pairs.count; ++m) {
    const Vec<T> e = exp<T>((load(raw + m * L) - most) * job.sharpness);
    store(p + m * L, e);
    total += e;
  }
  const Vec<T> inverse = T(1) / total;
  for (int64_t m = 0; m < job.pairs.count; ++m) {
    const Vec<T> share = load(p + m * L) * inverse;
    store(p + m * L, share);
    z += share * load(f + m * job.stride + at + 1);
  }
  return z;
}

template <bool shared, class T>
PHYLA_INLINE void forward_row(const Job<T>& job, const T* x, T* z, T* scratch) {
  T *raw = scratch + 3 * job.pairs.count * job.stride, *p = raw + job.pairs.count * Lanes<T>::count;
  features<shared>(job, x, scratch);
  for (int64_t at = 0; at < job.inputs; at += Lanes<T>::count) store_some(z + at, attend(job, scratch, at, raw, p), job.inputs - at);
}

template <bool shared, class T>
PHYLA_INLINE void backward_row(const Job<T>& job, const T* grad, const T* x, T* dx, T* sums, T* scratch) {
  constexpr int64_t L = Lanes<T>::count;
  const int64_t count = job.pairs.count, size = count * job.stride;
  const Layout to{count};
  T *f = scratch, *by_score = f + size, *by_value = by_score + size, *raw = by_value + size, *p = raw + count * L;
  features<shared>(job, x, f);
  for (int64_t at = 0; at < job.inputs; at += L) {
    const int64_t left = job.inputs - at;
    const Vec<T> z = attend(job, f, at, raw, p), g = load_some(grad + at, left, false);
    for (int64_t m = 0; m < count; ++m) {
      const T* around = f + m * job.stride + at;
      const Vec<T> share = g * load(p + m * L), scaled = share * (load(around + 1) - z), score = scaled * job.sharpness;
      accumulate<T>(sums, to.sharpness(), scaled * load(raw + m * L));
      accumulate<T>(sums, to.bias(m), score);
      for (int64_t tap = 0; tap < 3; ++tap) accumulate<T>(sums, to.weight(m, tap), score * load(around + tap));
      store_some(by_score + m * job.stride + 1 + at, score, left);
      store_some(by_value + m * job.stride + 1 + at, share, left);
    }
  }
  for (int64_t at = 0; at < job.inputs; at += L) {
    const int64_t left = job.inputs - at;
    const Vec<T> X = load_some(x + at, left, true);
    const Vec<T> decay = shared ? exp<T>(-X) : X, rise = shared ? T(1) / decay : X;
    Vec<T> slope{};
    for (int64_t m = 0; m < count; ++m) {
      Curve<T> u, v;
      halves<shared>(job.pairs, m, X, decay, rise, u, v);
      const auto pair = job.pairs.kind.combined(u.value, v.value);
      const T *around = by_score + m * job.stride + at, *w = job.weight + 3 * m;
      Vec<T> by_feature = load_some(by_value + m * job.stride + 1 + at, left, false);
      by_feature += w[2] * load_some(around, left, false) + w[1] * load_some(around + 1, left, false) + w[0] * load_some(around + 2, left, false);
      accumulate<T>(sums, to.shift(), by_feature);
      accumulate<T>(sums, to.span(), by_feature * load(f + m * job.stride + 1 + at));
      const Vec<T> by_low = by_feature * job.inverse * pair.by_u * u.slope, by_high = by_feature * job.inverse * pair.by_v * v.slope;
      accumulate<T>(sums, to.low(m), -by_low);
      accumulate<T>(sums, to.high(m), by_high);
      slope += by_low - by_high;
    }
    store_some(dx + at, slope, left);
  }
}

#define PHYLA_ROWS(T)                                                                                                           \
  PHYLA_CLONES void forward_pass(const Job<T>& job, const T* x, T* z, T* scratch) {                                             \
    job.pairs.grow ? forward_row<true>(job, x, z, scratch) : forward_row<false>(job, x, z, scratch);                            \
  }                                                                                                                             \
  PHYLA_CLONES void backward_pass(const Job<T>& job, const T* grad, const T* x, T* dx, T* sums, T* scratch) {                   \
    job.pairs.grow ? backward_row<true>(job, grad, x, dx, sums, scratch) : backward_row<false>(job, grad, x, dx, sums, scratch); \
  }
PHYLA_ROWS(float)
PHYLA_ROWS(double)
#undef PHYLA_ROWS

// The arguments of the op, and how its rows are cut into units.
template <class T>
struct Arguments {
  Tensor x, weight, bias;
  Intervals<T> intervals;
  Job<T> job;
  T temperature;
  bool spread;  // largest > smallest
  int64_t rows, rows_per_unit, units;

  Arguments(const Tensor& given_x, const Tensor& low, const Tensor& high, const Tensor& given_weight, const Tensor& given_bias,
            const Tensor& given_temperature, const Tensor& smallest, const Tensor& largest, const std::string& activation,
            const std::string& combine)
      : x(phyla::dense(given_x)), weight(phyla::dense(given_weight)), bias(phyla::dense(given_bias)), intervals(low, high, activation, combine) {
    const T least = *phyla::data<T>(smallest), most = *phyla::data<T>(largest);
    temperature = *phyla::data<T>(given_temperature);
    spread = most > least;
    const int64_t inputs = x.size(x.dim() - 1);
    job = {intervals.pairs, phyla::data<T>(x), phyla::data<T>(weight), phyla::data<T>(bias), least, spread ? T(1) / (most - least) : T(1),
           temperature < T(1) ? T(1) : T(1) / temperature, inputs, inputs + 2 + Lanes<T>::count};
    rows = inputs == 0 ? 0 : x.numel() / inputs;
    rows_per_unit = std::max<int64_t>(1, kUnit / std::max<int64_t>(inputs, 1));
    units = (rows + rows_per_unit - 1) / rows_per_unit;
  }

  // fn(row, scratch) for the rows of a unit.
  template <class Fn>
  void each_row(int64_t unit, const Fn& fn) const {
    std::vector<T> scratch(job.scratch(), T(0));
    for (int64_t row = unit * rows_per_unit; row < std::min(rows, (unit + 1) * rows_per_unit); ++row) fn(row, scratch.data());
  }
};

template <class T>
Tensor attention(const Arguments<T>& a) {
  Tensor z = phyla::empty<T>(phyla::sizes_of(a.x));
  T* out = phyla::mutable_data<T>(z);
  phyla::parallel_units(a.units, [&](int64_t unit) {
    a.each_row(unit, [&](int64_t row, T* scratch) { forward_pass(a.job, a.job.x + row * a.job.inputs, out + row * a.job.inputs, scratch); });
  });
  return z;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients attention_backward(const Arguments<T>& a, const Tensor& given_grad, int64_t needs) {
  const Tensor grad = phyla::dense(given_grad);
  Tensor dx = phyla::empty<T>(phyla::sizes_of(a.x));
  const T* g = phyla::data<T>(grad);
  T* out = phyla::mutable_data<T>(dx);
  const int64_t count = a.job.pairs.count, inputs = a.job.inputs;
  const Layout from{count};
  std::vector<double> partial(a.units * from.rows(), 0.0), summed(from.rows(), 0.0);
  phyla::parallel_units(a.units, [&](int64_t unit) {
    std::vector<T> lanes(from.rows() * Lanes<T>::count, T(0));
    a.each_row(unit, [&](int64_t row, T* scratch) {
      backward_pass(a.job, g + row * inputs, a.job.x + row * inputs, out + row * inputs, lanes.data(), scratch);
    });
    for (int64_t row = 0; row < from.rows(); ++row)
      for (int64_t l = 0; l < Lanes<T>::count; ++l) partial[unit * from.rows() + row] += double(lanes[row * Lanes<T>::count + l]);
  });
  for (int64_t unit = 0; unit < a.units; ++unit)
    for (int64_t row = 0; row < from.rows(); ++row) summed[row] += partial[unit * from.rows() + row];

  int64_t argument = 0;
  const auto result = [&](const std::vector<int64_t>& sizes, const double* values) {
    if (!(needs >> ++argument & 1)) return phyla::unwanted<T>();
    Tensor gradient = phyla::empty<T>(sizes);
    for (int64_t i = 0; i < gradient.numel(); ++i) phyla::mutable_data<T>(gradient)[i] = T(values[i]);
    return gradient;
  };
  const double k = double(a.job.sharpness), inverse = double(a.job.inverse);
  const double temperature = a.temperature > T(1) ? -k * k * summed[from.sharpness()] : 0.0;
  const double largest = a.spread ? -inverse * summed[from.span()] : 0.0, smallest = -inverse * summed[from.shift()] - largest;
  Tensor low = result({count}, &summed[from.low(0)]), high = result({count}, &summed[from.high(0)]);
  Tensor weight = result({count, 1, 3}, &summed[from.weight(0, 0)]), bias = result({count}, &summed[from.bias(0)]);
  Tensor by_temperature = result({}, &temperature), by_smallest = result({}, &smallest), by_largest = result({}, &largest);
  return {needs & 1 ? dx : phyla::unwanted<T>(), low, high, weight, bias, by_temperature, by_smallest, by_largest};
}

Tensor afkan_spatial(const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& weight, const Tensor& bias, const Tensor& temperature,
                     const Tensor& smallest, const Tensor& largest, std::string activation, std::string combine) {
  return phyla::dispatch(x, [&](auto zero) {
    return attention(Arguments<decltype(zero)>(x, low, high, weight, bias, temperature, smallest, largest, activation, combine));
  });
}

Gradients afkan_spatial_backward(const Tensor& grad, const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& weight,
                                 const Tensor& bias, const Tensor& temperature, const Tensor& smallest, const Tensor& largest,
                                 std::string activation, std::string combine, int64_t needs) {
  return phyla::dispatch(x, [&](auto zero) {
    return attention_backward(Arguments<decltype(zero)>(x, low, high, weight, bias, temperature, smallest, largest, activation, combine), grad, needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phyla_kan_family, CPU, m) {
  m.impl("afkan_spatial", TORCH_BOX(&afkan_spatial));
  m.impl("afkan_spatial_backward", TORCH_BOX(&afkan_spatial_backward));
}

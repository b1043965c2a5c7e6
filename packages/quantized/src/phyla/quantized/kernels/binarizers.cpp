// Signs with surrogate derivatives: one pass over x forward, one pass over (grad, x) backward; for the clipped straight-through sign the
// backward pass reads (grad, one bit an element) instead.
//
// The loops are plain, so that the compiler makes vectors of them for every instruction set. Every element is computed alone: results do not
// depend on threads. A sign is +1 at zero and NaN, and where x is not finite a surrogate derivative is 0.
#include <phyla/kernel.h>

#include <bit>
#include <numbers>

// The compiler may re-associate sums elsewhere; the reduction of an angle relies on their order.
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
#define PHYLA_ORDERED(expression) __builtin_assoc_barrier(expression)
#endif
#endif
#ifndef PHYLA_ORDERED
#define PHYLA_ORDERED(expression) (expression)
#endif

namespace {

using phyla::Tensor;

constexpr int64_t kUnit = 1 << 15;  // elements of a unit; whole words of a mask
constexpr int64_t kBlock = 512;     // elements whose angles are judged together

template <class T>
constexpr T inverse_factorial(int j) {
  double value = 1;
  for (int i = 2; i <= j; ++i) value /= i;
  return T(value);
}

template <class T>
struct Real;
template <>
struct Real<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23, bias = 127, exp_terms = 8, angle_terms = 7;
  static constexpr float angle_limit = 8192, pi[3] = {3.140625f, 9.67502593994140625e-4f, 1.5099579909783765e-7f};
  static constexpr float decayed = 88.1f, log2e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
};
template <>
struct Real<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, bias = 1023, exp_terms = 14, angle_terms = 12;
  static constexpr double angle_limit = 1e6, pi[3] = {3.1415926534682512, 1.2154201012607932e-10, 4.044532497591901e-21};
  static constexpr double decayed = 709.2, log2e = 1.44269504088896338700;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
};

// abs(z), at most the number whose negative exponential is 0; NaN is that number.
template <class T>
PHYLA_INLINE T bounded(T z) {
  const T size = std::abs(z);
  return size < Real<T>::decayed ? size : Real<T>::decayed;
}
// exp(-a) for a bounded a; at the bound the bits of the exponent are 0, and so is the value.
template <class T>
PHYLA_INLINE T decay(T a) {
  using R = Real<T>;
  const int32_t n = int32_t(a * R::log2e + T(0.5));
  const T r = PHYLA_ORDERED(PHYLA_ORDERED(n * R::ln2_high - a) + n * R::ln2_low);  // -a = r - n ln 2
  T value = inverse_factorial<T>(R::exp_terms - 1);
#pragma GCC unroll 16
  for (int j = R::exp_terms - 2; j >= 0; --j) value = value * r + inverse_factorial<T>(j);
  return value * std::bit_cast<T>(typename R::Bits(R::bias - n) << R::mantissa);
}

template <class T>
PHYLA_INLINE T approx(T x, T slope, T height) {
  const T s = 2 - 2 * std::abs(slope * x);
  return s > 0 ? slope * height * s : T(0);
}
// With u = exp(-|z|): the terms neither overflow nor cancel.
template <class T>
PHYLA_INLINE T swish(T x, T slope, T height) {
  const T a = bounded(slope * x), u = decay(a), inverse = 1 / (1 + u);
  return slope * height * 2 * u * inverse * inverse * (2 - a * (1 - u) * inverse);
}
template <class T>
PHYLA_INLINE T tanh_(T x, T slope, T height) {
  const T u = decay(bounded(2 * slope * x)), inverse = 1 / (1 + u);
  return slope * height * 4 * u * inverse * inverse;
}

// An angle below Real<T>::angle_limit as n pi + r with abs(r) <= pi / 2. The parts of pi are short: n times the first two is exact.
template <class T>
PHYLA_INLINE T reduced(T angle, int32_t& n) {
  using R = Real<T>;
  const T turns = angle * std::numbers::inv_pi_v<T>;
  n = int32_t(turns + (turns < 0 ? T(-0.5) : T(0.5)));
  const T count = T(n);
  return PHYLA_ORDERED(PHYLA_ORDERED(PHYLA_ORDERED(angle - count * R::pi[0]) - count * R::pi[1]) - count * R::pi[2]);
}
// sin or cos of r + n pi.
template <class T, bool sine>
PHYLA_INLINE T circular(T r, int32_t n) {
  constexpr int terms = Real<T>::angle_terms;
  const T square = r * r;
  T value = 0;
#pragma GCC unroll 16
  for (int j = terms; j >= 0; --j) value = value * square + (j % 2 ? -1 : 1) * inverse_factorial<T>(2 * j + sine);
  return (n & 1 ? -value : value) * (sine ? r : T(1));
}

template <class T>
PHYLA_INLINE T sign(T x) { return x < 0 ? T(-1) : T(1); }

// Whether every angle of a block is small enough for `reduced`; NaN is not.
template <class T>
PHYLA_INLINE bool small(const T* x, int64_t size, T frequency) {
  int32_t large = 0;
  for (int64_t i = 0; i < size; ++i) large += !(std::abs(frequency * x[i]) < Real<T>::angle_limit);
  return large == 0;
}

template <bool hard, class T>
PHYLA_INLINE void biper_block(const T* x, T* y, int64_t size, T frequency) {
  if (small(x, size, frequency)) {
    for (int64_t i = 0; i < size; ++i) {
      const T angle = PHYLA_ORDERED(frequency * x[i]);
      int32_t n;
      const T r = reduced(angle, n);
      y[i] = hard ? ((r < 0) != (n & 1) && r != 0 ? T(-1) : T(1)) : circular<T, true>(r, n);
    }
  } else {
    for (int64_t i = 0; i < size; ++i) y[i] = hard ? sign(std::sin(frequency * x[i])) : std::sin(frequency * x[i]);
  }
}
template <bool hard, class T>
PHYLA_INLINE void biper_slope_block(const T* grad, const T* x, T* dx, int64_t size, T frequency) {
  if (small(x, size, frequency)) {
    for (int64_t i = 0; i < size; ++i) {
      const T angle = PHYLA_ORDERED(frequency * x[i]);
      int32_t n;
      const T r = reduced(angle, n);
      dx[i] = grad[i] * (frequency * circular<T, false>(r, n));
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const T angle = frequency * x[i];
      dx[i] = grad[i] * (hard && !std::isfinite(angle) ? T(0) : frequency * std::cos(angle));
    }
  }
}

// Backward of sign(x) with the surrogate at z = r x, r = 1 / sqrt(var + 1e-5), over one sample:
// dx = r g s(z) - r^3 (x - mean) / (size - 1) sum(x g s(z)). Sums of blocks in T, sums of sums in float64.
template <class T, class Slope>
PHYLA_INLINE void normalized_run(const T* grad, const T* x, T* dx, int64_t size, const Slope& slope_at) {
  const auto total = [&](const auto& term) __attribute__((always_inline)) {
    double sum = 0;
    for (int64_t at = 0; at < size; at += kBlock) {
      const int64_t end = std::min(size, at + kBlock);
      T part = 0;
      for (int64_t i = at; i < end; ++i) part += term(i);
      sum += part;
    }
    return sum;
  };
  const double mean = total([&](int64_t i) __attribute__((always_inline)) { return x[i]; }) / size;
  const T centre = T(mean);
  const double squares = total([&](int64_t i) __attribute__((always_inline)) { return (x[i] - centre) * (x[i] - centre); });
  const double exact = 1 / std::sqrt(squares / (size - 1) + 1e-5);
  const T r = T(exact);
  const double product = total([&](int64_t i) __attribute__((always_inline)) {
    dx[i] = grad[i] * slope_at(r * x[i]);
    return dx[i] * x[i];
  });
  const T pull = T(exact * exact * exact * product / (size - 1));
  for (int64_t i = 0; i < size; ++i) dx[i] = r * dx[i] - pull * (x[i] - centre);
}

// Eight bytes of 0 or 1 become eight bits.
PHYLA_INLINE uint64_t bits_of(const uint8_t* bytes) {
  uint64_t eight = 0;
  for (int j = 0; j < 8; ++j) eight |= uint64_t(bytes[j]) << (8 * j);
  return eight * 0x0102040810204080ULL >> 56;
}

template <class T>
PHYLA_INLINE void sign_and_mask_run(const T* x, T* y, int64_t* mask, int64_t size, T clip) {
  for (int64_t start = 0; start < size; start += 64) {
    const int64_t count = std::min<int64_t>(64, size - start);
    uint8_t inside[64] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T value = x[start + i];
      y[start + i] = sign(value);
      inside[i] = std::abs(value) <= clip;
    }
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= bits_of(inside + 8 * j) << (8 * j);
    mask[start / 64] = int64_t(word);
  }
}
template <class T>
PHYLA_INLINE void keep_inside_run(const T* grad, const int64_t* mask, T* dx, int64_t size) {
  for (int64_t start = 0; start < size; start += 32) {
    const int64_t count = std::min<int64_t>(32, size - start);
    const uint32_t half = uint32_t(uint64_t(mask[start / 64]) >> (start & 32));
    for (int64_t i = 0; i < count; ++i) dx[start + i] = half >> i & 1 ? grad[start + i] : T(0);
  }
}

// Each body compiled for every instruction set; all that it calls is inlined here.
#define PHYLA_SURROGATE(T, name)                                                                                                   \
  PHYLA_CLONES void run_##name(const T* grad, const T* x, T* dx, int64_t size, T slope, T height) {                                \
    for (int64_t i = 0; i < size; ++i) dx[i] = grad[i] * name(x[i], slope, height);                                                \
  }                                                                                                                                \
  PHYLA_CLONES void run_normalized_##name(const T* grad, const T* x, T* dx, int64_t size, T slope, T height) {                     \
    normalized_run(grad, x, dx, size, [=](T z) __attribute__((always_inline)) { return name(z, slope, height); });                 \
  }
#define PHYLA_BINARIZERS(T)                                                                                                        \
  PHYLA_CLONES void run_sign(const T* x, T* y, int64_t size) {                                                                     \
    for (int64_t i = 0; i < size; ++i) y[i] = sign(x[i]);                                                                          \
  }                                                                                                                                \
  PHYLA_CLONES void run_biper(const T* x, T* y, int64_t size, T frequency, bool hard) {                                            \
    for (int64_t at = 0; at < size; at += kBlock) {                                                                                \
      const int64_t count = std::min(kBlock, size - at);                                                                           \
      hard ? biper_block<true>(x + at, y + at, count, frequency) : biper_block<false>(x + at, y + at, count, frequency);           \
    }                                                                                                                              \
  }                                                                                                                                \
  PHYLA_CLONES void run_biper_slope(const T* grad, const T* x, T* dx, int64_t size, T frequency, bool hard) {                      \
    for (int64_t at = 0; at < size; at += kBlock) {                                                                                \
      const int64_t count = std::min(kBlock, size - at);                                                                           \
      hard ? biper_slope_block<true>(grad + at, x + at, dx + at, count, frequency)                                                 \
           : biper_slope_block<false>(grad + at, x + at, dx + at, count, frequency);                                               \
    }                                                                                                                              \
  }                                                                                                                                \
  PHYLA_CLONES void run_sign_and_mask(const T* x, T* y, int64_t* mask, int64_t size, T clip) { sign_and_mask_run(x, y, mask, size, clip); } \
  PHYLA_CLONES void run_keep_inside(const T* grad, const int64_t* mask, T* dx, int64_t size) { keep_inside_run(grad, mask, dx, size); }
#define PHYLA_ALL(T) PHYLA_BINARIZERS(T) PHYLA_SURROGATE(T, approx) PHYLA_SURROGATE(T, swish) PHYLA_SURROGATE(T, tanh_)
PHYLA_ALL(float)
PHYLA_ALL(double)

// fn(at, size) for pieces of kUnit elements on torch's threads.
template <class Fn>
void each_unit(int64_t total, const Fn& fn) {
  phyla::parallel_units((total + kUnit - 1) / kUnit, [&](int64_t unit) { fn(unit * kUnit, std::min(kUnit, total - unit * kUnit)); });
}

// fn(in, out, at, size) over the pieces of a new tensor like x.
template <class Fn>
Tensor map(const Tensor& x, const Fn& fn) {
  return phyla::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Tensor y = phyla::empty<T>(phyla::sizes_of(x));
    const T* in = phyla::data<T>(x);
    T* out = phyla::mutable_data<T>(y);
    each_unit(x.numel(), [&](int64_t at, int64_t size) { fn(in + at, out + at, at, size); });
    return y;
  });
}

void expect_alike(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(phyla::sizes_of(grad) == phyla::sizes_of(x) && grad.scalar_type() == x.scalar_type(),
                  "binarizers: grad must have the shape and dtype of x");
}

Tensor hard_sign(const Tensor& x) {
  return map(phyla::dense(x), [](auto* in, auto* out, int64_t, int64_t size) { run_sign(in, out, size); });
}

enum class Surrogate { approx, swish, tanh };

Surrogate surrogate_named(const std::string& name) {
  STD_TORCH_CHECK(name == "approx" || name == "swish" || name == "tanh", "surrogate_sign: surrogate must be approx, swish or tanh");
  return name == "approx" ? Surrogate::approx : name == "swish" ? Surrogate::swish : Surrogate::tanh;
}

void expect_curve(const Tensor& curve, const Tensor& x) {
  STD_TORCH_CHECK(curve.numel() == 2 && curve.scalar_type() == x.scalar_type(), "surrogate_sign: curve must be (slope, height) in the dtype of x");
}

Tensor surrogate_sign(const Tensor& x, std::string, const Tensor&) { return hard_sign(x); }

Tensor surrogate_sign_backward(const Tensor& grad_any, const Tensor& x_any, std::string surrogate, const Tensor& curve_any, int64_t) {
  const Tensor grad = phyla::dense(grad_any), x = phyla::dense(x_any), curve = phyla::dense(curve_any);
  expect_alike(grad, x);
  expect_curve(curve, x);
  const Surrogate kind = surrogate_named(surrogate);
  return map(x, [&](auto* in, auto* out, int64_t at, int64_t size) {
    using T = std::remove_pointer_t<decltype(out)>;
    const T *g = phyla::data<T>(grad) + at, *numbers = phyla::data<T>(curve);
    if (kind == Surrogate::approx) return run_approx(g, in, out, size, numbers[0], numbers[1]);
    if (kind == Surrogate::swish) return run_swish(g, in, out, size, numbers[0], numbers[1]);
    run_tanh_(g, in, out, size, numbers[0], numbers[1]);
  });
}

// The first dimension of x is the batch.
Tensor normalized_sign_backward(const Tensor& grad_any, const Tensor& x_any, std::string surrogate, const Tensor& curve_any, int64_t) {
  const Tensor grad = phyla::dense(grad_any), x = phyla::dense(x_any), curve = phyla::dense(curve_any);
  expect_alike(grad, x);
  expect_curve(curve, x);
  STD_TORCH_CHECK(x.dim() > 1, "normalized_sign: x must have a batch of samples");
  const Surrogate kind = surrogate_named(surrogate);
  return phyla::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Tensor dx = phyla::empty<T>(phyla::sizes_of(x));
    const int64_t batch = x.size(0), size = batch ? x.numel() / batch : 0;
    const T *g = phyla::data<T>(grad), *in = phyla::data<T>(x), *numbers = phyla::data<T>(curve);
    T* out = phyla::mutable_data<T>(dx);
    phyla::parallel_units(batch, [&](int64_t n) {
      const int64_t at = n * size;
      if (kind == Surrogate::approx) return run_normalized_approx(g + at, in + at, out + at, size, numbers[0], numbers[1]);
      if (kind == Surrogate::swish) return run_normalized_swish(g + at, in + at, out + at, size, numbers[0], numbers[1]);
      run_normalized_tanh_(g + at, in + at, out + at, size, numbers[0], numbers[1]);
    });
    return dx;
  });
}

Tensor biper(const Tensor& x, double frequency, bool hard) {
  return map(phyla::dense(x), [=](auto* in, auto* out, int64_t, int64_t size) {
    using T = std::remove_pointer_t<decltype(out)>;
    run_biper(in, out, size, T(frequency), hard);
  });
}

Tensor biper_backward(const Tensor& grad_any, const Tensor& x_any, double frequency, bool hard, int64_t) {
  const Tensor grad = phyla::dense(grad_any), x = phyla::dense(x_any);
  expect_alike(grad, x);
  return map(x, [&](auto* in, auto* out, int64_t at, int64_t size) {
    using T = std::remove_pointer_t<decltype(out)>;
    run_biper_slope(phyla::data<T>(grad) + at, in, out, size, T(frequency), hard);
  });
}

std::tuple<Tensor, Tensor> sign_and_mask(const Tensor& x, double clip) {
  Tensor mask = torch::stable::empty({(x.numel() + 63) / 64}, torch::headeronly::ScalarType::Long, std::nullopt,
                                     torch::stable::Device(torch::headeronly::DeviceType::CPU));
  int64_t* words = static_cast<int64_t*>(mask.mutable_data_ptr());
  Tensor y = map(phyla::dense(x), [=](auto* in, auto* out, int64_t at, int64_t size) {
    using T = std::remove_pointer_t<decltype(out)>;
    run_sign_and_mask(in, out, words + at / 64, size, T(clip));
  });
  return {y, mask};
}

Tensor keep_inside(const Tensor& grad, const Tensor& mask_any) {
  const Tensor mask = phyla::dense(mask_any);
  STD_TORCH_CHECK(mask.scalar_type() == torch::headeronly::ScalarType::Long && mask.numel() == (grad.numel() + 63) / 64,
                  "keep_inside: mask must have one bit an element of grad");
  const int64_t* words = static_cast<const int64_t*>(mask.const_data_ptr());
  return map(phyla::dense(grad), [=](auto* in, auto* out, int64_t at, int64_t size) { run_keep_inside(in, words + at / 64, out, size); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phyla_quantized, CPU, m) {
  m.impl("hard_sign", TORCH_BOX(&hard_sign));
  m.impl("surrogate_sign", TORCH_BOX(&surrogate_sign));
  m.impl("surrogate_sign_backward", TORCH_BOX(&surrogate_sign_backward));
  m.impl("normalized_sign", TORCH_BOX(&surrogate_sign));
  m.impl("normalized_sign_backward", TORCH_BOX(&normalized_sign_backward));
  m.impl("biper", TORCH_BOX(&biper));
  m.impl("biper_backward", TORCH_BOX(&biper_backward));
  m.impl("sign_and_mask", TORCH_BOX(&sign_and_mask));
  m.impl("keep_inside", TORCH_BOX(&keep_inside));
}

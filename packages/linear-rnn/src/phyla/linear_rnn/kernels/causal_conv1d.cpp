// Depthwise causal convolution with SiLU: one pass over x forward; one pass over (grad, x) backward, which computes the sums before SiLU again.
//
// Token t of a sequence reads its own row and the W - 1 before it; rows before its first token are those of its state. A unit is a block of
// tokens of one sequence and a block of channels. Gradients of weight and bias are summed in a unit, and over units in order, in float64.
#include "recurrence_ops.h"

namespace phyla::linear_rnn {
namespace {

constexpr int64_t kTokens = 256, kChannels = 64;

template <class T>
struct Conv {
  const T *x, *bias, *state;
  std::vector<T> weight;  // (W, D)
  std::vector<T> zeros;
  std::vector<int64_t> offsets;
  int64_t D, W;
  bool silu;

  int64_t sequences() const { return int64_t(offsets.size()) - 1; }
  int64_t length(int64_t s) const { return offsets[s + 1] - offsets[s]; }
  // Inputs at place p of sequence s, which counts from the first row of its state.
  const T* row(int64_t s, int64_t p) const {
    if (p >= W - 1) return x + (offsets[s] + p - (W - 1)) * D;
    return state == nullptr ? zeros.data() : state + (s * (W - 1) + p) * D;
  }
};

struct Unit {
  int64_t sequence, begin, end, channel, channels;
};

template <class T>
std::vector<Unit> units_of(const Conv<T>& c) {
  std::vector<Unit> units;
  for (int64_t s = 0; s < c.sequences(); ++s)
    for (int64_t t = 0; t < c.length(s); t += kTokens)
      for (int64_t d = 0; d < c.D; d += kChannels)
        units.push_back({s, t, std::min(t + kTokens, c.length(s)), d, std::min(kChannels, c.D - d)});
  return units;
}

// sums[i] = bias + sum over w of weight[w] row(t + w), for the channels of a unit; `width` is W where it is known, else 0.
template <int width, class T>
PHYLA_INLINE void sums_of(const Conv<T>& c, const Unit& u, int64_t t, T* sums) {
  const int64_t n = u.channels;
  const T* weight = c.weight.data() + u.channel;
  if constexpr (width > 0) {
    const T* rows[width];
    for (int w = 0; w < width; ++w) rows[w] = c.row(u.sequence, t + w) + u.channel;
    const T* start = (c.bias == nullptr ? c.zeros.data() : c.bias) + u.channel;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      T sum = start[i];
      for (int w = 0; w < width; ++w) sum += weight[w * c.D + i] * rows[w][i];
      sums[i] = sum;
    }
  } else {
    std::copy_n((c.bias == nullptr ? c.zeros.data() : c.bias) + u.channel, n, sums);
    for (int64_t w = 0; w < c.W; ++w) {
      const T* row = c.row(u.sequence, t + w) + u.channel;
      for (int64_t i = 0; i < n; ++i) sums[i] += weight[w * c.D + i] * row[i];
    }
  }
}

// Sigmoid of `n` values; both arrays have room for whole vectors.
template <class T>
PHYLA_INLINE void sigmoid(const T* x, T* out, int64_t n) {
  using vec = typename Lanes<T>::vec;
  using loose = typename Lanes<T>::loose;
  for (int64_t i = 0; i < n; i += Lanes<T>::count) {
    const vec value = *reinterpret_cast<const loose*>(x + i);
    *reinterpret_cast<loose*>(out + i) = T(1) / (T(1) + exponential(vec(-value)));
  }
}

template <int width, class T>
PHYLA_INLINE void run(const Conv<T>& c, const Unit& u, T* y) {
  T sums[kChannels] = {}, open[kChannels];
  for (int64_t t = u.begin; t < u.end; ++t) {
    T* out = y + (c.offsets[u.sequence] + t) * c.D + u.channel;
    sums_of<width>(c, u, t, c.silu ? sums : out);
    if (!c.silu) continue;
    sigmoid(sums, open, u.channels);
    for (int64_t i = 0; i < u.channels; ++i) out[i] = sums[i] * open[i];
  }
}

template <class T>
struct Grads {
  const T *y, *last;
  T *x, *state;  // null where no gradient is wanted
};

// Gradients of the rows before and of a block of tokens, of which those of the sums reach W - 1 tokens further.
template <int width, class T>
PHYLA_INLINE void pull(const Conv<T>& c, const Unit& u, const Grads<T>& g, T* sums_grad, double* partial) {
  const int64_t length = c.length(u.sequence), n = u.channels, W = width > 0 ? width : c.W, reach = std::min(u.end + W - 1, length);
  T sums[kChannels] = {}, open[kChannels];
  for (int64_t t = u.begin; t < reach; ++t) {
    const T* grad = g.y + (c.offsets[u.sequence] + t) * c.D + u.channel;
    T* out = sums_grad + (t - u.begin) * kChannels;
    if (!c.silu) {
      std::copy_n(grad, n, out);
      continue;
    }
    sums_of<width>(c, u, t, sums);
    sigmoid(sums, open, n);
    for (int64_t i = 0; i < n; ++i) out[i] = grad[i] * open[i] * (T(1) + sums[i] * (T(1) - open[i]));
  }
  if (partial != nullptr) {
    std::vector<T> memory(size_t(W + 1) * kChannels, T(0));
    for (int64_t t = u.begin; t < u.end; ++t) {
      const T* grad = sums_grad + (t - u.begin) * kChannels;
      for (int64_t w = 0; w < W; ++w) {
        const T* row = c.row(u.sequence, t + w) + u.channel;
        T* sum = memory.data() + w * kChannels;
        for (int64_t i = 0; i < n; ++i) sum[i] += grad[i] * row[i];
      }
      T* sum = memory.data() + W * kChannels;
      for (int64_t i = 0; i < n; ++i) sum[i] += grad[i];
    }
    std::copy(memory.begin(), memory.end(), partial);
  }
  // Place p feeds tokens p - W + 1 .. p, and is kept as row p - length of the last state.
  const auto feed = [&](int64_t p, T* out) __attribute__((always_inline)) {
    if (p >= length) std::copy_n(g.last + (u.sequence * (W - 1) + p - length) * c.D + u.channel, n, out);
    else std::fill_n(out, n, T(0));
    for (int64_t w = 0; w < W; ++w) {
      const int64_t t = p - w;
      if (t < 0 || t >= length) continue;
      const T *grad = sums_grad + (t - u.begin) * kChannels, *weight = c.weight.data() + w * c.D + u.channel;
      for (int64_t i = 0; i < n; ++i) out[i] += weight[i] * grad[i];
    }
  };
  if (g.state != nullptr && u.begin == 0)
    for (int64_t p = 0; p < W - 1; ++p) feed(p, g.state + (u.sequence * (W - 1) + p) * c.D + u.channel);
  if (g.x != nullptr)
    for (int64_t t = u.begin; t < u.end; ++t) feed(t + W - 1, g.x + (c.offsets[u.sequence] + t) * c.D + u.channel);
}

#define WIDTHS(call)                   \
  switch (c.W) {                       \
    case 2: { constexpr int width = 2; call; break; } \
    case 3: { constexpr int width = 3; call; break; } \
    case 4: { constexpr int width = 4; call; break; } \
    default: { constexpr int width = 0; call; }       \
  }
PHYLA_CLONES void forward(const Conv<float>& c, const Unit& u, float* y) { WIDTHS(run<width>(c, u, y)) }
PHYLA_CLONES void forward(const Conv<double>& c, const Unit& u, double* y) { WIDTHS(run<width>(c, u, y)) }
PHYLA_CLONES void backward(const Conv<float>& c, const Unit& u, const Grads<float>& g, float* work, double* partial) {
  WIDTHS(pull<width>(c, u, g, work, partial))
}
PHYLA_CLONES void backward(const Conv<double>& c, const Unit& u, const Grads<double>& g, double* work, double* partial) {
  WIDTHS(pull<width>(c, u, g, work, partial))
}
#undef WIDTHS

template <class T>
Conv<T> problem(Held& held, const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& state, const Maybe& cu_seqlens, bool silu) {
  Conv<T> c{held.keep<T>(x), held.keep<T>(bias), held.keep<T>(state), {}, {}, offsets_of(cu_seqlens, x.size(0), x.size(1)), x.size(2), weight.size(1), silu};
  const T* given = held.keep<T>(weight);
  c.weight.resize(size_t(c.W * c.D));
  for (int64_t d = 0; d < c.D; ++d)
    for (int64_t w = 0; w < c.W; ++w) c.weight[w * c.D + d] = given[d * c.W + w];
  c.zeros.resize(size_t(c.D));
  STD_TORCH_CHECK(weight.size(0) == c.D && (!bias || bias->numel() == c.D) && (!state || state->numel() == c.sequences() * (c.W - 1) * c.D),
                  "causal_conv1d: the shapes of the arguments disagree");
  return c;
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& state, const Maybe& cu_seqlens, bool silu) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Conv<T> c = problem<T>(held, x, weight, bias, state, cu_seqlens, silu);
    Tensor y = empty<T>(sizes_of(x)), last = empty<T>({c.sequences(), c.W - 1, c.D});
    T *out = mutable_data<T>(y), *kept = mutable_data<T>(last);
    const std::vector<Unit> units = units_of(c);
    parallel_units(int64_t(units.size()), [&](int64_t j) { forward(c, units[j], out); });
    for (int64_t s = 0; s < c.sequences(); ++s)
      for (int64_t w = 0; w < c.W - 1; ++w) std::copy_n(c.row(s, c.length(s) + w), c.D, kept + (s * (c.W - 1) + w) * c.D);
    return std::tuple(y, last);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(const Tensor& grad_y, const Tensor& grad_last, const Tensor& x, const Tensor& weight,
                                                                  const Maybe& bias, const Maybe& state, const Maybe& cu_seqlens, bool silu,
                                                                  int64_t needs) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Conv<T> c = problem<T>(held, x, weight, bias, state, cu_seqlens, silu);
    STD_TORCH_CHECK(sizes_of(grad_y) == sizes_of(x) && grad_last.numel() == c.sequences() * (c.W - 1) * c.D, "causal_conv1d_backward: shapes disagree");
    const auto wanted = [&](int64_t bit, const Tensor& like) { return needs >> bit & 1 ? empty<T>(sizes_of(like)) : unwanted<T>(); };
    Tensor dx = wanted(0, x), dw = wanted(1, weight), db = bias ? wanted(2, *bias) : unwanted<T>(), ds = state ? wanted(3, *state) : unwanted<T>();
    Grads<T> g{held.keep<T>(grad_y), held.keep<T>(grad_last), needs & 1 ? mutable_data<T>(dx) : nullptr, state && needs & 8 ? mutable_data<T>(ds) : nullptr};
    const std::vector<Unit> units = units_of(c);
    const bool sums = needs & 6;
    const int64_t rows = (c.W + 1) * kChannels;
    std::vector<double> partial(sums ? units.size() * rows : 0), total(sums ? (c.W + 1) * c.D : 0);
    parallel_units(int64_t(units.size()), [&](int64_t j) {
      std::unique_ptr<T[]> work(new T[size_t((kTokens + c.W) * kChannels)]);
      backward(c, units[j], g, work.get(), sums ? partial.data() + j * rows : nullptr);
    });
    if (g.state != nullptr)
      for (int64_t s = 0; s < c.sequences(); ++s)  // an empty sequence hands its state on
        if (c.length(s) == 0) std::copy_n(g.last + s * (c.W - 1) * c.D, (c.W - 1) * c.D, g.state + s * (c.W - 1) * c.D);
    if (sums) {
      for (size_t j = 0; j < units.size(); ++j)
        for (int64_t w = 0; w <= c.W; ++w)
          for (int64_t i = 0; i < units[j].channels; ++i) total[w * c.D + units[j].channel + i] += partial[j * rows + w * kChannels + i];
      for (int64_t d = 0; d < c.D; ++d) {
        if (needs & 2)
          for (int64_t w = 0; w < c.W; ++w) mutable_data<T>(dw)[d * c.W + w] = T(total[w * c.D + d]);
        if (bias && needs & 4) mutable_data<T>(db)[d] = T(total[c.W * c.D + d]);
      }
    }
    return std::tuple(dx, dw, db, ds);
  });
}

}  // namespace
}  // namespace phyla::linear_rnn

STABLE_TORCH_LIBRARY_IMPL(phyla_linear_rnn, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&phyla::linear_rnn::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&phyla::linear_rnn::causal_conv1d_backward));
}

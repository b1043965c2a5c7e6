#include "tiles.h"

namespace phyla::linear_rnn {
namespace {

// Rows i .. i + M - 1 and one unit of columns of a product: 2 M accumulators, two loads and M broadcasts for 2 M multiply-adds.
template <class T, int M>
PHYLA_INLINE void product_tile(const Product<T>& p, int64_t i, int64_t j) {
  using vec = typename Lanes<T>::vec;
  using loose = typename Lanes<T>::loose;
  constexpr int64_t half = Lanes<T>::count;
  vec sum[M][2];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    sum[r][0] = sum[r][1] = vec{};
    if (p.source != nullptr) {
      const T* source = p.source + (i + r) * p.lds + j;
      const T scale = p.row_scale != nullptr ? p.row_scale[i + r] : T(1);
      sum[r][0] = scale * *reinterpret_cast<const loose*>(source);
      sum[r][1] = scale * *reinterpret_cast<const loose*>(source + half);
    }
  }
  const T *a = p.a + i * p.am, *b = p.b + j;
  const int64_t am = p.am, ak = p.ak, ldb = p.ldb;
  for (int64_t k = 0; k < p.k; ++k, a += ak, b += ldb) {
    const vec low = *reinterpret_cast<const loose*>(b), high = *reinterpret_cast<const loose*>(b + half);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const T x = a[r * am];
      sum[r][0] += x * low;
      sum[r][1] += x * high;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    T* out = p.out + (i + r) * p.ldo + j;
    *reinterpret_cast<loose*>(out) = sum[r][0];
    *reinterpret_cast<loose*>(out + half) = sum[r][1];
  }
}

template <class T>
PHYLA_INLINE void product_of(const Product<T>& p) {
  for (int64_t j = 0; j < p.n; j += 2 * Lanes<T>::count) {
    int64_t i = 0;
    for (; i + 6 <= p.m; i += 6) product_tile<T, 6>(p, i, j);
    switch (p.m - i) {
      case 5: product_tile<T, 5>(p, i, j); break;
      case 4: product_tile<T, 4>(p, i, j); break;
      case 3: product_tile<T, 3>(p, i, j); break;
      case 2: product_tile<T, 2>(p, i, j); break;
      case 1: product_tile<T, 1>(p, i, j); break;
      default: break;
    }
  }
}

template <class T, int W>
PHYLA_INLINE void substitution_tile(const Substitution<T>& p, int64_t j) {
  using vec = typename Lanes<T>::vec;
  using loose = typename Lanes<T>::loose;
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t s = 0; s < p.rows; ++s) {
    T *e = p.e + s * p.stride + j, *x = p.x + s * p.stride + j;
    vec sum[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) sum[w] = *reinterpret_cast<const loose*>(e + w * lanes);
    const T *lower = p.lower + s * p.along_s, *known = p.x + j;
    for (int64_t r = 0; r < s; ++r, lower += p.along_r, known += p.stride) {
      const T factor = *lower;
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) sum[w] += factor * *reinterpret_cast<const loose*>(known + w * lanes);
    }
    const T rate = p.rate != nullptr ? p.rate[s * p.rate_stride] : T(1);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      *reinterpret_cast<loose*>(e + w * lanes) = sum[w];
      *reinterpret_cast<loose*>(x + w * lanes) = rate * sum[w];
    }
  }
}

// As many chains as hide the latency of a multiply-add; what is computed for a column does not depend on its tile.
template <class T>
PHYLA_INLINE void substitution_of(const Substitution<T>& p) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t j = 0;
  for (; j + 8 * lanes <= p.n; j += 8 * lanes) substitution_tile<T, 8>(p, j);
  for (; j + 4 * lanes <= p.n; j += 4 * lanes) substitution_tile<T, 4>(p, j);
  if (j < p.n) substitution_tile<T, 2>(p, j);
}

// One square block by interleaving rows i and i + half, log2(lanes) times.
template <class T>
PHYLA_INLINE void transpose_block(T* out, int64_t ldo, const T* in, int64_t ldi) {
  using vec = typename Lanes<T>::vec;
  using loose = typename Lanes<T>::loose;
  using integers = typename Lanes<T>::integers;
  constexpr int lanes = Lanes<T>::count;
  integers low, high;
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) {
    low[i] = i % 2 * lanes + i / 2;
    high[i] = i % 2 * lanes + (i + lanes) / 2;
  }
  vec a[lanes], b[lanes];
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) a[i] = *reinterpret_cast<const loose*>(in + i * ldi);
#pragma GCC unroll 3
  for (int stage = 1; stage < lanes; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + lanes / 2], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + lanes / 2], high);
    }
#pragma GCC unroll 8
    for (int i = 0; i < lanes; ++i) a[i] = b[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) *reinterpret_cast<loose*>(out + i * ldo) = a[i];
}

template <class T>
PHYLA_INLINE void transpose_of(T* out, int64_t ldo, const T* in, int64_t ldi, int64_t rows, int64_t columns) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t i = 0; i < rows; i += lanes)
    for (int64_t j = 0; j < columns; j += lanes) transpose_block<T>(out + j * ldo + i, ldo, in + i * ldi + j, ldi);
}

template <class T, int W, int writes>
PHYLA_INLINE void sweep_tile(const Sweep<T>& p, int64_t j) {
  using vec = typename Lanes<T>::vec;
  using loose = typename Lanes<T>::loose;
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t K = p.K, V = p.V;
  const T *from = p.from + j, *decay = p.decay, *read = p.read, *write = p.write[0], *write2 = p.write[1], *value = p.value[0] + j, *value2 = p.value[1] + j;
  T *to = p.to + j, *found = p.found + j;
  vec sum[W] = {};
  for (int64_t k = 0; k < K; ++k, from += V, to += V) {
    const vec keep = vec{} + (writes > 0 && decay != nullptr ? decay[k] : T(1)), reads = vec{} + read[k];
    const vec add = vec{} + (writes > 0 ? write[k] : T(0)), add2 = vec{} + (writes > 1 ? write2[k] : T(0));
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      vec s = *reinterpret_cast<const loose*>(from + w * lanes);
      if constexpr (writes > 0) {
        s = keep * s + add * *reinterpret_cast<const loose*>(value + w * lanes);
        if constexpr (writes > 1) s += add2 * *reinterpret_cast<const loose*>(value2 + w * lanes);
        *reinterpret_cast<loose*>(to + w * lanes) = s;
      }
      sum[w] += reads * s;
    }
  }
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w) *reinterpret_cast<loose*>(found + w * lanes) = sum[w];
}
template <class T, int writes>
PHYLA_INLINE void sweep_writes(const Sweep<T>& p) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t j = 0;
  for (; j + 8 * lanes <= p.V; j += 8 * lanes) sweep_tile<T, 8, writes>(p, j);
  for (; j < p.V; j += 2 * lanes) sweep_tile<T, 2, writes>(p, j);
}
template <class T>
PHYLA_INLINE void sweep_of(const Sweep<T>& p) {
  if (p.to == nullptr) sweep_writes<T, 0>(p);
  else if (p.write[1] == nullptr) sweep_writes<T, 1>(p);
  else sweep_writes<T, 2>(p);
}

}  // namespace

PHYLA_CLONES void sweep(const Sweep<float>& p) { sweep_of(p); }
PHYLA_CLONES void sweep(const Sweep<double>& p) { sweep_of(p); }
PHYLA_CLONES void multiply(const Product<float>& p) { product_of(p); }
PHYLA_CLONES void multiply(const Product<double>& p) { product_of(p); }
PHYLA_CLONES void substitute(const Substitution<float>& p) { substitution_of(p); }
PHYLA_CLONES void substitute(const Substitution<double>& p) { substitution_of(p); }
PHYLA_CLONES void transpose(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t rows, int64_t columns) {
  transpose_of(out, ldo, in, ldi, rows, columns);
}
PHYLA_CLONES void transpose(double* out, int64_t ldo, const double* in, int64_t ldi, int64_t rows, int64_t columns) {
  transpose_of(out, ldo, in, ldi, rows, columns);
}

PHYLA_CLONES void scale_and_add(float* x, float factor, const float* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] = factor * x[i] + y[i];
}
PHYLA_CLONES void scale_and_add(double* x, double factor, const double* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] = factor * x[i] + y[i];
}

PHYLA_CLONES void dots(float* out, int64_t stride, const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) out[i * stride] = dot(x + i * ldx, y + i * ldy, columns);
}
PHYLA_CLONES void dots(double* out, int64_t stride, const double* x, int64_t ldx, const double* y, int64_t ldy, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) out[i * stride] = dot(x + i * ldx, y + i * ldy, columns);
}

}  // namespace phyla::linear_rnn

// Small dense algebra on matrices that live in the first cache level: products, triangular systems, transposes, exponentials of rows.
// Rows of every output are padded to whole units of 64 bytes; what stands in the padding is never read into a result.
#pragma once

#include <phyla/kernel.h>

namespace phyla::linear_rnn {

template <class T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t unit = 64 / sizeof(T);
  return (n + unit - 1) / unit * unit;
}

// out (m, n) = row_scale . source + a b, with a (m, k) of strides (am, ak); no source is zero, no scale is one. n counts whole units.
template <class T>
struct Product {
  T* out;
  int64_t ldo, m, n, k;
  const T* a;
  int64_t am, ak;
  const T* b;
  int64_t ldb;
  const T* source = nullptr;
  int64_t lds = 0;
  const T* row_scale = nullptr;
};
void multiply(const Product<float>& p);
void multiply(const Product<double>& p);

// For s = 0, 1, ..: e_s += sum of lower(s, r) x_r over r < s, then x_s = rate_s e_s. Strides may be negative, to go backwards.
template <class T>
struct Substitution {
  int64_t rows, n;
  T* e;
  T* x;
  int64_t stride;  // of the rows of e and x
  const T* lower;
  int64_t along_s, along_r;
  const T* rate = nullptr;  // ones if absent
  int64_t rate_stride = 0;
};
void substitute(const Substitution<float>& p);
void substitute(const Substitution<double>& p);

// out (columns, rows) = in (rows, columns)^T, in whole blocks: rows and columns are rounded up, so both matrices need that much memory.
void transpose(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t rows, int64_t columns);
void transpose(double* out, int64_t ldo, const double* in, int64_t ldi, int64_t rows, int64_t columns);

// out[i * stride] = x_i . y_i over the rows of two matrices.
void dots(float* out, int64_t stride, const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t columns);
void dots(double* out, int64_t stride, const double* x, int64_t ldx, const double* y, int64_t ldy, int64_t rows, int64_t columns);

// to_k = decay_k from_k + sum of write_k value over up to two writes, then found = sum of read_k to_k, over rows k = 0 .. K - 1 of V values;
// no `to`: nothing is written and found is of `from`. No decay is one. V counts whole units; `to` may be `from`.
template <class T>
struct Sweep {
  int64_t K, V;
  const T* from;
  T* to;
  const T* decay;
  std::array<const T*, 2> write, value;
  const T* read;
  T* found;
};
void sweep(const Sweep<float>& p);
void sweep(const Sweep<double>& p);

template <class T>
PHYLA_INLINE T dot(const T* x, const T* y, int64_t size) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += x[i] * y[i];
  return sum;
}
template <class T>
void copy_rows(T* out, int64_t ldo, const T* in, int64_t ldi, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(in + i * ldi, columns, out + i * ldo);
}

// x = factor x + y.
void scale_and_add(float* x, float factor, const float* y, int64_t size);
void scale_and_add(double* x, double factor, const double* y, int64_t size);

// Reads `size` values that are needed soon, in the order of memory: this wakes the hardware's prefetcher, which rows of one head, far apart,
// do not, and which prefetch instructions did not replace.
template <class T>
void touch(const T* values, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T))) static_cast<void>(*const_cast<const volatile T*>(values + i));
}

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float vec __attribute__((vector_size(32)));
  typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));
  typedef int32_t integers __attribute__((vector_size(32)));
  typedef int32_t narrow __attribute__((vector_size(32)));
  static constexpr int64_t count = 8;
};
template <>
struct Lanes<double> {
  typedef double vec __attribute__((vector_size(32)));
  typedef double loose __attribute__((vector_size(32), aligned(8), may_alias));
  typedef int64_t integers __attribute__((vector_size(32)));
  typedef int32_t narrow __attribute__((vector_size(16)));
  static constexpr int64_t count = 4;
};

}  // namespace phyla::linear_rnn

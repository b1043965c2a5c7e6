#include "bspline_local.h"

namespace kan {
namespace {

// The order + 1 functions that are not zero at the points of a vector, their slopes, and the cell of each point.
template <class T>
struct LocalSplines {
  static constexpr int64_t L = Lanes<T>::count;
  std::vector<T> knots;  // of one input, with `order` copies of each end on its side
  int64_t order, count;
  bool linear;
  std::vector<T> values, slopes;  // (order + 1, lanes)
  int64_t cell[L];

  explicit LocalSplines(const BasisArguments<T>& a)
      : order(a.ints[0]), count(a.count), linear(a.ints[1] != 0), values((order + 2) * L), slopes((order + 2) * L) {}

  void select(const BasisArguments<T>& a, int64_t input) {
    const T* t = a.first.of(input);
    const int64_t n = count + order + 1;
    knots.assign(n + 2 * order, t[0]);
    std::copy_n(t, n, knots.data() + order);
    std::fill_n(knots.data() + order + n, order, t[n - 1]);
  }

  PHYLA_INLINE int64_t cell_of(const T* t, T x, int64_t first, int64_t last) const {
    int64_t low = first, size = last - first + 1;  // the last knot of [first, last] that is not above x
    while (size > 1) {
      const int64_t half = size / 2;
      low = t[low + half] <= x ? low + half : low;
      size -= half;
    }
    return low;
  }

  PHYLA_INLINE void at(Vec<T> x) {
    const T* t = knots.data() + order;
    const int64_t cells = count + order;
    Vec<T> inside = x;
    if (linear) {
      const Vec<T> above = x < t[order] ? fill<T>(t[order]) : x;
      inside = above > t[count] ? fill<T>(t[count]) : above;
    }
    for (int64_t l = 0; l < L; ++l) cell[l] = linear ? cell_of(t, inside[l], order, count - 1) : cell_of(t, inside[l], 0, cells - 1);
    store<T>(values.data(), fill<T>(1));
    for (int64_t p = 1; p <= order; ++p) {
      Vec<T> carried{}, slope{};
      for (int64_t j = 0; j < p; ++j) {
        Vec<T> left{}, right{};
        for (int64_t l = 0; l < L; ++l) {
          left[l] = t[cell[l] - p + 1 + j];
          right[l] = t[cell[l] + 1 + j];
        }
        const Vec<T> width = right - left;
        const Vec<T> q = width > T(0) ? load(values.data() + j * L) / width : Vec<T>{};
        store<T>(values.data() + j * L, carried + (right - inside) * q);
        carried = (inside - left) * q;
        if (p == order) {
          store<T>(slopes.data() + j * L, slope - T(order) * q);
          slope = T(order) * q;
        }
      }
      store<T>(values.data() + p * L, carried);
      if (p == order) store<T>(slopes.data() + p * L, slope);
    }
    const Vec<T> outside = x == x ? Vec<T>{} : x;  // 0, or NaN where x is
    for (int64_t m = 0; m <= order; ++m) {
      const Vec<T> value = load(values.data() + m * L), slope = load(slopes.data() + m * L);
      if (linear) {
        store<T>(values.data() + m * L, value + slope * (x - inside));
      } else {
        store<T>(values.data() + m * L, x >= t[0] ? (x < t[cells] ? value : outside) : outside);
        store<T>(slopes.data() + m * L, x >= t[0] ? (x < t[cells] ? slope : outside) : outside);
      }
    }
  }
};

template <class T>
PHYLA_INLINE void forward_tile(const BasisArguments<T>& a, const LocalCoefficients<T>& w, int64_t begin, int64_t inputs, int64_t rows, const T* x,
                               int64_t ld, T* y) {
  constexpr int64_t L = Lanes<T>::count;
  const int64_t outputs = w.outputs;
  LocalSplines<T> splines(a);
  for (int64_t i = 0; i < inputs; ++i) {
    splines.select(a, begin + i);
    for (int64_t r = 0; r < rows; r += L) {
      splines.at(load(x + i * ld + r));
      for (int64_t l = 0; l < std::min(L, rows - r); ++l) {
        const T *from = w.of(begin + i) + splines.cell[l] * outputs, *v = splines.values.data() + l;
        T* to = y + (r + l) * outputs;
        if (splines.order == 3) {
          const T v0 = v[0], v1 = v[L], v2 = v[2 * L], v3 = v[3 * L];
#pragma omp simd
          for (int64_t o = 0; o < outputs; ++o)
            to[o] += v0 * from[o] + v1 * from[outputs + o] + v2 * from[2 * outputs + o] + v3 * from[3 * outputs + o];
        } else {
          for (int64_t m = 0; m <= splines.order; ++m) {
            const T vm = v[m * L];
#pragma omp simd
            for (int64_t o = 0; o < outputs; ++o) to[o] += vm * from[m * outputs + o];
          }
        }
      }
    }
  }
}

template <class T>
PHYLA_INLINE void backward_tile(const BasisArguments<T>& a, const LocalCoefficients<T>& w, int64_t begin, int64_t inputs, int64_t rows, const T* x,
                                int64_t ld, const T* g, LocalCoefficients<T>* d_w, T* dx) {
  constexpr int64_t L = Lanes<T>::count;
  const int64_t outputs = w.outputs;
  LocalSplines<T> splines(a);
  for (int64_t i = 0; i < inputs; ++i) {
    splines.select(a, begin + i);
    for (int64_t r = 0; r < rows; r += L) {
      splines.at(load(x + i * ld + r));
      for (int64_t l = 0; l < std::min(L, rows - r); ++l) {
        const T* by = g + (r + l) * outputs;
        if (d_w && dx && splines.order == 3) {  // one pass over the gradient for both
          const T *v = splines.values.data() + l, *s = splines.slopes.data() + l, *from = w.of(begin + i) + splines.cell[l] * outputs;
          const T v0 = v[0], v1 = v[L], v2 = v[2 * L], v3 = v[3 * L], s0 = s[0], s1 = s[L], s2 = s[2 * L], s3 = s[3 * L];
          T* to = d_w->of(begin + i) + splines.cell[l] * outputs;
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t o = 0; o < outputs; ++o) {
            const T go = by[o];
            to[o] += v0 * go;
            to[outputs + o] += v1 * go;
            to[2 * outputs + o] += v2 * go;
            to[3 * outputs + o] += v3 * go;
            sum += go * (s0 * from[o] + s1 * from[outputs + o] + s2 * from[2 * outputs + o] + s3 * from[3 * outputs + o]);
          }
          dx[i * ld + r + l] = sum;
          continue;
        }
        if (d_w) {
          T* to = d_w->of(begin + i) + splines.cell[l] * outputs;
          for (int64_t m = 0; m <= splines.order; ++m) {
            const T vm = splines.values[m * L + l];
#pragma omp simd
            for (int64_t o = 0; o < outputs; ++o) to[m * outputs + o] += vm * by[o];
          }
        }
        if (dx) {
          const T* from = w.of(begin + i) + splines.cell[l] * outputs;
          T sum = 0;
          for (int64_t m = 0; m <= splines.order; ++m) {
            T dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t o = 0; o < outputs; ++o) dot += from[m * outputs + o] * by[o];
            sum += splines.slopes[m * L + l] * dot;
          }
          dx[i * ld + r + l] = sum;
        }
      }
    }
  }
}

}  // namespace

PHYLA_CLONES void local_forward(const BasisArguments<float>& a, const LocalCoefficients<float>& w, int64_t begin, int64_t inputs, int64_t rows,
                                const float* x, int64_t ld, float* y) {
  forward_tile(a, w, begin, inputs, rows, x, ld, y);
}
PHYLA_CLONES void local_forward(const BasisArguments<double>& a, const LocalCoefficients<double>& w, int64_t begin, int64_t inputs, int64_t rows,
                                const double* x, int64_t ld, double* y) {
  forward_tile(a, w, begin, inputs, rows, x, ld, y);
}
PHYLA_CLONES void local_backward(const BasisArguments<float>& a, const LocalCoefficients<float>& w, int64_t begin, int64_t inputs, int64_t rows,
                                 const float* x, int64_t ld, const float* g, LocalCoefficients<float>* d_w, float* dx) {
  backward_tile(a, w, begin, inputs, rows, x, ld, g, d_w, dx);
}
PHYLA_CLONES void local_backward(const BasisArguments<double>& a, const LocalCoefficients<double>& w, int64_t begin, int64_t inputs, int64_t rows,
                                 const double* x, int64_t ld, const double* g, LocalCoefficients<double>* d_w, double* dx) {
  backward_tile(a, w, begin, inputs, rows, x, ld, g, d_w, dx);
}

}  // namespace kan

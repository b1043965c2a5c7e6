#include "bspline_local.h"

namespace kan {
namespace {

constexpr int64_t kRows = 1024;   // sorted at a time
constexpr int64_t kInputs = 32;   // whose sorted rows are kept at a time
constexpr int64_t kOutputs = 64;  // of a block: kRows of its results stay in L2
constexpr int64_t kWide = 2;      // vectors of outputs in registers

// The rows of a chunk, sorted by the cell of one input's points, and the functions that are not zero there.
template <class T>
struct Sorted {
  static constexpr int64_t L = Lanes<T>::count, ld = kRows + L;  // evaluation goes by whole vectors, beyond the last row
  std::vector<int64_t> begin;                                    // of a cell among the sorted rows; one more for the end
  std::vector<int32_t> row, cell;                                // sorted; the cell of every row, -1 outside
  std::vector<T> x, values, slopes;                              // sorted: (ld), (order + 1, ld) twice

  int64_t cells() const { return int64_t(begin.size()) - 1; }
  void resize(int64_t cells, int64_t order) {
    begin.resize(cells + 1);
    row.resize(kRows);
    cell.resize(kRows);
    x.resize(ld);
    values.resize((order + 1) * ld);
    slopes.resize((order + 1) * ld);
  }
};

// The cell [t_c, t_{c+1}) of x among those from `first` to `last`; the nearest of them outside. `scale`: cells per unit on a uniform grid.
template <class T>
PHYLA_INLINE int64_t cell_of(const T* t, T x, int64_t first, int64_t last, T scale) {
  const T at = (x - t[first]) * scale;
  const int64_t guess = first + (at > T(0) && at < T(last - first) ? int64_t(at) : 0);
  if (t[guess] <= x && x < t[guess + 1]) return guess;
  int64_t low = first, size = last - first + 1;  // the last knot of [first, last] that is not above x
  while (size > 1) {
    const int64_t half = size / 2;
    low = t[low + half] <= x ? low + half : low;
    size -= half;
  }
  return low;
}

// The triangular scheme for the points [begin, end) of one cell c, whose functions are c - order .. c.
template <class T>
PHYLA_INLINE void evaluate_cell(const BasisArguments<T>& a, int64_t input, int64_t c, int64_t begin, int64_t end, Sorted<T>& s) {
  constexpr int64_t L = Lanes<T>::count, ld = Sorted<T>::ld;
  const int64_t order = a.ints[0], knots = a.count + order + 1;
  const bool linear = a.ints[1] != 0;
  const T *t = a.first.of(input), *inverse = a.inverse.of(input);
  for (int64_t r = begin; r < end; r += L) {
    const Vec<T> x = load(s.x.data() + r);
    Vec<T> inside = x;
    if (linear) {
      const Vec<T> above = x < t[order] ? fill<T>(t[order]) : x;
      inside = above > t[a.count] ? fill<T>(t[a.count]) : above;
    }
    T *v = s.values.data() + r, *d = s.slopes.data() + r;
    store<T>(v, fill<T>(1));
    for (int64_t p = 1; p <= order; ++p) {
      Vec<T> carried{}, slope{};
      for (int64_t j = 0; j < p; ++j) {
        const int64_t m = c - p + 1 + j;  // a function that lacks a knot counts for those alone that do not exist
        const bool exists = m >= 0 && m + p < knots;
        const Vec<T> q = load(v + j * ld) * (exists ? inverse[(p - 1) * knots + m] : T(0));
        store<T>(v + j * ld, carried + ((exists ? t[m + p] : T(0)) - inside) * q);
        carried = (inside - (exists ? t[m] : T(0))) * q;
        if (p == order) {
          store<T>(d + j * ld, slope - T(order) * q);
          slope = T(order) * q;
        }
      }
      store<T>(v + p * ld, carried);
      if (p == order) store<T>(d + p * ld, slope);
    }
    for (int64_t m = 0; linear && m <= order; ++m) store<T>(v + m * ld, load(v + m * ld) + load(d + m * ld) * (x - inside));
  }
}

template <class T>
PHYLA_INLINE void sort_rows(const BasisArguments<T>& a, int64_t input, int64_t rows, const T* x, int64_t stride, Sorted<T>& s) {
  const int64_t order = a.ints[0], cells = a.count + order;
  const bool linear = a.ints[1] != 0;
  const int64_t first = linear ? order : 0, last = linear ? a.count - 1 : cells - 1;
  const T *t = a.first.of(input), span = t[last + 1] - t[first], scale = span > T(0) ? T(last - first + 1) / span : T(0);
  s.resize(cells, order);
  std::fill(s.begin.begin(), s.begin.end(), 0);
  for (int64_t r = 0; r < rows; ++r) {
    const T at = x[r * stride];
    const bool outside = !linear && (at < t[0] || at >= t[cells]);  // not NaN
    s.cell[r] = outside ? -1 : int32_t(cell_of(t, at, first, last, scale));
    if (!outside) ++s.begin[s.cell[r] + 1];
  }
  for (int64_t c = 0; c < cells; ++c) s.begin[c + 1] += s.begin[c];
  for (int64_t r = 0; r < rows; ++r) {
    if (s.cell[r] < 0) continue;
    const int64_t to = s.begin[s.cell[r]]++;
    s.row[to] = int32_t(r);
    s.x[to] = x[r * stride];
  }
  for (int64_t c = cells; c > 0; --c) s.begin[c] = s.begin[c - 1];
  s.begin[0] = 0;
  for (int64_t c = 0; c < cells; ++c) evaluate_cell(a, input, c, s.begin[c], s.begin[c + 1], s);
}

// Coefficients of one input, rows of (O, K), as (K + 2 order, width), with `order` zero functions on both sides: the cell c owns the rows
// c .. c + order.
template <class T>
void load_coefficients(const T* coef, int64_t stride, int64_t functions, int64_t order, int64_t outputs, int64_t width, T* to) {
  std::fill_n(to, order * width, T(0));
  std::fill_n(to + (order + functions) * width, order * width, T(0));
  to += order * width;
  for (int64_t o = 0; o < width; o += 16)
    for (int64_t k = 0; k < functions; ++k)
      for (int64_t j = o; j < o + 16; ++j) to[k * width + j] = j < outputs ? coef[j * stride + k] : T(0);
}
template <class T>
void store_coefficients(const T* from, int64_t width, int64_t functions, int64_t outputs, T* coef, int64_t stride) {
  for (int64_t o = 0; o < outputs; o += 16)
    for (int64_t k = 0; k < functions; ++k)
      for (int64_t j = o; j < std::min(o + 16, outputs); ++j) coef[j * stride + k] = from[k * width + j];
}

// The rows of w, and of d_w, that a cell owns: M = order + 1.
template <class T, int M>
PHYLA_INLINE void load_block(const T* from, int64_t width, Vec<T> (&held)[M][kWide]) {
#pragma GCC unroll 8
  for (int64_t m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int64_t j = 0; j < kWide; ++j) held[m][j] = load(from + m * width + j * Lanes<T>::count);
}

// y (rows, width) += the product of each cell.
template <class T, int M>
PHYLA_INLINE void forward_cells(const Sorted<T>& s, int64_t width, const T* w, T* y) {
  constexpr int64_t L = Lanes<T>::count, ld = Sorted<T>::ld;
  for (int64_t c = 0; c < s.cells(); ++c, w += width) {
    for (int64_t o = 0; o < width && s.begin[c] < s.begin[c + 1]; o += kWide * L) {
      Vec<T> held[M][kWide];
      load_block<T, M>(w + o, width, held);
      for (int64_t r = s.begin[c]; r < s.begin[c + 1]; ++r) {
        T* to = y + s.row[r] * width + o;
        Vec<T> first = load(to), second = load(to + L);
#pragma GCC unroll 8
        for (int64_t m = 0; m < M; ++m) {
          const T value = s.values[m * ld + r];
          first += value * held[m][0];
          second += value * held[m][1];
        }
        store<T>(to, first);
        store<T>(to + L, second);
      }
    }
  }
}

// d_w += values^T g of each cell.
template <class T, int M>
PHYLA_INLINE void by_coefficients(const Sorted<T>& s, int64_t c, int64_t width, const T* g, T* d_w) {
  constexpr int64_t L = Lanes<T>::count, ld = Sorted<T>::ld;
  for (int64_t o = 0; o < width; o += kWide * L) {
    Vec<T> held[M][kWide];
    load_block<T, M>(d_w + o, width, held);
    for (int64_t r = s.begin[c]; r < s.begin[c + 1]; ++r) {
      const T* from = g + s.row[r] * width + o;
      const Vec<T> first = load(from), second = load(from + L);
#pragma GCC unroll 8
      for (int64_t m = 0; m < M; ++m) {
        const T value = s.values[m * ld + r];
        held[m][0] += value * first;
        held[m][1] += value * second;
      }
    }
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m) {
      store<T>(d_w + o + m * width, held[m][0]);
      store<T>(d_w + o + m * width + L, held[m][1]);
    }
  }
}

// d_x = sum_m slope_m (w_m . g), for two rows of a cell at a time.
template <class T, int M>
PHYLA_INLINE void by_points(const Sorted<T>& s, int64_t c, int64_t width, const T* w, const T* g, T* d_x, int64_t stride) {
  constexpr int64_t L = Lanes<T>::count, ld = Sorted<T>::ld;
  for (int64_t r = s.begin[c]; r < s.begin[c + 1]; r += 2) {
    const int64_t other = std::min(r + 1, s.begin[c + 1] - 1);
    const T *first = g + s.row[r] * width, *second = g + s.row[other] * width;
    Vec<T> dot[M][2] = {};
    for (int64_t o = 0; o < width; o += L) {
      const Vec<T> a = load(first + o), b = load(second + o);
#pragma GCC unroll 8
      for (int64_t m = 0; m < M; ++m) {
        const Vec<T> wm = load(w + m * width + o);
        dot[m][0] += wm * a;
        dot[m][1] += wm * b;
      }
    }
    Vec<T> a{}, b{};
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m) {
      a += s.slopes[m * ld + r] * dot[m][0];
      b += s.slopes[m * ld + other] * dot[m][1];
    }
    T sums[2] = {0, 0};
    for (int64_t l = 0; l < L; ++l) {
      sums[0] += a[l];
      sums[1] += b[l];
    }
    d_x[s.row[r] * stride] = sums[0];
    d_x[s.row[other] * stride] = sums[1];
  }
}

template <class T, int M>
PHYLA_INLINE void backward_cells(const Sorted<T>& s, int64_t width, const T* w, const T* g, T* d_w, T* d_x, int64_t stride) {
  for (int64_t c = 0; c < s.cells(); ++c) {
    if (d_x) by_points<T, M>(s, c, width, w + c * width, g, d_x, stride);
    if (d_w && s.begin[c] < s.begin[c + 1]) by_coefficients<T, M>(s, c, width, g, d_w + c * width);
  }
}

template <class Fn>
PHYLA_INLINE void with_functions(int64_t order, const Fn& fn) {
  static_assert(kLocalOrder == 4);
  switch (order) {
    case 1: return fn(std::integral_constant<int, 2>());
    case 2: return fn(std::integral_constant<int, 3>());
    case 3: return fn(std::integral_constant<int, 4>());
    default: return fn(std::integral_constant<int, 5>());
  }
}

#define KAN_LOCAL(T)                                                                                                                        \
  KAN_CLONES void sorted(const BasisArguments<T>& a, int64_t input, int64_t rows, const T* x, int64_t stride, Sorted<T>& s) {               \
    sort_rows(a, input, rows, x, stride, s);                                                                                                \
  }                                                                                                                                         \
  KAN_CLONES void forward_input(const Sorted<T>& s, int64_t order, int64_t width, const T* w, T* y) {                                       \
    with_functions(order, [&](auto m) __attribute__((always_inline)) { forward_cells<T, m>(s, width, w, y); });                             \
  }                                                                                                                                         \
  KAN_CLONES void backward_input(const Sorted<T>& s, int64_t order, int64_t width, const T* w, const T* g, T* d_w, T* d_x, int64_t stride) { \
    with_functions(order, [&](auto m) __attribute__((always_inline)) { backward_cells<T, m>(s, width, w, g, d_w, d_x, stride); });          \
  }
KAN_LOCAL(float)
KAN_LOCAL(double)
#undef KAN_LOCAL

}  // namespace

template <class T>
void local_forward(const BasisArguments<T>& a, const LocalShape& n, const T* x, const T* coef, T* y) {
  const int64_t order = a.ints[0], blocks = (n.outputs + kOutputs - 1) / kOutputs;
  std::vector<Sorted<T>> sorted_inputs(std::min(kInputs, n.inputs));
  std::vector<T> tile(blocks * kOutputs * std::min(kRows, n.rows));  // (blocks, rows, kOutputs)
  for (int64_t row = 0; row < n.rows; row += kRows) {
    const int64_t rows = std::min(kRows, n.rows - row);
    std::fill(tile.begin(), tile.end(), T(0));
    for (int64_t input = 0; input < n.inputs; input += kInputs) {
      const int64_t inputs = std::min(kInputs, n.inputs - input);
      phyla::parallel_units(inputs, [&](int64_t i) { sorted(a, input + i, rows, x + row * n.inputs + input + i, n.inputs, sorted_inputs[i]); });
      phyla::parallel_units(blocks, [&](int64_t block) {
        const int64_t begin = block * kOutputs, outputs = std::min(kOutputs, n.outputs - begin), width = whole_vectors(outputs);
        std::vector<T> w((a.count + 2 * order) * width);
        for (int64_t i = 0; i < inputs; ++i) {
          load_coefficients(coef + (begin * n.inputs + input + i) * a.count, n.inputs * a.count, a.count, order, outputs, width, w.data());
          forward_input(sorted_inputs[i], order, width, w.data(), tile.data() + begin * rows);
        }
      });
    }
    phyla::parallel_units(blocks, [&](int64_t block) {
      const int64_t begin = block * kOutputs, outputs = std::min(kOutputs, n.outputs - begin), width = whole_vectors(outputs);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(tile.data() + begin * rows + r * width, outputs, y + (row + r) * n.outputs + begin);
    });
  }
}

template <class T>
void local_backward(const BasisArguments<T>& a, const LocalShape& n, const T* x, const T* coef, const T* g, T* d_coef, T* d_x) {
  const int64_t order = a.ints[0], width = whole_vectors(n.outputs), size = (a.count + 2 * order) * width;
  std::vector<T> padded;
  if (width != n.outputs) {
    padded.assign(n.rows * width, T(0));
    for (int64_t r = 0; r < n.rows; ++r) std::copy_n(g + r * n.outputs, n.outputs, padded.data() + r * width);
    g = padded.data();
  }
  // A thread owns an input: nothing is summed across threads.
  phyla::parallel_for(0, n.inputs, 1, [&](int64_t begin, int64_t end) {
    Sorted<T> s;
    std::vector<T> w(d_x ? size : 0), d_w(d_coef ? size : 0);
    for (int64_t i = begin; i < end; ++i) {
      if (d_x) load_coefficients(coef + i * a.count, n.inputs * a.count, a.count, order, n.outputs, width, w.data());
      std::fill(d_w.begin(), d_w.end(), T(0));
      for (int64_t row = 0; row < n.rows; row += kRows) {
        const int64_t rows = std::min(kRows, n.rows - row);
        sorted(a, i, rows, x + row * n.inputs + i, n.inputs, s);
        for (int64_t r = 0; d_x && r < rows; ++r)
          if (s.cell[r] < 0) d_x[(row + r) * n.inputs + i] = T(0);
        backward_input(s, order, width, w.data(), g + row * width, d_coef ? d_w.data() : nullptr, d_x ? d_x + row * n.inputs + i : nullptr, n.inputs);
      }
      if (d_coef) store_coefficients(d_w.data() + order * width, width, a.count, n.outputs, d_coef + i * a.count, n.inputs * a.count);
    }
  });
}

template void local_forward(const BasisArguments<float>&, const LocalShape&, const float*, const float*, float*);
template void local_forward(const BasisArguments<double>&, const LocalShape&, const double*, const double*, double*);
template void local_backward(const BasisArguments<float>&, const LocalShape&, const float*, const float*, const float*, float*, float*);
template void local_backward(const BasisArguments<double>&, const LocalShape&, const double*, const double*, const double*, double*, double*);

}  // namespace kan

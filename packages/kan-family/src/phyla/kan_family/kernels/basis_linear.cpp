// y_o = sum_ik c_oik B_k(x_i) + sum_i w_oi b(x_i): tiles of basis values that stay in L2, and a GEMM each.
#include "bspline_local.h"

namespace kan {
namespace {

// Rows of a tile, and inputs of a block: a tile of values takes about 128 KiB.
constexpr int64_t kRows = 128;
int64_t block_inputs(int64_t inputs, int64_t functions) {
  return std::clamp<int64_t>(256 / functions, 1, std::max<int64_t>(1, (inputs + 7) / 8));
}
// Sorting by cells pays where few of the functions are not zero.
bool is_local(const std::string& kind, const std::vector<int64_t>& ints, int64_t functions, int64_t outputs) {
  return kind == "bspline" && ints[0] <= kLocalOrder && 2 * functions > 5 * (ints[0] + 1) && outputs >= 8;
}

// to (cols, ld) = from (rows, cols; row stride stride)^T; columns beyond `rows` up to whole vectors are zero.
template <class T>
void transpose(const T* from, int64_t rows, int64_t cols, int64_t stride, T* to, int64_t ld) {
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) to[c * ld + r] = from[r * stride + c];
    for (int64_t r = rows; r < whole_vectors(rows); ++r) to[c * ld + r] = T(0);
  }
}

template <class T>
struct Problem {
  int64_t rows, inputs, outputs, functions;
  bool has_base, local;
  int64_t block;
  Tensor x, coef, base_weight;
  Activation base;
  BasisArguments<T> basis;

  Problem(const Tensor& x, const Tensor& coef, const std::optional<Tensor>& base_weight, const std::optional<Tensor>& first,
          const std::optional<Tensor>& second, const std::string& kind, const std::string& base, const std::vector<int64_t>& ints,
          const std::vector<double>& floats)
      : rows(x.size(0)), inputs(x.size(1)), outputs(coef.size(0)), functions(coef.size(2)), has_base(base_weight.has_value()),
        local(is_local(kind, ints, functions, outputs)), block(block_inputs(inputs, local ? 1 : functions)), x(phyla::dense(x)),
        coef(phyla::dense(coef)), base_weight(base_weight ? phyla::dense(*base_weight) : Tensor()), base(activation_of(base)),
        basis(basis_arguments<T>(kind, ints, floats, first, second)) {}

  int64_t blocks() const { return (inputs + block - 1) / block; }
  const T* x_at(int64_t row, int64_t input) const { return phyla::data<T>(x) + row * inputs + input; }
  const T* coef_at(int64_t input) const { return phyla::data<T>(coef) + input * functions; }
};

template <class T>
Tensor forward(const Problem<T>& p) {
  Tensor y = phyla::zeros<T>({p.rows, p.outputs});
  if (p.inputs == 0 || p.outputs == 0) return y;
  if (p.local) local_forward(p.basis, {p.rows, p.inputs, p.outputs}, phyla::data<T>(p.x), phyla::data<T>(p.coef), phyla::mutable_data<T>(y));
  if (p.local && !p.has_base) return y;
  phyla::parallel_units((p.rows + kRows - 1) / kRows, [&](int64_t unit) {
    const int64_t row = unit * kRows, rows = std::min(kRows, p.rows - row);
    std::vector<T> x(p.block * kRows), phi(p.block * (p.local ? 1 : p.functions) * kRows);
    T* out = phyla::mutable_data<T>(y) + row * p.outputs;
    for (int64_t i = 0; i < p.inputs; i += p.block) {
      const int64_t n = std::min(p.block, p.inputs - i);
      transpose(p.x_at(row, i), rows, n, p.inputs, x.data(), kRows);
      if (!p.local) {
        evaluate(p.basis, i, n, whole_vectors(rows), x.data(), phi.data(), kRows);
        phyla::gemm<T>(out, p.outputs, phi.data(), kRows, true, p.coef_at(i), p.inputs * p.functions, true, rows, p.outputs, n * p.functions, T(1));
      }
      if (!p.has_base) continue;
      activation(p.base, n * kRows, x.data(), phi.data(), nullptr);
      phyla::gemm<T>(out, p.outputs, phi.data(), kRows, true, phyla::data<T>(p.base_weight) + i, p.inputs, true, rows, p.outputs, n, T(1));
    }
  });
  return y;
}

template <class T>
struct Gradients {
  Tensor x, coef, base_weight;
  std::vector<double> first, second;  // (I, K)
};

template <class T>
Gradients<T> backward(const Problem<T>& p, const Tensor& grad, int64_t needs) {
  const bool need_x = needs & 1, need_coef = needs & 2, need_base = needs & 4, need_first = needs & 8, need_second = needs & 16;
  const bool need_t = need_x || need_first || need_second;
  Gradients<T> d;
  d.x = need_x ? phyla::zeros<T>({p.rows, p.inputs}) : phyla::unwanted<T>();
  d.coef = need_coef ? phyla::zeros<T>({p.outputs, p.inputs, p.functions}) : phyla::unwanted<T>();
  d.base_weight = need_base ? phyla::zeros<T>({p.outputs, p.inputs}) : phyla::unwanted<T>();
  d.first.assign(need_first ? p.inputs * p.functions : 0, 0.0);
  d.second.assign(need_second ? p.inputs * p.functions : 0, 0.0);
  if (p.rows == 0 || p.outputs == 0 || p.inputs == 0) return d;
  const T* g = phyla::data<T>(grad);
  T *d_coef = need_coef ? phyla::mutable_data<T>(d.coef) : nullptr, *d_base = need_base ? phyla::mutable_data<T>(d.base_weight) : nullptr;
  T* d_x = need_x ? phyla::mutable_data<T>(d.x) : nullptr;
  if (p.local) local_backward(p.basis, {p.rows, p.inputs, p.outputs}, phyla::data<T>(p.x), phyla::data<T>(p.coef), g, d_coef, d_x);
  if (p.local && !p.has_base) return d;

  // A thread owns the inputs of a block: nothing is summed across threads.
  phyla::parallel_units(p.blocks(), [&](int64_t unit) {
    const int64_t i = unit * p.block, n = std::min(p.block, p.inputs - i), width = n * p.functions;
    std::vector<T> x(p.block * kRows), tile(p.block * (p.local ? 1 : p.functions) * kRows), dx(p.block * kRows), slope(p.has_base ? p.block * kRows : 0);
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const int64_t rows = std::min(kRows, p.rows - row), padded = whole_vectors(rows);
      const T* g_tile = g + row * p.outputs;
      transpose(p.x_at(row, i), rows, n, p.inputs, x.data(), kRows);
      if (need_coef && !p.local) {
        evaluate(p.basis, i, n, padded, x.data(), tile.data(), kRows);
        phyla::gemm<T>(d_coef + i * p.functions, p.inputs * p.functions, g_tile, p.outputs, true, tile.data(), kRows, true, p.outputs, width, rows,
                       T(row > 0));
      }
      if (p.has_base && (need_base || need_x)) activation(p.base, n * kRows, x.data(), tile.data(), slope.data());
      if (need_base)
        phyla::gemm<T>(d_base + i, p.inputs, g_tile, p.outputs, true, tile.data(), kRows, true, p.outputs, n, rows, T(row > 0));
      if (need_t && !p.local) {
        phyla::gemm<T>(tile.data(), kRows, p.coef_at(i), p.inputs * p.functions, true, g_tile, p.outputs, true, width, rows, p.outputs);
        for (int64_t c = 0; c < width; ++c) std::fill(tile.data() + c * kRows + rows, tile.data() + c * kRows + padded, T(0));
        pullback(p.basis, i, n, padded, x.data(), tile.data(), dx.data(), kRows, need_first ? d.first.data() + i * p.functions : nullptr,
                 need_second ? d.second.data() + i * p.functions : nullptr);
      }
      if (!need_x) continue;
      if (p.local) std::fill(dx.begin(), dx.end(), T(0));
      if (p.has_base) {
        phyla::gemm<T>(tile.data(), kRows, phyla::data<T>(p.base_weight) + i, p.inputs, true, g_tile, p.outputs, true, n, rows, p.outputs);
        for (int64_t c = 0; c < n; ++c)
          for (int64_t r = 0; r < rows; ++r) dx[c * kRows + r] += tile[c * kRows + r] * slope[c * kRows + r];
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < n; ++c) d_x[(row + r) * p.inputs + i + c] += dx[c * kRows + r];
    }
  });
  return d;
}

Tensor basis_linear(const Tensor& x, const Tensor& coef, const std::optional<Tensor>& base_weight, const std::optional<Tensor>& first,
                    const std::optional<Tensor>& second, const std::string& kind, const std::string& base, const std::vector<int64_t>& ints,
                    const std::vector<double>& floats) {
  return phyla::dispatch(x, [&](auto zero) {
    using scalar = decltype(zero);
    return forward(Problem<scalar>(x, coef, base_weight, first, second, kind, base, ints, floats));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> basis_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& coef,
                                                                         const std::optional<Tensor>& base_weight,
                                                                         const std::optional<Tensor>& first, const std::optional<Tensor>& second,
                                                                         const std::string& kind, const std::string& base,
                                                                         const std::vector<int64_t>& ints, const std::vector<double>& floats,
                                                                         int64_t needs) {
  needs &= 3 | (base_weight ? 4 : 0) | (first ? 8 : 0) | (second ? 16 : 0);
  return phyla::dispatch(x, [&](auto zero) {
    using scalar = decltype(zero);
    const Gradients<scalar> d = backward(Problem<scalar>(x, coef, base_weight, first, second, kind, base, ints, floats), phyla::dense(grad), needs);
    const int64_t functions = coef.size(2);
    return std::make_tuple(d.x, d.coef, d.base_weight, parameter_gradient<scalar>(first, d.first, functions),
                           parameter_gradient<scalar>(second, d.second, functions));
  });
}

}  // namespace
}  // namespace kan

STABLE_TORCH_LIBRARY_IMPL(phyla_kan_family, CPU, m) {
  m.impl("basis_linear", TORCH_BOX(&kan::basis_linear));
  m.impl("basis_linear_backward", TORCH_BOX(&kan::basis_linear_backward));
}

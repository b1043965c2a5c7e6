// What every native kernel of phyla starts from: torch's stable ABI, SIMD clones, deterministic parallel loops, dtype dispatch and GEMM.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

// One function, compiled for AVX-512, AVX2 and baseline, chosen when the library is loaded. Put it before functions that hold a hot loop.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && !defined(PHYLA_NO_CLONES)
#define PHYLA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PHYLA_CLONES
#endif
// Put it before the helpers that such a function calls: only inlined code is compiled for the clone's instruction set.
#define PHYLA_INLINE inline __attribute__((always_inline))

namespace phyla {

using torch::stable::Tensor;

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class scalar>
constexpr torch::headeronly::ScalarType dtype_of() {
  static_assert(std::is_same_v<scalar, float> || std::is_same_v<scalar, double>);
  return std::is_same_v<scalar, float> ? torch::headeronly::ScalarType::Float : torch::headeronly::ScalarType::Double;
}

template <class scalar>
const scalar* data(const Tensor& t) { return static_cast<const scalar*>(t.const_data_ptr()); }
template <class scalar>
scalar* mutable_data(const Tensor& t) { return static_cast<scalar*>(t.mutable_data_ptr()); }

template <class scalar>
Tensor empty(const std::vector<int64_t>& sizes) {
  // Straight to the allocator: torch::stable::empty looks its op up by name, which takes longer than a small kernel.
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  const int32_t dtype = std::is_same_v<scalar, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
template <class scalar>
Tensor zeros(const std::vector<int64_t>& sizes) {
  Tensor t = empty<scalar>(sizes);
  std::fill_n(mutable_data<scalar>(t), t.numel(), scalar(0));
  return t;
}
// The value of a gradient that `needs` did not ask for.
template <class scalar>
Tensor unwanted() { return empty<scalar>({0}); }
inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// fn(scalar()) with scalar = float or double, after the dtype of t.
template <class Fn>
auto dispatch(const Tensor& t, Fn&& fn) {
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Float || type == torch::headeronly::ScalarType::Double,
                  "phyla: expected a float32 or float64 tensor");
  return type == torch::headeronly::ScalarType::Float ? fn(float()) : fn(double());
}

// fn(unit) for unit = 0..units-1 on torch's thread pool. What a unit computes must not depend on which thread runs it: results are then the
// same for any number of threads.
template <class Fn>
void parallel_units(int64_t units, const Fn& fn, int64_t grain = 1) {
  if (units <= 0) return;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) fn(unit);
  });
}
// fn(begin, end) over ranges of at least `grain`; for loops whose iterations are independent.
template <class Fn>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Fn& fn) {
  if (begin < end) torch::stable::parallel_for(begin, end, grain, fn);
}

// A strided matrix over memory that outlives the call.
template <class scalar>
Tensor matrix(const scalar* values, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride = 1) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
  return torch::stable::from_blob(const_cast<scalar*>(values), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype_of<scalar>());
}

// c (m, n; row stride ldc) = beta c + op(a) op(b), with op(a) (m, k) and op(b) (k, n); a and b are row-major with row strides lda, ldb of what
// is stored. Serial inside parallel_for / parallel_units.
template <class scalar>
void gemm(scalar* c, int64_t ldc, const scalar* a, int64_t lda, bool transpose_a, const scalar* b, int64_t ldb, bool transpose_b, int64_t m,
          int64_t n, int64_t k, scalar beta = 0) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = beta == scalar(0) ? scalar(0) : beta * c[i * ldc + j];
    return;
  }
  const Tensor out = matrix(c, m, n, ldc);
  const Tensor left = transpose_a ? matrix(a, m, k, 1, lda) : matrix(a, m, k, lda);
  const Tensor right = transpose_b ? matrix(b, k, n, 1, ldb) : matrix(b, k, n, ldb);
  if (beta == scalar(0)) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), double(beta), 1.0));
  }
}

}  // namespace phyla

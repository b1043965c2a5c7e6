// y = w x^3 elementwise with one scalar w: the smallest kernel with an elementwise and a summed gradient. Used by the tests of the core.
#include <phyla/kernel.h>

namespace {
using phyla::Tensor;
constexpr int64_t kChunk = 1024;

template <class scalar>
PHYLA_CLONES void forward(const scalar* x, scalar w, scalar* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = w * x[i] * x[i] * x[i];
}

template <class scalar>
PHYLA_CLONES double backward(const scalar* g, const scalar* x, scalar w, scalar* dx, int64_t n) {
  double dw = 0;
#pragma omp simd reduction(+ : dw)
  for (int64_t i = 0; i < n; ++i) {
    dx[i] = 3 * w * x[i] * x[i] * g[i];
    dw += double(g[i] * x[i] * x[i] * x[i]);
  }
  return dw;
}

int64_t chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

Tensor cubic(const Tensor& x_, const Tensor& w) {
  const Tensor x = phyla::dense(x_);
  return phyla::dispatch(x, [&](auto zero) {
    using scalar = decltype(zero);
    Tensor y = phyla::empty<scalar>(phyla::sizes_of(x));
    const int64_t n = x.numel();
    phyla::parallel_units(chunks(n), [&](int64_t c) {
      const int64_t at = c * kChunk;
      forward(phyla::data<scalar>(x) + at, *phyla::data<scalar>(w), phyla::mutable_data<scalar>(y) + at, std::min(kChunk, n - at));
    });
    return y;
  });
}

std::tuple<Tensor, Tensor> cubic_backward(const Tensor& grad_, const Tensor& x_, const Tensor& w, int64_t needs) {
  const Tensor grad = phyla::dense(grad_), x = phyla::dense(x_);
  return phyla::dispatch(x, [&](auto zero) {
    using scalar = decltype(zero);
    const int64_t n = x.numel();
    Tensor dx = phyla::empty<scalar>(phyla::sizes_of(x)), dw = phyla::empty<scalar>({});
    std::vector<double> partial(chunks(n));
    phyla::parallel_units(chunks(n), [&](int64_t c) {
      const int64_t at = c * kChunk;
      partial[c] = backward(phyla::data<scalar>(grad) + at, phyla::data<scalar>(x) + at, *phyla::data<scalar>(w),
                            phyla::mutable_data<scalar>(dx) + at, std::min(kChunk, n - at));
    });
    double sum = 0;
    for (double p : partial) sum += p;
    *phyla::mutable_data<scalar>(dw) = scalar(sum);
    return std::tuple(needs & 1 ? dx : phyla::unwanted<scalar>(), needs & 2 ? dw : phyla::unwanted<scalar>());
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phyla_selftest, CPU, m) {
  m.impl("cubic", TORCH_BOX(&cubic));
  m.impl("cubic_backward", TORCH_BOX(&cubic_backward));
}

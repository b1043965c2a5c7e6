// Hidden units of learned attention with a Fourier basis: Phi (B, h, n, r) from queries and keys, without scores or basis values in memory.
//
// As in flash attention, a tile of scores (query rows x key columns) is computed by GEMM, turned into basis values in scratch and contracted
// with the coefficients into r accumulators of each row; nothing has to be rescaled, since no row is normalised. A tile of basis values is
// (rows, planes, keys): cos A .. cos GA, sin A .. sin GA and, with a base function, b(A) with coefficients 1. Backward computes the tiles again.
//
// The coefficients of a head are packed once as (key tile, r, plane, key); GEMMs have r rows, since r columns are slow in BLAS libraries.
// Backward runs over (head, batch piece) units with fixed pieces; the pieces of the coefficient gradient are added in order: the same result
// for any number of threads.
#include <phyla/kernel.h>

#include <memory>

#include "fourier.h"

namespace {

using phyla::Tensor;

constexpr int64_t kKeys = 256;             // key columns of a tile, at most
constexpr int64_t kTileBytes = 192 << 10;  // of basis values, about: values and their gradients stay in the L2 cache
constexpr int64_t kUnits = 32;             // backward units, about, so that the partial coefficient gradients stay few

enum class Base { none, identity, silu, gelu };

// A matrix for each batch entry and head; rows may be strided, their entries are contiguous.
template <class scalar>
struct Heads {
  const scalar* values;
  int64_t batch, head, row;

  explicit Heads(const Tensor& t) : values(phyla::data<scalar>(t)), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)) {}
  const scalar* at(int64_t b, int64_t h, int64_t n) const { return values + b * batch + h * head + n * row; }
};

template <class scalar>
struct Job {
  int64_t batches, heads, queries, keys, width, rank, frequencies, planes, rows;
  scalar scale;
  Base base;
  const bool* padding;  // (B, N) or null
  std::vector<scalar> packed;

  int64_t packed_size() const { return planes * keys * rank; }
  const bool* padding_of(int64_t b, int64_t key) const { return padding ? padding + b * keys + key : nullptr; }
};

template <class scalar>
scalar base_value(Base base, scalar x) {
  if (base == Base::identity) return x;
  if (base == Base::silu) return x / (1 + std::exp(-x));
  return x * scalar(0.5) * std::erfc(-x * scalar(0.70710678118654752440));
}

template <class scalar>
scalar base_slope(Base base, scalar x) {
  if (base == Base::identity) return 1;
  if (base == Base::silu) {
    const scalar s = 1 / (1 + std::exp(-x));
    return s * (1 + x * (1 - s));
  }
  return scalar(0.5) * std::erfc(-x * scalar(0.70710678118654752440)) + x * scalar(0.39894228040143267794) * std::exp(scalar(-0.5) * x * x);
}

// Scores a (count) become scaled scores; values (planes, count) their basis values, 0 at padded keys.
template <class scalar>
PHYLA_INLINE void expand_row(const Job<scalar>& job, scalar* a, scalar* values, int64_t count, const bool* padding) {
  const int64_t G = job.frequencies;
  scalar *cos_1 = values, *sin_1 = values + G * count;
  for (int64_t i = 0; i < count; ++i) a[i] *= job.scale;
  phyla::kan::sincos(a, sin_1, cos_1, count);
  if (padding)
    for (int64_t i = 0; i < count; ++i) cos_1[i] = padding[i] ? 0 : cos_1[i], sin_1[i] = padding[i] ? 0 : sin_1[i];
  for (int64_t m = 1; m < G; ++m) {  // (0, 0) stays (0, 0): padded keys drop out of every frequency
    scalar *cos_m = cos_1 + m * count, *sin_m = sin_1 + m * count;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const scalar c = cos_m[i - count], s = sin_m[i - count];
      cos_m[i] = c * cos_1[i] - s * sin_1[i];
      sin_m[i] = s * cos_1[i] + c * sin_1[i];
    }
  }
  if (job.base != Base::none)
    for (int64_t i = 0; i < count; ++i) values[2 * G * count + i] = padding && padding[i] ? 0 : base_value(job.base, a[i]);
}

// a (scaled scores) become gradients of the scores before scaling, from the gradients of the basis values.
template <class scalar>
PHYLA_INLINE void contract_row(const Job<scalar>& job, scalar* a, const scalar* values, const scalar* grads, int64_t count, const bool* padding) {
  const int64_t G = job.frequencies;
  for (int64_t i = 0; i < count; ++i)
    a[i] = job.base == Base::none || (padding && padding[i]) ? 0 : base_slope(job.base, a[i]) * grads[2 * G * count + i];
  for (int64_t m = 0; m < G; ++m) {
    const scalar *cos_m = values + m * count, *sin_m = cos_m + G * count, *dcos = grads + m * count, *dsin = dcos + G * count;
    const scalar frequency = scalar(m + 1);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) a[i] += frequency * (dsin[i] * cos_m[i] - dcos[i] * sin_m[i]);
  }
  for (int64_t i = 0; i < count; ++i) a[i] *= job.scale;
}

#define PHYLA_FOURIER_ROWS(scalar)                                                                                                        \
  PHYLA_CLONES void expand(const Job<scalar>& job, scalar* a, scalar* values, int64_t rows, int64_t count, const bool* padding) {         \
    for (int64_t n = 0; n < rows; ++n) expand_row(job, a + n * count, values + n * job.planes * count, count, padding);                   \
  }                                                                                                                                       \
  PHYLA_CLONES void contract(const Job<scalar>& job, scalar* a, const scalar* values, const scalar* grads, int64_t rows, int64_t count,   \
                             const bool* padding) {                                                                                       \
    for (int64_t n = 0; n < rows; ++n)                                                                                                    \
      contract_row(job, a + n * count, values + n * job.planes * count, grads + n * job.planes * count, count, padding);                  \
  }
PHYLA_FOURIER_ROWS(float)
PHYLA_FOURIER_ROWS(double)

// visit(index among coef, index among packed) for every coefficient of head h.
template <class scalar, class Visit>
void for_packed(const Job<scalar>& job, const Visit& visit) {
  const int64_t functions = 2 * job.frequencies;
  for (int64_t first = 0; first < job.keys; first += kKeys) {
    const int64_t count = std::min(kKeys, job.keys - first);
    for (int64_t m = 0; m < functions; ++m)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t p = 0; p < job.rank; ++p)
          visit((p * job.keys + first + i) * functions + m, (first * job.rank + p * count) * job.planes + m * count + i);
  }
}

template <class scalar>
Job<scalar> plan(const Tensor& q, const Tensor& k, const Tensor& coef, const std::optional<Tensor>& padding, const std::string& base,
                 double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && coef.dim() == 4, "attention_fourier: q, k and coef must have four dimensions");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3) && coef.size(0) == q.size(1) &&
                      coef.size(2) == k.size(2) && coef.size(3) % 2 == 0 && coef.size(3) > 0,
                  "attention_fourier: shapes of q, k and coef do not fit");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && coef.scalar_type() == q.scalar_type(), "attention_fourier: dtypes must agree");
  STD_TORCH_CHECK(!padding || (padding->dim() == 2 && padding->size(0) == q.size(0) && padding->size(1) == k.size(2) &&
                               padding->scalar_type() == torch::headeronly::ScalarType::Bool),
                  "attention_fourier: padding must be bool (batch, keys)");
  Job<scalar> job{};
  job.batches = q.size(0), job.heads = q.size(1), job.queries = q.size(2), job.width = q.size(3);
  job.keys = k.size(2), job.rank = coef.size(1), job.frequencies = coef.size(3) / 2, job.scale = scalar(scale);
  job.base = base == "silu" ? Base::silu : base == "gelu" ? Base::gelu : base == "identity" ? Base::identity : Base::none;
  job.planes = 2 * job.frequencies + (job.base != Base::none);
  job.padding = padding ? static_cast<const bool*>(padding->const_data_ptr()) : nullptr;
  const int64_t most = std::max<int64_t>(4, kTileBytes / (job.planes * std::max<int64_t>(1, std::min(kKeys, job.keys)) * int64_t(sizeof(scalar))));
  const int64_t tiles = std::max<int64_t>(1, (job.queries + most - 1) / most);
  job.rows = std::max<int64_t>(1, (job.queries + tiles - 1) / tiles);
  job.packed.assign(job.heads * job.packed_size(), scalar(1));
  const scalar* from = phyla::data<scalar>(coef);
  const int64_t size = job.rank * job.keys * 2 * job.frequencies;
  for (int64_t h = 0; h < job.heads; ++h)
    for_packed(job, [&](int64_t plain, int64_t packed) { job.packed[h * job.packed_size() + packed] = from[h * size + plain]; });
  return job;
}

template <class scalar>
std::unique_ptr<scalar[]> scratch(int64_t count) { return std::make_unique_for_overwrite<scalar[]>(std::max<int64_t>(1, count)); }

// Row entries contiguous, whatever the other strides.
Tensor rows_dense(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1 ? t : phyla::dense(t); }
std::optional<Tensor> dense(const std::optional<Tensor>& t) { return t ? std::optional(phyla::dense(*t)) : std::nullopt; }

Tensor attention_fourier(const Tensor& q_any, const Tensor& k_any, const Tensor& coef, const std::optional<Tensor>& padding_any, std::string base,
                         double scale) {
  const Tensor q = rows_dense(q_any), k = rows_dense(k_any), coef_dense = phyla::dense(coef);
  const std::optional<Tensor> padding = dense(padding_any);
  return phyla::dispatch(q, [&](auto zero) {
    using scalar = decltype(zero);
    const Job<scalar> job = plan<scalar>(q, k, coef_dense, padding, base, scale);
    Tensor hidden = phyla::zeros<scalar>({job.batches, job.heads, job.queries, job.rank});
    const Heads<scalar> Q(q), K(k);
    scalar* out = phyla::mutable_data<scalar>(hidden);
    const int64_t tiles = (job.queries + job.rows - 1) / job.rows, most = std::min(kKeys, job.keys);
    phyla::parallel_for(0, job.batches * job.heads * tiles, 1, [&](int64_t begin, int64_t end) {
      const auto scores = scratch<scalar>(job.rows * most), values = scratch<scalar>(job.rows * most * job.planes);
      const auto phi = scratch<scalar>(job.rank * job.rows);  // (r, rows)
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t pair = unit / tiles, b = pair / job.heads, h = pair % job.heads, row = unit % tiles * job.rows;
        const int64_t rows = std::min(job.rows, job.queries - row);
        for (int64_t key = 0; key < job.keys; key += kKeys) {
          const int64_t count = std::min(kKeys, job.keys - key), all = job.planes * count;
          phyla::gemm(scores.get(), count, Q.at(b, h, row), Q.row, false, K.at(b, h, key), K.row, true, rows, count, job.width);
          expand(job, scores.get(), values.get(), rows, count, job.padding_of(b, key));
          phyla::gemm(phi.get(), rows, job.packed.data() + h * job.packed_size() + key * job.planes * job.rank, all, false, values.get(), all, true,
                      job.rank, rows, all, scalar(key > 0));
        }
        scalar* to = out + (pair * job.queries + row) * job.rank;
        for (int64_t n = 0; n < (job.keys > 0 ? rows : 0); ++n)
          for (int64_t p = 0; p < job.rank; ++p) to[n * job.rank + p] = phi[p * rows + n];
      }
    });
    return hidden;
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_fourier_backward(const Tensor& grad_any, const Tensor& q_any, const Tensor& k_any, const Tensor& coef,
                                                              const std::optional<Tensor>& padding_any, std::string base, double scale,
                                                              int64_t needs) {
  const Tensor q = rows_dense(q_any), k = rows_dense(k_any), coef_dense = phyla::dense(coef), grad = phyla::dense(grad_any);
  const std::optional<Tensor> padding = dense(padding_any);
  return phyla::dispatch(q, [&](auto zero) {
    using scalar = decltype(zero);
    const Job<scalar> job = plan<scalar>(q, k, coef_dense, padding, base, scale);
    STD_TORCH_CHECK((phyla::sizes_of(grad) == std::vector<int64_t>{job.batches, job.heads, job.queries, job.rank}) &&
                        grad.scalar_type() == q.scalar_type(),
                    "attention_fourier_backward: grad must be (batch, heads, queries, rank) of the dtype of q");
    Tensor dq = needs & 1 ? phyla::zeros<scalar>(phyla::sizes_of(q)) : phyla::unwanted<scalar>();
    Tensor dk = needs & 2 ? phyla::zeros<scalar>(phyla::sizes_of(k)) : phyla::unwanted<scalar>();
    Tensor dcoef = needs & 4 ? phyla::zeros<scalar>(phyla::sizes_of(coef)) : phyla::unwanted<scalar>();
    const Heads<scalar> Q(q), K(k);
    const scalar* g = phyla::data<scalar>(grad);
    scalar *to_q = needs & 1 ? phyla::mutable_data<scalar>(dq) : nullptr, *to_k = needs & 2 ? phyla::mutable_data<scalar>(dk) : nullptr;
    const int64_t pieces = std::max<int64_t>(1, std::min(job.batches, kUnits / std::max<int64_t>(1, job.heads)));
    const int64_t most = std::min(kKeys, job.keys), size = job.packed_size();
    std::vector<scalar> partial(needs & 4 ? job.heads * pieces * size : 0);
    phyla::parallel_for(0, job.heads * pieces, 1, [&](int64_t begin, int64_t end) {
      const auto scores = scratch<scalar>(job.rows * most), values = scratch<scalar>(job.rows * most * job.planes);
      const auto slopes = scratch<scalar>(needs & 3 ? job.rows * most * job.planes : 0);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t h = unit / pieces, piece = unit % pieces;
        for (int64_t b = piece * job.batches / pieces; b < (piece + 1) * job.batches / pieces; ++b) {
          const int64_t pair = b * job.heads + h;
          for (int64_t row = 0; row < job.queries; row += job.rows) {
            const int64_t rows = std::min(job.rows, job.queries - row);
            const scalar* g_rows = g + (pair * job.queries + row) * job.rank;
            for (int64_t key = 0; key < job.keys; key += kKeys) {
              const int64_t count = std::min(kKeys, job.keys - key), all = job.planes * count, at = key * job.planes * job.rank;
              phyla::gemm(scores.get(), count, Q.at(b, h, row), Q.row, false, K.at(b, h, key), K.row, true, rows, count, job.width);
              expand(job, scores.get(), values.get(), rows, count, job.padding_of(b, key));
              if (needs & 4)
                phyla::gemm(partial.data() + unit * size + at, all, g_rows, job.rank, true, values.get(), all, false, job.rank, all, rows,
                            scalar(1));
              if (!(needs & 3)) continue;
              phyla::gemm(slopes.get(), all, g_rows, job.rank, false, job.packed.data() + h * size + at, all, false, rows, all, job.rank);
              contract(job, scores.get(), values.get(), slopes.get(), rows, count, job.padding_of(b, key));
              if (to_q)
                phyla::gemm(to_q + (pair * job.queries + row) * job.width, job.width, scores.get(), count, false, K.at(b, h, key), K.row, false,
                            rows, job.width, count, scalar(1));
              if (to_k)
                phyla::gemm(to_k + (pair * job.keys + key) * job.width, job.width, scores.get(), count, true, Q.at(b, h, row), Q.row, false,
                            count, job.width, rows, scalar(1));
            }
          }
        }
      }
    });
    if (needs & 4) {
      scalar* to = phyla::mutable_data<scalar>(dcoef);
      for (int64_t h = 0; h < job.heads; ++h)
        for_packed(job, [&](int64_t plain, int64_t packed) {
          double total = 0;
          for (int64_t piece = 0; piece < pieces; ++piece) total += partial[(h * pieces + piece) * size + packed];
          to[h * job.rank * job.keys * 2 * job.frequencies + plain] = scalar(total);
        });
    }
    return std::tuple(dq, dk, dcoef);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phyla_kan_family, CPU, m) {
  m.impl("attention_fourier", TORCH_BOX(&attention_fourier));
  m.impl("attention_fourier_backward", TORCH_BOX(&attention_fourier_backward));
}

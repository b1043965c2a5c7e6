// Group-rational activation: one pass over x forward, one pass over (grad, x) backward.
//
// A group is a run of consecutive channels, so with x seen as (rows, groups, span), whatever the channel dimension, every (row, group) block is
// contiguous and has one set of coefficients. Blocks are cut into pieces, pieces are gathered into units of fixed size; the coefficient gradients
// of a unit are summed in float vectors, units are added in float64 in their order: the same result for any number of threads.
#include <phyla/kernel.h>

#include <cstring>


namespace {

using phyla::Tensor;

template <class scalar>
struct Simd {
  typedef scalar vec __attribute__((vector_size(32)));
  static constexpr int64_t width = 32 / sizeof(scalar);
};
template <class scalar>
using Vec = typename Simd<scalar>::vec;
// A vector as an element of containers, which allocate by the alignment of a class but not by that of a vector type.
template <class scalar>
struct alignas(32) Lanes {
  Vec<scalar> v;
};

constexpr int64_t kPiece = 4096;  // elements of a piece, at most
constexpr int64_t kUnit = 16384;  // elements of a unit, about

// The degrees (5, 4) as constants, any others as numbers.
struct Common {
  static constexpr int m = 5, n = 4;
};
struct Any {
  int m, n;
};

template <class scalar>
struct Job {
  const scalar *x, *grad;
  scalar *y, *dx;
  int64_t groups, span, piece, pieces, pieces_per_unit, total;
  int m, n;
  bool abs_sum;
  std::vector<scalar> coef;  // (groups, m + 1 + n + 1): a_0..a_m, b_0..b_n; for sum_abs b_0 = 1 and |b_i|, for abs_sum b_0 = 0
  double* partial;           // (units, groups, m + 1 + n), null if no coefficient gradient is wanted

  int64_t units() const { return (total + pieces_per_unit - 1) / pieces_per_unit; }
};

template <class V>
PHYLA_INLINE V absolute(const V& x) { return x < 0 ? -x : x; }
template <class V>
PHYLA_INLINE V sign(const V& x) { return x > 0 ? V{} + 1 : (x < 0 ? V{} - 1 : V{}); }

template <class scalar>
PHYLA_INLINE Vec<scalar> load(const scalar* from, int64_t count) {
  Vec<scalar> v{};
  if (count >= Simd<scalar>::width)
    std::memcpy(&v, from, sizeof v);
  else
    for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}
template <class scalar>
PHYLA_INLINE void store(scalar* to, const Vec<scalar>& v, int64_t count) {
  if (count >= Simd<scalar>::width)
    std::memcpy(to, &v, sizeof v);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

// body(at, count) for every vector of a piece; count is the constant width but for the tail.
template <class scalar, class Body>
PHYLA_INLINE void each_vector(int64_t size, const Body& body) {
  constexpr int64_t width = Simd<scalar>::width;
  const int64_t whole = size - size % width;
  for (int64_t at = 0; at < whole; at += width) body(at, width);
  if (whole < size) body(whole, size - whole);
}

template <bool abs_sum, class scalar, class Degree>
PHYLA_INLINE void forward_piece(const scalar* x, scalar* y, int64_t size, const scalar* a, Degree degree) {
  using V = Vec<scalar>;
  const scalar* b = a + degree.m + 1;
  each_vector<scalar>(size, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    const V X = load(x + at, count), U = abs_sum ? X : absolute(X);
    V P = V{} + a[degree.m], A = V{} + b[degree.n];
#pragma GCC unroll 8
    for (int i = degree.m - 1; i >= 0; --i) P = P * X + a[i];
#pragma GCC unroll 8
    for (int i = degree.n - 1; i >= 0; --i) A = A * U + b[i];
    store(y + at, P / (abs_sum ? absolute(A) + 1 : A), count);
  });
}

// sums (m + 1 + n) receives w x^i and -w y u^i [sign A], the gradients of a_i and of |b_i| (of b_i for abs_sum).
template <bool abs_sum, bool want_sums, class scalar, class Degree>
PHYLA_INLINE void backward_piece(const scalar* grad, const scalar* x, scalar* dx, int64_t size, const scalar* a, Lanes<scalar>* sums, Degree degree) {
  using V = Vec<scalar>;
  const scalar* b = a + degree.m + 1;
  each_vector<scalar>(size, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    const V X = load(x + at, count), U = abs_sum ? X : absolute(X);
    V P = V{} + a[degree.m], dP{}, A = V{} + b[degree.n], dA{};
#pragma GCC unroll 8
    for (int i = degree.m - 1; i >= 0; --i) {
      dP = dP * X + P;
      P = P * X + a[i];
    }
#pragma GCC unroll 8
    for (int i = degree.n - 1; i >= 0; --i) {
      dA = dA * U + A;
      A = A * U + b[i];
    }
    // Never Q^2: it overflows float32 where P / Q does not.
    const V inverse = 1 / (abs_sum ? absolute(A) + 1 : A), S = sign(abs_sum ? A : X);
    const V w = load(grad + at, count) * inverse, y = P * inverse;
    if (dx) store(dx + at, w * (dP - y * (S * dA)), count);
    if constexpr (want_sums) {
      V t = w;
      sums[0].v += t;
#pragma GCC unroll 8
      for (int i = 1; i <= degree.m; ++i) sums[i].v += (t *= X);
      t = -w * y;
      if (abs_sum) t *= S;
#pragma GCC unroll 8
      for (int i = 1; i <= degree.n; ++i) sums[degree.m + i].v += (t *= U);
    }
  });
}

template <bool abs_sum, class scalar, class Degree>
PHYLA_INLINE void forward_unit(const Job<scalar>& job, int64_t unit, Degree degree) {
  const int64_t end = std::min(job.total, (unit + 1) * job.pieces_per_unit);
  for (int64_t p = unit * job.pieces_per_unit; p < end; ++p) {
    const int64_t block = p / job.pieces, start = p % job.pieces * job.piece, at = block * job.span + start;
    forward_piece<abs_sum>(job.x + at, job.y + at, std::min(job.piece, job.span - start),
                           job.coef.data() + block % job.groups * (degree.m + degree.n + 2), degree);
  }
}

template <bool abs_sum, class scalar, class Degree>
PHYLA_INLINE void backward_unit(const Job<scalar>& job, int64_t unit, Degree degree) {
  const int width = degree.m + 1 + degree.n;
  std::vector<Lanes<scalar>> sums(job.partial ? job.groups * width : 0);
  const int64_t end = std::min(job.total, (unit + 1) * job.pieces_per_unit);
  for (int64_t p = unit * job.pieces_per_unit; p < end; ++p) {
    const int64_t block = p / job.pieces, start = p % job.pieces * job.piece, at = block * job.span + start, group = block % job.groups;
    const int64_t size = std::min(job.piece, job.span - start);
    const scalar* coef = job.coef.data() + group * (width + 1);
    scalar* dx = job.dx ? job.dx + at : nullptr;
    if (!job.partial) {
      backward_piece<abs_sum, false>(job.grad + at, job.x + at, dx, size, coef, sums.data(), degree);
    } else if constexpr (std::is_same_v<Degree, Common>) {
      Lanes<scalar> local[Common::m + 1 + Common::n];  // in registers over the piece
      std::copy_n(sums.data() + group * width, width, local);
      backward_piece<abs_sum, true>(job.grad + at, job.x + at, dx, size, coef, local, degree);
      std::copy_n(local, width, sums.data() + group * width);
    } else {
      backward_piece<abs_sum, true>(job.grad + at, job.x + at, dx, size, coef, sums.data() + group * width, degree);
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    double total = 0;
    for (int64_t lane = 0; lane < Simd<scalar>::width; ++lane) total += sums[i].v[lane];
    job.partial[unit * job.groups * width + i] = total;
  }
}

// Which body runs is settled once a unit; all are inlined here, so that each is compiled for every instruction set.
#define PHYLA_RATIONAL_UNIT(pass, scalar)                                                             \
  PHYLA_CLONES void pass(const Job<scalar>& job, int64_t unit) {                                      \
    const bool common = job.m == Common::m && job.n == Common::n;                                     \
    if (common && !job.abs_sum) return pass##_unit<false>(job, unit, Common{});                       \
    if (common) return pass##_unit<true>(job, unit, Common{});                                        \
    if (!job.abs_sum) return pass##_unit<false>(job, unit, Any{job.m, job.n});                        \
    pass##_unit<true>(job, unit, Any{job.m, job.n});                                                  \
  }
PHYLA_RATIONAL_UNIT(forward, float)
PHYLA_RATIONAL_UNIT(forward, double)
PHYLA_RATIONAL_UNIT(backward, float)
PHYLA_RATIONAL_UNIT(backward, double)

template <class scalar>
Job<scalar> plan(const Tensor& x, const Tensor& numerator, const Tensor& denominator, const std::string& form, int64_t dim) {
  STD_TORCH_CHECK(numerator.dim() == 2 && denominator.dim() == 2, "rational: numerator and denominator must have two dimensions");
  STD_TORCH_CHECK(numerator.scalar_type() == x.scalar_type() && denominator.scalar_type() == x.scalar_type(), "rational: dtypes must agree");
  STD_TORCH_CHECK(dim < 0 && -dim <= x.dim(), "rational: dim must be a negative dimension of x");
  const int64_t rows_a = numerator.size(0), rows_b = denominator.size(0), groups = std::max(rows_a, rows_b);
  const int64_t m = numerator.size(1) - 1, n = denominator.size(1), channels = x.size(x.dim() + dim);
  STD_TORCH_CHECK((rows_a == 1 || rows_a == groups) && (rows_b == 1 || rows_b == groups) && groups > 0 && m >= 0 && n >= 1 &&
                      channels % groups == 0,
                  "rational: coefficients must have 1 or groups rows, and groups must divide the channels");
  Job<scalar> job{};
  job.x = phyla::data<scalar>(x);
  job.groups = groups, job.m = int(m), job.n = int(n), job.abs_sum = form == "abs_sum";
  job.span = channels / groups;
  for (int64_t d = x.dim() + dim + 1; d < x.dim(); ++d) job.span *= x.size(d);
  job.piece = std::min(job.span, kPiece);
  if (x.numel() > 0) {
    job.pieces = (job.span + job.piece - 1) / job.piece;
    // With many groups a unit is longer, so that the partial sums stay small beside x.
    job.pieces_per_unit = std::max<int64_t>(1, std::max(kUnit, 64 * groups) / job.piece);
    job.total = x.numel() / job.span * job.pieces;
  } else {
    job.pieces_per_unit = 1;
  }
  const scalar *a = phyla::data<scalar>(numerator), *b = phyla::data<scalar>(denominator);
  for (int64_t g = 0; g < groups; ++g) {
    const scalar *a_g = a + (rows_a == 1 ? 0 : g * (m + 1)), *b_g = b + (rows_b == 1 ? 0 : g * n);
    job.coef.insert(job.coef.end(), a_g, a_g + m + 1);
    job.coef.push_back(job.abs_sum ? 0 : 1);
    for (int64_t i = 0; i < n; ++i) job.coef.push_back(job.abs_sum ? b_g[i] : std::abs(b_g[i]));
  }
  return job;
}

Tensor rational(const Tensor& x_any, const Tensor& numerator, const Tensor& denominator, std::string form, int64_t dim) {
  const Tensor x = phyla::dense(x_any), a = phyla::dense(numerator), b = phyla::dense(denominator);
  return phyla::dispatch(x, [&](auto zero) {
    using scalar = decltype(zero);
    Tensor y = phyla::empty<scalar>(phyla::sizes_of(x));
    Job<scalar> job = plan<scalar>(x, a, b, form, dim);
    job.y = phyla::mutable_data<scalar>(y);
    phyla::parallel_units(job.units(), [&](int64_t unit) { forward(job, unit); });
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor> rational_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& numerator,
                                                     const Tensor& denominator, std::string form, int64_t dim, int64_t needs) {
  const Tensor grad = phyla::dense(grad_any), x = phyla::dense(x_any), a = phyla::dense(numerator), b = phyla::dense(denominator);
  STD_TORCH_CHECK(phyla::sizes_of(grad) == phyla::sizes_of(x) && grad.scalar_type() == x.scalar_type(),
                  "rational_backward: grad must have the shape and dtype of x");
  return phyla::dispatch(x, [&](auto zero) {
    using scalar = decltype(zero);
    Tensor dx = needs & 1 ? phyla::empty<scalar>(phyla::sizes_of(x)) : phyla::unwanted<scalar>();
    Tensor da = needs & 2 ? phyla::empty<scalar>(phyla::sizes_of(a)) : phyla::unwanted<scalar>();
    Tensor db = needs & 4 ? phyla::empty<scalar>(phyla::sizes_of(b)) : phyla::unwanted<scalar>();
    Job<scalar> job = plan<scalar>(x, a, b, form, dim);
    job.grad = phyla::data<scalar>(grad);
    job.dx = needs & 1 ? phyla::mutable_data<scalar>(dx) : nullptr;
    const int64_t width = job.m + 1 + job.n, per_unit = job.groups * width;
    std::vector<double> partial(needs & 6 ? job.units() * per_unit : 0), sums(per_unit);
    job.partial = needs & 6 ? partial.data() : nullptr;
    phyla::parallel_units(job.units(), [&](int64_t unit) { backward(job, unit); });
    for (size_t i = 0; i < partial.size(); ++i) sums[i % per_unit] += partial[i];

    const auto reduce = [&](Tensor& out, int64_t first, int64_t count) {
      const int64_t rows = out.size(0);
      for (int64_t i = 0; i < rows * count; ++i) {
        double total = 0;
        for (int64_t g = rows == 1 ? 0 : i / count; g < (rows == 1 ? job.groups : i / count + 1); ++g) total += sums[g * width + first + i % count];
        phyla::mutable_data<scalar>(out)[i] = scalar(total);
      }
    };
    if (needs & 2) reduce(da, 0, job.m + 1);
    if (needs & 4) {
      reduce(db, job.m + 1, job.n);
      const scalar* value = phyla::data<scalar>(b);
      scalar* slope = phyla::mutable_data<scalar>(db);
      if (!job.abs_sum)
        for (int64_t i = 0; i < db.numel(); ++i) slope[i] *= scalar((value[i] > 0) - (value[i] < 0));
    }
    return std::tuple(dx, da, db);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phyla_kan_family, CPU, m) {
  m.impl("rational", TORCH_BOX(&rational));
  m.impl("rational_backward", TORCH_BOX(&rational_backward));
}

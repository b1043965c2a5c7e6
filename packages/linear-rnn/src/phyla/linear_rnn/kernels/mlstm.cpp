// mLSTM in chunks: inside a chunk decayed Gram matrices, between chunks the memory, the normaliser and the stabiliser of one head.
//
// With l = logsigmoid(f), the log weight of token j at token t is l_{j+1} + .. + l_t + i_j, a running row that every token adds to, and the
// stabiliser is m_t = max(l_t + m_{t-1}, i_t), which is the largest of the row and of the carried one. Weights are exponentials of differences
// to m_t, so they are at most 1. The gradient of m_t goes to l_t and m_{t-1}, or to i_t, whichever was the larger.
#include "recurrence_ops.h"

namespace phyla::linear_rnn {
namespace {

constexpr int64_t kChunk = 32;

template <class T>
struct Problem {
  const T *q, *k, *v, *i, *f, *c, *n, *m;
  std::vector<int64_t> offsets;
  int64_t H, K, V;
  T scale, eps;

  int64_t sequences() const { return int64_t(offsets.size()) - 1; }
};

template <class T>
PHYLA_INLINE void exponentials(T* x, int64_t size) {
  using loose = typename Lanes<T>::loose;
  using vec = typename Lanes<T>::vec;
  for (int64_t i = 0; i < size; i += Lanes<T>::count) *reinterpret_cast<loose*>(x + i) = exponential(vec(*reinterpret_cast<loose*>(x + i)));
}
PHYLA_CLONES void exponentials_of(float* x, int64_t size) { exponentials(x, size); }
PHYLA_CLONES void exponentials_of(double* x, int64_t size) { exponentials(x, size); }

template <class T>
PHYLA_INLINE void times_of(T* out, const T* x, const T* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] * y[i];
}
PHYLA_CLONES void times(float* out, const float* x, const float* y, int64_t size) { times_of(out, x, y, size); }
PHYLA_CLONES void times(double* out, const double* x, const double* y, int64_t size) { times_of(out, x, y, size); }

PHYLA_CLONES void scale(float* x, float factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;
}
PHYLA_CLONES void scale(double* x, double factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;
}
PHYLA_CLONES float inner(const float* x, const float* y, int64_t size) { return dot(x, y, size); }
PHYLA_CLONES double inner(const double* x, const double* y, int64_t size) { return dot(x, y, size); }

template <class T>
T logsigmoid(T x) { return std::min(x, T(0)) - std::log1p(std::exp(-std::abs(x))); }

// One head of one sequence: its memory and the chunk that is at work. Rows of matrices are padded to whole units.
template <class T>
struct Head {
  const Problem<T>& p;
  int64_t head, K, V, Kp, Vp, first = 0, c = 0;
  T *memory, *normaliser;  // (K, Vp), (Kp)
  T m;                     // the stabiliser before the chunk
  T *q, *k, *k_t, *v;      // of the chunk: (kChunk, Kp), with q scaled; (Kp, kChunk); (kChunk, Vp)
  T *weight, *gram;        // (kChunk, kChunk): weight of token j at token t, and that times q_t . k_j
  T *numerator;            // (kChunk, Vp)
  T l[kChunk], i[kChunk], after[kChunk], carried[kChunk], bottom[kChunk], carried_q[kChunk];  // after: stabilisers

  static int64_t size(const Problem<T>& p) {
    const int64_t Kp = padded<T>(p.K), Vp = padded<T>(p.V);
    return Kp * Vp + Kp + 3 * kChunk * Kp + 2 * kChunk * Vp + 2 * kChunk * kChunk + 64 * 16;
  }
  Head(const Problem<T>& problem, int64_t sequence, int64_t which, Arena<T>& arena)
      : p(problem), head(which), K(p.K), V(p.V), Kp(padded<T>(K)), Vp(padded<T>(V)) {
    memory = arena.take(Kp * Vp);
    normaliser = arena.take(Kp);
    q = arena.take(kChunk * Kp);
    k = arena.take(kChunk * Kp);
    k_t = arena.take(Kp * kChunk);
    v = arena.take(kChunk * Vp);
    numerator = arena.take(kChunk * Vp);
    weight = arena.take(kChunk * kChunk);
    gram = arena.take(kChunk * kChunk);
    for (T* part : {q, k}) std::fill_n(part, kChunk * Kp, T(0));
    std::fill_n(memory, Kp * Vp, T(0));
    std::fill_n(normaliser, Kp, T(0));
    std::fill_n(v, kChunk * Vp, T(0));
    const int64_t place = sequence * p.H + head;
    copy_rows(memory, Vp, p.c + place * K * V, V, K, V);
    std::copy_n(p.n + place * K, K, normaliser);
    m = p.m[place];
  }

  const T* key(const T* x, int64_t t) const { return x + (t * p.H + head) * K; }

  // The chunk of `tokens` tokens from `begin`: rows, weights and stabilisers.
  void open(int64_t begin, int64_t tokens) {
    first = begin, c = tokens;
    copy_rows(k, Kp, key(p.k, begin), p.H * K, c, K);
    copy_rows(v, Vp, p.v + (begin * p.H + head) * V, p.H * V, c, V);
    T log_carried = m, last = m;
    std::fill_n(weight, kChunk * kChunk, -std::numeric_limits<T>::infinity());
    T row[kChunk];
    for (int64_t t = 0; t < c; ++t) {
      l[t] = logsigmoid(p.f[(begin + t) * p.H + head]);
      i[t] = p.i[(begin + t) * p.H + head];
      last = last + l[t] >= i[t] ? last + l[t] : i[t];
      after[t] = last;
      log_carried += l[t];
      carried[t] = std::exp(log_carried - last);
      for (int64_t j = 0; j < t; ++j) row[j] += l[t];
      row[t] = i[t];
      for (int64_t j = 0; j <= t; ++j) weight[t * kChunk + j] = row[j] - last;
    }
    exponentials_of(weight, c * kChunk);
  }
  const T* last_weight() const { return weight + (c - 1) * kChunk; }

  // Outputs of the chunk, up to the division: numerator, and |q . n| with the weights.
  void read() {
    copy_rows(q, Kp, key(p.q, first), p.H * K, c, K);
    scale(q, p.scale, c * Kp);
    transpose(k_t, kChunk, k, Kp, kChunk, Kp);
    multiply(Product<T>{gram, kChunk, c, kChunk, K, q, Kp, 1, k_t, kChunk});
    times(gram, gram, weight, c * kChunk);
    multiply(Product<T>{numerator, Vp, c, Vp, K, q, Kp, 1, memory, Vp});
    multiply(Product<T>{numerator, Vp, c, Vp, c, gram, kChunk, 1, v, Vp, numerator, Vp, carried});
    for (int64_t t = 0; t < c; ++t) {
      carried_q[t] = inner(q + t * Kp, normaliser, K);
      T sum = carried[t] * carried_q[t];
      for (int64_t j = 0; j <= t; ++j) sum += gram[t * kChunk + j];
      bottom[t] = sum;
    }
  }
  // e^-m, at most near the largest number: there the output is 0, and so must its gradient be.
  static bool far(T m) { return -m > std::log(std::numeric_limits<T>::max()) - T(1); }
  T floor_of(int64_t t) const { return std::exp(far(after[t]) ? std::log(std::numeric_limits<T>::max()) - T(1) : -after[t]); }
  T denominator(int64_t t) const {
    const T size = std::abs(bottom[t]), least = floor_of(t);
    return (size >= least || std::isnan(size) ? size : least) + p.eps;
  }

  // The memory after the chunk.
  void close() {
    const T* last = last_weight();
    const T kept = carried[c - 1];
    copy_rows(numerator, Vp, v, Vp, c, Vp);
    for (int64_t t = 0; t < c; ++t) scale(numerator + t * Vp, last[t], Vp);
    scale(memory, kept, K * Vp);
    multiply(Product<T>{memory, Vp, K, Vp, c, k, 1, Kp, numerator, Vp, memory, Vp});
    for (int64_t a = 0; a < K; ++a) normaliser[a] *= kept;
    for (int64_t t = 0; t < c; ++t)
      for (int64_t a = 0; a < K; ++a) normaliser[a] += last[t] * k[t * Kp + a];
    m = after[c - 1];
  }
};

template <class T>
Problem<T> problem(Held& held, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f, const Tensor& c, const Tensor& n,
                   const Tensor& m, const Maybe& cu_seqlens, double scale, double eps) {
  Problem<T> p{held.keep<T>(q), held.keep<T>(k), held.keep<T>(v), held.keep<T>(i), held.keep<T>(f), held.keep<T>(c), held.keep<T>(n), held.keep<T>(m),
               offsets_of(cu_seqlens, q.size(0), q.size(1)), q.size(2), q.size(3), v.size(3), T(scale), T(eps)};
  const int64_t rows = q.size(0) * q.size(1) * p.H, states = p.sequences() * p.H;
  STD_TORCH_CHECK(k.numel() == rows * p.K && v.numel() == rows * p.V && i.numel() == rows && f.numel() == rows && c.numel() == states * p.K * p.V &&
                      n.numel() == states * p.K && m.numel() == states,
                  "mlstm: the shapes of the arguments disagree");
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlstm(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f, const Tensor& c,
                                                 const Tensor& n, const Tensor& m, const Maybe& cu_seqlens, double scale, double eps, int64_t) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Problem<T> p = problem<T>(held, q, k, v, i, f, c, n, m, cu_seqlens, scale, eps);
    Tensor out = empty<T>(sizes_of(v)), c1 = empty<T>(sizes_of(c)), n1 = empty<T>(sizes_of(n)), m1 = empty<T>(sizes_of(m));
    T *to = mutable_data<T>(out), *cs = mutable_data<T>(c1), *ns = mutable_data<T>(n1), *ms = mutable_data<T>(m1);
    parallel_units(p.sequences() * p.H, [&](int64_t u) {
      Arena<T> arena(Head<T>::size(p));
      Head<T> h(p, u / p.H, u % p.H, arena);
      const int64_t end = p.offsets[u / p.H + 1];
      for (int64_t t = p.offsets[u / p.H]; t < end; t += kChunk) {
        h.open(t, std::min(kChunk, end - t));
        h.read();
        for (int64_t r = 0; r < h.c; ++r) {
          const T factor = T(1) / h.denominator(r);
          T* row = to + ((t + r) * p.H + h.head) * p.V;
          for (int64_t a = 0; a < p.V; ++a) row[a] = h.numerator[r * h.Vp + a] * factor;
        }
        h.close();
      }
      copy_rows(cs + u * p.K * p.V, p.V, h.memory, h.Vp, p.K, p.V);
      std::copy_n(h.normaliser, p.K, ns + u * p.K);
      ms[u] = h.m;
    });
    return std::tuple(out, c1, n1, m1);
  });
}

template <class T>
struct Grads {
  const T *out, *c1, *n1, *m1;
  T *q, *k, *v, *i, *f, *c, *n, *m;
};

// One head backwards: `open`ed chunks last to first, with the gradient of what stands behind them.
template <class T>
struct Pull {
  Head<T>& h;
  const Grads<T>& g;
  T *d_memory, *d_normaliser, *turned;  // (K, Vp), (Kp), (Vp, Kp)
  T *d_numerator, *d_gram, *d_rows, *d_values, *written, *v_t;
  double d_m;  // of the stabiliser after the chunk

  static int64_t size(const Problem<T>& p) {
    const int64_t Kp = padded<T>(p.K), Vp = padded<T>(p.V);
    return 2 * Kp * Vp + Kp + kChunk * kChunk + kChunk * Kp + 3 * kChunk * Vp + 64 * 16 + Vp * kChunk;
  }
  Pull(Head<T>& forward, const Grads<T>& grads, int64_t u, Arena<T>& arena) : h(forward), g(grads) {
    const int64_t Kp = h.Kp, Vp = h.Vp;
    d_memory = arena.take(Kp * Vp);
    d_normaliser = arena.take(Kp);
    turned = arena.take(Vp * Kp);
    d_numerator = arena.take(kChunk * Vp);
    d_gram = arena.take(kChunk * kChunk);
    d_rows = arena.take(kChunk * Kp);
    d_values = arena.take(kChunk * Vp);
    written = arena.take(kChunk * Vp);
    v_t = arena.take(Vp * kChunk);
    std::fill_n(d_memory, Kp * Vp, T(0));
    std::fill_n(d_normaliser, Kp, T(0));
    std::fill_n(d_numerator, kChunk * Vp, T(0));
    copy_rows(d_memory, Vp, g.c1 + u * h.K * h.V, h.V, h.K, h.V);
    std::copy_n(g.n1 + u * h.K, h.K, d_normaliser);
    d_m = g.m1[u];
  }

  // From the gradients of outputs and of what stands after the chunk, those of its tokens and of what stands before it.
  void chunk() {
    const int64_t c = h.c, K = h.K, V = h.V, Kp = h.Kp, Vp = h.Vp;
    double d_log[kChunk] = {}, d_i[kChunk] = {}, d_after[kChunk] = {};
    T d_bottom[kChunk], d_carried[kChunk];
    // Of numerator and denominator.
    for (int64_t t = 0; t < c; ++t) {
      const T* grad = g.out + ((h.first + t) * h.p.H + h.head) * V;
      const T least = h.floor_of(t), size = std::abs(h.bottom[t]), factor = T(1) / h.denominator(t);
      for (int64_t a = 0; a < V; ++a) d_numerator[t * Vp + a] = grad[a] * factor;
      const T d_denominator = -inner(grad, h.numerator + t * Vp, V) * factor * factor;
      const T share = size > least ? T(1) : size == least ? T(0.5) : T(0);
      d_bottom[t] = std::isnan(size) ? size : d_denominator * share * T((h.bottom[t] > 0) - (h.bottom[t] < 0));
      d_after[t] = h.far(h.after[t]) || share == T(1) ? 0.0 : -double(d_denominator) * (1 - share) * least;
    }
    // What the memory before the chunk was read with; `written` holds its products with the queries.
    multiply(Product<T>{written, Vp, c, Vp, K, h.q, Kp, 1, h.memory, Vp});
    const T* last = h.last_weight();
    const T kept = h.carried[c - 1];
    const double d_kept = double(inner(d_memory, h.memory, K * Vp)) + inner(d_normaliser, h.normaliser, K);
    for (int64_t t = 0; t < c; ++t) {
      d_carried[t] = inner(d_numerator + t * Vp, written + t * Vp, V) + d_bottom[t] * h.carried_q[t];
      d_log[t] = double(d_carried[t]) * h.carried[t];
    }
    d_log[c - 1] += d_kept * kept;
    double d_start = 0;
    for (int64_t t = 0; t < c; ++t) d_start += d_log[t], d_after[t] -= d_log[t];
    // Gram matrix.
    transpose(v_t, kChunk, h.v, Vp, kChunk, Vp);
    multiply(Product<T>{d_gram, kChunk, c, kChunk, V, d_numerator, Vp, 1, v_t, kChunk});
    // Values: by the Gram matrix and through the memory; `d_values` first holds k . d_memory.
    multiply(Product<T>{d_values, Vp, c, Vp, K, h.k, Kp, 1, d_memory, Vp});
    // Keys through the memory: d_memory v + d_normaliser, times the weight; it also gives the gradient of the weight.
    transpose(turned, Kp, d_memory, Vp, Kp, Vp);
    multiply(Product<T>{d_rows, Kp, c, Kp, V, h.v, Vp, 1, turned, Kp});
    double row_sum[kChunk] = {}, column_sum[kChunk] = {};
    const auto weigh = [&](int64_t t, int64_t j, double d) {  // gradient of a log weight
      d_i[j] += d;
      d_after[t] -= d;
      if (j < t) row_sum[t] += d, column_sum[j] += d;
    };
    for (int64_t j = 0; j < c; ++j) {
      T* row = d_rows + j * Kp;
      for (int64_t a = 0; a < K; ++a) row[a] = (row[a] + d_normaliser[a]) * last[j];
      weigh(c - 1, j, inner(row, h.k + j * Kp, K));
      scale(d_values + j * Vp, last[j], V);
    }
    for (int64_t t = 0; t < c; ++t)
      for (int64_t j = 0; j < kChunk; ++j) {
        T& d = d_gram[t * kChunk + j];
        if (j > t) {
          d = 0;
          continue;
        }
        d += d_bottom[t];
        weigh(t, j, double(d) * h.gram[t * kChunk + j]);
        d *= h.weight[t * kChunk + j];
      }
    multiply(Product<T>{d_values, Vp, c, Vp, c, h.gram, 1, kChunk, d_numerator, Vp, d_values, Vp});
    copy_rows(g.v + (h.first * h.p.H + h.head) * V, h.p.H * V, d_values, Vp, c, V);
    multiply(Product<T>{d_rows, Kp, c, Kp, c, d_gram, 1, kChunk, h.q, Kp, d_rows, Kp});
    copy_rows(g.k + (h.first * h.p.H + h.head) * K, h.p.H * K, d_rows, Kp, c, K);
    // Queries: from the memory before the chunk, and by the Gram matrix.
    transpose(turned, Kp, h.memory, Vp, Kp, Vp);
    multiply(Product<T>{d_rows, Kp, c, Kp, V, d_numerator, Vp, 1, turned, Kp});
    for (int64_t t = 0; t < c; ++t)
      for (int64_t a = 0; a < K; ++a) d_rows[t * Kp + a] = (d_rows[t * Kp + a] + d_bottom[t] * h.normaliser[a]) * h.carried[t];
    multiply(Product<T>{d_rows, Kp, c, Kp, c, d_gram, kChunk, 1, h.k, Kp, d_rows, Kp});
    scale(d_rows, h.p.scale, c * Kp);
    copy_rows(g.q + (h.first * h.p.H + h.head) * K, h.p.H * K, d_rows, Kp, c, K);
    // The memory before the chunk.
    for (int64_t t = 0; t < c; ++t) scale(d_numerator + t * Vp, h.carried[t], V);
    scale(d_memory, kept, K * Vp);
    multiply(Product<T>{d_memory, Vp, K, Vp, c, h.q, 1, Kp, d_numerator, Vp, d_memory, Vp});
    for (int64_t a = 0; a < K; ++a) {
      T sum = d_normaliser[a] * kept;
      for (int64_t t = 0; t < c; ++t) sum += h.carried[t] * d_bottom[t] * h.q[t * Kp + a];
      d_normaliser[a] = sum;
    }
    // Gates: a log weight holds the log forget gates of all tokens after its own, a stabiliser one of its two arguments.
    double d_forget = 0;
    for (int64_t t = c - 1; t >= 0; --t) {
      d_forget += row_sum[t] + d_log[t];
      d_m += d_after[t];
      const T through = (t > 0 ? h.after[t - 1] : h.m) + h.l[t];
      const double share = through > h.i[t] ? 1.0 : through == h.i[t] ? 0.5 : 0.0;
      const int64_t place = (h.first + t) * h.p.H + h.head;
      g.f[place] = T((d_forget + d_m * share) / (1.0 + std::exp(double(h.p.f[place]))));
      g.i[place] = T(d_i[t] + d_m * (1.0 - share));
      d_m *= share;
      if (t > 0) d_forget -= column_sum[t - 1];
    }
    d_m += d_start;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_backward(
    const Tensor& d_out, const Tensor& d_c1, const Tensor& d_n1, const Tensor& d_m1, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
    const Tensor& f, const Tensor& c, const Tensor& n, const Tensor& m, const Maybe& cu_seqlens, double scale, double eps, int64_t, int64_t needs) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Problem<T> p = problem<T>(held, q, k, v, i, f, c, n, m, cu_seqlens, scale, eps);
    std::vector<Tensor> results;
    for (const Tensor* t : {&q, &k, &v, &i, &f, &c, &n, &m}) results.push_back(empty<T>(sizes_of(*t)));
    const auto to = [&](int64_t j) { return mutable_data<T>(results[j]); };
    const Grads<T> g{held.keep<T>(d_out), held.keep<T>(d_c1), held.keep<T>(d_n1), held.keep<T>(d_m1), to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7)};
    parallel_units(p.sequences() * p.H, [&](int64_t u) {
      Arena<T> arena(Head<T>::size(p) + Pull<T>::size(p));
      Head<T> h(p, u / p.H, u % p.H, arena);
      const int64_t begin = p.offsets[u / p.H], tokens = p.offsets[u / p.H + 1] - begin, chunks = (tokens + kChunk - 1) / kChunk;
      const int64_t record = h.K * h.Vp + h.K + 1;
      const std::unique_ptr<T[]> records(new T[size_t(chunks * record + 1)]);
      const auto open = [&](int64_t j) { h.open(begin + j * kChunk, std::min(kChunk, tokens - j * kChunk)); };
      for (int64_t j = 0; j < chunks; ++j) {
        T* kept = records.get() + j * record;
        std::copy_n(h.memory, h.K * h.Vp, kept);
        std::copy_n(h.normaliser, h.K, kept + h.K * h.Vp);
        kept[record - 1] = h.m;
        if (j + 1 < chunks) open(j), h.close();
      }
      Pull<T> pull(h, g, u, arena);
      for (int64_t j = chunks - 1; j >= 0; --j) {
        const T* kept = records.get() + j * record;
        std::copy_n(kept, h.K * h.Vp, h.memory);
        std::copy_n(kept + h.K * h.Vp, h.K, h.normaliser);
        h.m = kept[record - 1];
        open(j);
        h.read();
        pull.chunk();
      }
      copy_rows(g.c + u * p.K * p.V, p.V, pull.d_memory, h.Vp, p.K, p.V);
      std::copy_n(pull.d_normaliser, p.K, g.n + u * p.K);
      g.m[u] = T(pull.d_m);
    });
    const auto take = [&](int64_t j) { return needs >> j & 1 ? results[j] : unwanted<T>(); };
    return std::make_tuple(take(0), take(1), take(2), take(3), take(4), take(5), take(6), take(7));
  });
}

}  // namespace
}  // namespace phyla::linear_rnn

STABLE_TORCH_LIBRARY_IMPL(phyla_linear_rnn, CPU, m) {
  m.impl("mlstm", TORCH_BOX(&phyla::linear_rnn::mlstm));
  m.impl("mlstm_backward", TORCH_BOX(&phyla::linear_rnn::mlstm_backward));
}

// The gated recurrences in micro-chunks: S <- Diag(e^g) S + rows that write key value^T, and rows that read the state to know what they write.
//
// A micro-chunk of c tokens has c queries, `reads` rows r_i and `writes` rows w_j with values x_j, of which the first `known` are given:
//   x_i = beta_i (v_i + r_i . S0 + sum_j gram_ij x_j)    O = Q S0 + gram_q X    S1 = decay S0 + W^T X      all with decays
// The delta rule reads with -k and writes with k, dplr reads with a (before the decay) and writes k with v and b with what it read, linear
// attention reads nothing. Decays stand in the rows: those against the state hold the decay from the chunk's start or to its end; those of
// Gram matrices hold decays from the chunk's first token, which must stay within range (a chunk is cut where they would not), or with one
// decay a head are plain and the Gram matrix is multiplied by products of decays.
#pragma once

#include <memory>

#include "tiles.h"

namespace phyla::linear_rnn {

enum class Gate { none, scalar, channel };
enum class Removal { none, key, low_rank };

// Tensors of (sequences in a row, tokens, heads, width) and their sizes. Sequence s holds the tokens offsets[s] .. offsets[s + 1] - 1.
template <class T>
struct Inputs {
  const T *q, *k, *v;
  const T *beta = nullptr, *a = nullptr, *b = nullptr, *g = nullptr, *state = nullptr;
  std::vector<int64_t> offsets;
  int64_t heads, value_heads, K, V, n = 1;
  T scale;
  bool unit_keys = false;

  int64_t sequences() const { return int64_t(offsets.size()) - 1; }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t s = 0; s < sequences(); ++s) most = std::max(most, offsets[s + 1] - offsets[s]);
    return most;
  }
  // Tokens of a full micro-chunk: 16 rows, the fewest that hide the traffic of the state.
  int64_t chunk() const { return std::min(longest(), std::max<int64_t>(1, 16 / n)); }
};

// Natural exponential of a vector; below the smallest normal number it is zero.
PHYLA_INLINE Lanes<float>::vec exponential(Lanes<float>::vec x) {
  using vec = Lanes<float>::vec;
  const vec y = x * 1.44269504088896341f;
  const Lanes<float>::integers power = __builtin_convertvector(y + (y < 0.0f ? vec{} - 0.5f : vec{} + 0.5f), Lanes<float>::integers);
  const vec n = __builtin_convertvector(power, vec);
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec value = p * reinterpret_cast<vec>((power + 127) << 23);
  return x < -87.3f ? vec{} : x > 88.0f ? vec{} + INFINITY : value;
}
PHYLA_INLINE Lanes<double>::vec exponential(Lanes<double>::vec x) {
  using vec = Lanes<double>::vec;
  const vec y = x * 1.4426950408889634074;
  const Lanes<double>::narrow power = __builtin_convertvector(y + (y < 0.0 ? vec{} - 0.5 : vec{} + 0.5), Lanes<double>::narrow);
  const vec n = __builtin_convertvector(power, vec);
  const vec r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  vec p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  for (const double c : {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    p = p * r + c;
  const vec value = p * reinterpret_cast<vec>((__builtin_convertvector(power, Lanes<double>::integers) + 1023) << 52);
  return x < -708.0 ? vec{} : x > 709.0 ? vec{} + double(INFINITY) : value;
}

template <class T>
PHYLA_INLINE void exponentials(T* out, const T* x, int64_t size) {
  using vec = typename Lanes<T>::vec;
  using loose = typename Lanes<T>::loose;
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t whole = size / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) *reinterpret_cast<loose*>(out + i) = exponential(vec(*reinterpret_cast<const loose*>(x + i)));
  vec rest{};
  std::copy_n(x + whole, size - whole, reinterpret_cast<T*>(&rest));
  rest = exponential(rest);
  std::copy_n(reinterpret_cast<const T*>(&rest), size - whole, out + whole);
}

// What a row is multiplied by to have unit length; a row of zeros stays one.
template <class T>
PHYLA_INLINE T inverse_length(const T* x, int64_t size) {
  return 1 / std::sqrt(dot(x, x, size) + T(1e-6));
}

// Cuts one block of memory, which starts with any values, into matrices at whole units.
template <class T>
struct Arena {
  std::unique_ptr<T[]> memory;
  T* next;
  explicit Arena(int64_t size) : memory(new T[size_t(size) + 16]) {
    next = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / sizeof(T);
  }
  T* take(int64_t size) {
    T* taken = next;
    next += padded<T>(size);
    return taken;
  }
};

// One micro-chunk of one head: the rows with their decays, made from the inputs at a token.
template <class T, Gate gate, Removal removal>
struct Chunk {
  static constexpr bool gated = gate != Gate::none, channel = gate == Gate::channel;
  static_assert(gate != Gate::scalar || removal != Removal::low_rank, "rows that read before a token's decay need a decay a channel");
  const Inputs<T>& in;
  int64_t head = 0, key_head = 0;
  int64_t K, V, Kp, most, columns;
  int64_t begin = 0, c = 0, reads = 0, writes = 0, known = 0, gram_width = 0;
  // Decays from the chunk's start and, `inner`, from its first token to each token; rows of K, or single numbers.
  T *start, *inner;
  T* between;                      // decays from each write to each token, with one decay a head
  T *query_length, *key_length;    // 1 / sqrt(sum of squares + 1e-6)
  T *state_rows, *gram_rows;       // queries, then reads; with one decay a head both are plain, and what they read is decayed
  T *end_rows, *inverse_rows;      // writes, against the state after and in Gram matrices
  T *inverse_columns, *gram, *whole;
  const T* rates = nullptr;

  static int64_t reads_of(int64_t c, int64_t n) { return removal == Removal::none ? 0 : c * n; }
  static int64_t writes_of(int64_t c, int64_t n) { return removal == Removal::low_rank ? 2 * c : c * n; }
  static int64_t size(const Inputs<T>& in) {
    const int64_t c = in.chunk(), rows = c + reads_of(c, in.n), writes = writes_of(c, in.n), Kp = padded<T>(in.K);
    return (2 * c + 2 * rows + 2 * padded<T>(writes) + 2) * Kp + (padded<T>(in.K) + rows) * padded<T>(writes) + (c + rows + 2 * writes + 16) * 16 + c * padded<T>(writes);
  }

  Chunk(const Inputs<T>& inputs, Arena<T>& arena)
      : in(inputs), K(in.K), V(in.V), Kp(padded<T>(in.K)), most(in.chunk()), columns(padded<T>(writes_of(most, in.n))) {
    const int64_t rows = most + reads_of(most, in.n);
    start = arena.take(most * (channel ? Kp : 1));
    inner = arena.take(most * (channel ? Kp : 1));
    between = arena.take(most * columns);
    query_length = arena.take(most);
    key_length = arena.take(most * in.n);
    gram_rows = arena.take(rows * Kp);
    state_rows = channel ? arena.take(rows * Kp) : gram_rows;
    inverse_rows = arena.take(columns * Kp);
    end_rows = gated ? arena.take(columns * Kp) : inverse_rows;
    inverse_columns = arena.take(Kp * columns);
    gram = arena.take(rows * columns);
    whole = arena.take(Kp);
  }

  void at(int64_t value_head) {
    head = value_head;
    key_head = value_head / (in.value_heads / in.heads);
  }
  const T* query(int64_t i) const { return in.q + ((begin + i) * in.heads + key_head) * K; }
  const T* key(int64_t row) const { return in.k + ((begin * in.n + row) * in.heads + key_head) * K; }
  const T* low_rank(const T* x, int64_t i) const { return x + ((begin + i) * in.heads + key_head) * K; }
  const T* value(int64_t row) const { return in.v + ((begin * in.n + row) * in.value_heads + head) * V; }
  int64_t rate_stride() const { return in.value_heads; }

  // Touches the rows of tokens first .. end - 1 of some value heads, which lie side by side.
  void expect(int64_t first, int64_t end, int64_t value_head, int64_t heads) const {
    const int64_t group = in.value_heads / in.heads, from = value_head / group, key_heads = (value_head + heads - 1) / group - from + 1;
    for (int64_t t = first; t < end; ++t) {
      touch(in.q + (t * in.heads + from) * K, key_heads * K);
      for (int64_t row = t * in.n; row < (t + 1) * in.n; ++row) {
        touch(in.k + (row * in.heads + from) * K, key_heads * K);
        touch(in.v + (row * in.value_heads + value_head) * V, heads * V);
      }
    }
  }

  // Decays of the tokens from `begin` on; returns how many of `tokens` fit into one chunk.
  PHYLA_INLINE int64_t decays(int64_t tokens) {
    if constexpr (gate == Gate::scalar) {
      for (int64_t i = 0; i < tokens; ++i) {
        const T decay = std::exp(in.g[(begin + i) * in.value_heads + head]);
        start[i] = i == 0 ? decay : start[i - 1] * decay;
        T *now = between + i * columns, *before = now - columns;
        for (int64_t j = 0; j < i * in.n; ++j) now[j] = before[j] * decay;
        std::fill_n(now + i * in.n, in.n, T(1));
      }
    }
    if constexpr (channel) {
      constexpr T most_decay = sizeof(T) == 4 ? T(1e-34) : T(1e-300);
      for (int64_t i = 0; i < tokens; ++i) {
        const T* g = in.g + ((begin + i) * in.value_heads + head) * K;
        T *now = start + i * Kp, *within = inner + i * Kp;
        exponentials(now, g, K);
        if (i == 0) {
          std::fill_n(within, K, T(1));
          continue;
        }
        int64_t outside = 0;
#pragma omp simd reduction(+ : outside)
        for (int64_t k = 0; k < K; ++k) {
          within[k] = (within - Kp)[k] * now[k];
          now[k] *= (now - Kp)[k];
          outside += !(within[k] >= most_decay && within[k] <= 1 / most_decay);
        }
        if (outside > 0) return i;
      }
    }
    return tokens;
  }

  // Row `row` of the queries and reads: factor x, decayed from the start to token i; i = -1 is before the first token's decay.
  PHYLA_INLINE void reading_row(int64_t row, const T* x, T factor, int64_t i) {
    T *plain = gram_rows + row * Kp, *decayed = state_rows + row * Kp;
    if (channel && i >= 0) {
      const T *from_start = start + i * Kp, *within = inner + i * Kp;
#pragma omp simd
      for (int64_t k = 0; k < K; ++k) {
        plain[k] = factor * x[k] * within[k];
        decayed[k] = factor * x[k] * from_start[k];
      }
      return;
    }
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) plain[k] = factor * x[k];
    if (channel) std::copy_n(plain, K, decayed);
  }
  // Row `row` of the writes, of token i.
  PHYLA_INLINE void writing_row(int64_t row, const T* x, T factor, int64_t i) {
    T *plain = inverse_rows + row * Kp, *decayed = end_rows + row * Kp;
    if constexpr (channel) {
      const T *within = inner + i * Kp, *last = inner + (c - 1) * Kp;
#pragma omp simd
      for (int64_t k = 0; k < K; ++k) {
        plain[k] = factor * x[k] / within[k];
        decayed[k] = plain[k] * last[k];
      }
    } else {
#pragma omp simd
      for (int64_t k = 0; k < K; ++k) plain[k] = factor * x[k];
      if constexpr (gated) {
        const T decay = between[(c - 1) * columns + row];
#pragma omp simd
        for (int64_t k = 0; k < K; ++k) decayed[k] = decay * plain[k];
      }
    }
  }

  // Makes all rows of the chunk that starts at token `first`; it takes as many of `tokens` as it can.
  PHYLA_INLINE void make_rows(int64_t first, int64_t tokens) {
    begin = first;
    c = decays(std::min(tokens, most));
    reads = reads_of(c, in.n);
    writes = writes_of(c, in.n);
    known = removal == Removal::key ? 0 : c;
    gram_width = padded<T>(writes);
    for (int64_t i = 0; i < c; ++i) {
      query_length[i] = in.unit_keys ? inverse_length(query(i), K) : T(1);
      reading_row(i, query(i), in.scale * query_length[i], i);
    }
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t row = i * in.n; row < (i + 1) * in.n; ++row) {
        key_length[row] = in.unit_keys ? inverse_length(key(row), K) : T(1);
        writing_row(row, key(row), key_length[row], i);
        if (removal == Removal::key) reading_row(c + row, key(row), -key_length[row], i);
      }
    }
    if constexpr (removal == Removal::low_rank) {
      for (int64_t i = 0; i < c; ++i) {
        reading_row(c + i, low_rank(in.a, i), T(1), i - 1);
        writing_row(c + i, low_rank(in.b, i), T(1), i);
      }
    }
    if (removal == Removal::key) rates = in.beta + begin * in.n * in.value_heads + head;
    for (int64_t k = 0; k < K && gated; ++k) whole[k] = channel ? start[(c - 1) * Kp + k] : start[c - 1];
  }

  // How many writes row i of queries and reads sees, with low rank of each of the two kinds.
  PHYLA_INLINE int64_t seen(int64_t i) const { return i < c ? (i + 1) * in.n : i - c; }
  int64_t kind() const { return removal == Removal::low_rank ? c : writes; }

  // Decayed products of what a row reads by and what rows write with; zero where a row is not seen.
  PHYLA_INLINE void make_grams() {
    transpose(inverse_columns, gram_width, inverse_rows, Kp, writes, K);
    multiply(Product<T>{gram, gram_width, c + reads, gram_width, K, gram_rows, Kp, 1, inverse_columns, gram_width});
    for (int64_t i = 0; i < c + reads; ++i) {
      for (int64_t first = 0; first < writes; first += kind()) {
        T* row = gram + i * gram_width + first;
        const T* decay = between + (i < c ? i : (i - c) / in.n) * columns;
        const int32_t sees = int32_t(seen(i)), all = int32_t(kind());
        for (int32_t j = 0; j < all; ++j) row[j] = j < sees ? (gate == Gate::scalar ? row[j] * decay[j] : row[j]) : T(0);
      }
    }
  }

  // Columns [first, first + width) of one chunk. `work` is for queries and reads and receives what each read row found, in place of the latter;
  // `x` the values that the writes add, `out` the outputs; the new state goes to `after`, which may be `state`.
  void advance(const T* state, int64_t lds, T* after, int64_t lda, int64_t first, int64_t width, T* work, T* x, T* out, int64_t ldo) {
    const int64_t ld = padded<T>(width);
    multiply(Product<T>{work, ld, c + reads, ld, K, state_rows, Kp, 1, state, lds});
    T* found = work + c * ld;
    for (int64_t row = 0; row < known; ++row) std::copy_n(value(row) + first, width, x + row * ld);
    for (int64_t row = 0; row < reads && removal == Removal::key; ++row) {
      scale_and_add(found + row * ld, gate == Gate::scalar ? start[row / in.n] : T(1), value(row) + first, width);
    }
    if (removal == Removal::low_rank) {
      multiply(Product<T>{found, ld, reads, ld, known, gram + c * gram_width, gram_width, 1, x, ld, found, ld});
    }
    if (removal != Removal::none) {
      substitute(Substitution<T>{reads, ld, found, x + known * ld, ld, gram + c * gram_width + known, gram_width, 1, rates, rate_stride()});
    }
    multiply(Product<T>{out, ldo, c, ld, writes, gram, gram_width, 1, x, ld, work, ld, gate == Gate::scalar ? start : nullptr});
    multiply(Product<T>{after, lda, K, ld, writes, end_rows, 1, Kp, x, ld, state, lds, gated ? whole : nullptr});
  }
};

// The hot loops of a chunk over its rows, for one dtype, gate and removal: compiled for each instruction set.
#define PHYLA_CHUNK(T, GATE, REMOVAL)                                                                                  \
  PHYLA_CLONES void make_chunk(Chunk<T, Gate::GATE, Removal::REMOVAL>& chunk, int64_t first, int64_t tokens) {         \
    chunk.make_rows(first, tokens);                                                                                    \
    chunk.make_grams();                                                                                                \
  }

// Some value heads of one sequence. They go through the tokens together, since their rows lie side by side.
struct Heads {
  int64_t sequence, begin, count;
};

// Columns [first, first + width) of the outputs (tokens, value heads, V) and of the final states (K, V) of some heads.
template <class T, Gate gate, Removal removal>
void forward_heads(const Inputs<T>& in, const Heads& heads, int64_t first, int64_t width, T* out, T* final_state) {
  using C = Chunk<T, gate, removal>;
  const int64_t ld = padded<T>(width), most = in.chunk(), rows = most + C::reads_of(most, in.n), writes = C::writes_of(most, in.n);
  const bool direct = ld == width;  // states can live, and outputs be written, where they are returned
  const int64_t lds = direct ? in.V : ld, begin = in.offsets[heads.sequence], end = in.offsets[heads.sequence + 1];
  Arena<T> arena(C::size(in) + (rows + writes + (direct ? 0 : in.K * heads.count)) * ld + 64);
  C chunk(in, arena);
  T *work = arena.take(rows * ld), *x = arena.take(writes * ld);
  T* own = arena.take(direct ? 0 : in.K * heads.count * ld);
  const int64_t place = (heads.sequence * in.value_heads + heads.begin) * in.K * in.V + first;
  const auto state_of = [&](int64_t h) { return direct ? final_state + place + h * in.K * in.V : own + h * in.K * ld; };
  const bool straight = direct && in.state != nullptr && begin < end;  // the first chunk reads the state where it is given
  for (int64_t h = 0; h < heads.count && !straight; ++h) {
    for (int64_t k = 0; k < in.K; ++k) {
      if (in.state != nullptr) std::copy_n(in.state + place + (h * in.K + k) * in.V, width, state_of(h) + k * lds);
      else std::fill_n(state_of(h) + k * lds, width, T(0));
    }
  }
  for (int64_t window = begin; window < end; window += most) {
    const int64_t stop = std::min(end, window + most);
    chunk.expect(window, stop, heads.begin, heads.count);
    for (int64_t h = 0; h < heads.count; ++h) {
      chunk.at(heads.begin + h);
      for (int64_t t = window; t < stop; t += chunk.c) {
        make_chunk(chunk, t, stop - t);
        const T* before = straight && t == begin ? in.state + place + h * in.K * in.V : state_of(h);
        T* outs = out + (t * in.value_heads + chunk.head) * in.V + first;
        chunk.advance(before, lds, state_of(h), lds, first, width, work, x, direct ? outs : work, direct ? in.value_heads * in.V : ld);
        if (!direct) copy_rows(outs, in.value_heads * in.V, work, ld, chunk.c, width);
      }
    }
  }
  for (int64_t h = 0; h < heads.count && !direct; ++h) copy_rows(final_state + place + h * in.K * in.V, in.V, state_of(h), ld, in.K, width);
}

}  // namespace phyla::linear_rnn

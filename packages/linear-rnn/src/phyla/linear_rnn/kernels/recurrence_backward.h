// Gradients of the gated recurrences: the states are run forward once more, recorded chunk by chunk in blocks that fit a fixed memory, and
// each chunk's products are then transposed, last chunk first.
#pragma once

#include "recurrence.h"

namespace phyla::linear_rnn {

// Gradients of outputs and final states, and where those of the inputs go. Key-like gradients have one row a value head.
template <class T>
struct Gradients {
  const T *out, *final_state;
  T *q = nullptr, *k = nullptr, *v = nullptr, *beta = nullptr, *a = nullptr, *b = nullptr, *g = nullptr, *state = nullptr;
};

template <class T, Gate gate, Removal removal>
struct ChunkBackward : Chunk<T, gate, removal> {
  using C = Chunk<T, gate, removal>;
  using C::begin, C::between, C::c, C::columns, C::end_rows, C::gated, C::gram, C::gram_rows, C::gram_width, C::head, C::in, C::inner, C::inverse_rows, C::K,
      C::key_length, C::known, C::Kp, C::most, C::query_length, C::rates, C::reads, C::start, C::state_rows, C::V, C::whole, C::writes;
  static constexpr bool channel = C::channel;

  const Gradients<T>& to;
  int64_t Vp;
  T *rows, *d_values, *values_t, *d_gram, *state_t, *d_state_t;
  T* d_state = nullptr;  // of the head at hand
  T *d_state_rows, *d_gram_rows, *d_end_rows, *d_inverse_rows;
  T *d_start, *d_inner;  // of the logarithms of the decays `start` and `inner`, as those are laid out
  T *d_row;

  static int64_t size(const Inputs<T>& in) {
    const int64_t c = in.chunk(), rows = c + C::reads_of(c, in.n), columns = padded<T>(C::writes_of(c, in.n)), Kp = padded<T>(in.K), Vp = padded<T>(in.V);
    return C::size(in) + (rows + columns) * Vp + Vp * columns + rows * columns + 2 * Vp * Kp + 2 * (rows + columns) * Kp + (2 * c + 1) * Kp + 2 * c + columns + 16 * 16;
  }

  ChunkBackward(const Inputs<T>& inputs, const Gradients<T>& gradients, Arena<T>& arena)
      : C(inputs, arena), to(gradients), Vp(padded<T>(in.V)) {
    const int64_t readings = most + C::reads_of(most, in.n);
    rows = arena.take(readings * Vp);
    d_values = arena.take(columns * Vp);
    values_t = arena.take(Vp * columns);
    d_gram = arena.take(readings * columns);
    state_t = arena.take(Vp * Kp);
    d_state_t = arena.take(Vp * Kp);
    d_state_rows = arena.take(readings * Kp);
    d_gram_rows = gated ? arena.take(readings * Kp) : d_state_rows;
    d_end_rows = arena.take(columns * Kp);
    d_inverse_rows = gated ? arena.take(columns * Kp) : d_end_rows;
    d_start = arena.take(most * (channel ? Kp : 1));
    d_inner = arena.take(most * (channel ? Kp : 1));
    d_row = arena.take(std::max(Kp, columns));
  }

  // What a chunk leaves for its gradient: the state before it, the Gram matrices, outputs and what read rows found, what the writes added.
  struct Record {
    int64_t head, begin, tokens;
    T *state, *gram, *work, *values;
  };

  // From the gradient of the state after the chunk, in `d_state`, that of the state before it and of all inputs of its tokens.
  void pull(const Record& record) {
    const int64_t readings = c + reads, stride = in.value_heads * V;
    const T* gram_reads = record.gram + c * gram_width;
    // Of the values that were written, and of what the read rows found.
    copy_rows(rows, Vp, to.out + (begin * in.value_heads + head) * V, stride, c, V);
    multiply(Product<T>{d_values, Vp, writes, Vp, c, record.gram, 1, gram_width, rows, Vp});
    multiply(Product<T>{d_values, Vp, writes, Vp, K, end_rows, Kp, 1, d_state, Vp, d_values, Vp});
    T* d_found = rows + c * Vp;
    if constexpr (removal != Removal::none) {
      const int64_t last = reads - 1;
      const T* rate = rates != nullptr ? rates + last * C::rate_stride() : nullptr;
      substitute(Substitution<T>{reads, Vp, d_values + (known + last) * Vp, d_found + last * Vp, -Vp, gram_reads + last * gram_width + known + last, -1,
                                 -gram_width, rate, -C::rate_stride()});
    }
    if constexpr (removal == Removal::low_rank) multiply(Product<T>{d_values, Vp, known, Vp, reads, gram_reads, 1, gram_width, d_found, Vp, d_values, Vp});
    for (int64_t row = 0; row < c * in.n; ++row) {
      const int64_t place = (begin * in.n + row) * in.value_heads + head;
      std::copy_n((removal == Removal::key ? d_found : d_values) + row * Vp, V, to.v + place * V);
    }
    if (removal == Removal::key) {
      dots(to.beta + begin * in.n * in.value_heads + head, in.value_heads, d_values, Vp, record.work + c * Vp, Vp, reads, V);
    }
    // Of the rows: against the states, then in the Gram matrices.
    transpose(values_t, gram_width, record.values, Vp, writes, V);
    transpose(state_t, Kp, record.state, Vp, K, V);
    transpose(d_state_t, Kp, d_state, Vp, K, V);
    multiply(Product<T>{d_gram, gram_width, readings, gram_width, V, rows, Vp, 1, values_t, gram_width});
    multiply(Product<T>{d_state_rows, Kp, readings, Kp, V, rows, Vp, 1, state_t, Kp});
    multiply(Product<T>{d_end_rows, Kp, writes, Kp, V, record.values, Vp, 1, d_state_t, Kp});
    if constexpr (gated) {
      std::fill_n(d_start, channel ? c * Kp : c, T(0));
      std::fill_n(d_inner, channel ? c * Kp : c, T(0));
      dots(d_row, 1, d_state, Vp, record.state, Vp, K, V);
      for (int64_t k = 0; k < K; ++k) d_start[channel ? (c - 1) * Kp + k : c - 1] += whole[k] * d_row[k];
    }
    for (int64_t row = 0; row < readings && gate == Gate::scalar; ++row) {
      const T decay = start[row < c ? row : (row - c) / in.n];
      for (int64_t j = 0; j < V; ++j) rows[row * Vp + j] *= decay;
    }
    multiply(Product<T>{d_state, Vp, K, Vp, readings, state_rows, 1, Kp, rows, Vp, d_state, Vp, gated ? whole : nullptr});
    pull_chunk(*this, record.gram);
  }

  // From the gradients of rows and Gram matrices those of the inputs.
  PHYLA_INLINE void pull_inputs(const T* of_chunk) {
    pull_grams(of_chunk);
    const T *add_reading = gated ? nullptr : d_state_rows, *add_writing = gated ? nullptr : d_end_rows;
    multiply(Product<T>{d_gram_rows, Kp, c + reads, Kp, writes, d_gram, gram_width, 1, inverse_rows, Kp, add_reading, Kp});
    multiply(Product<T>{d_inverse_rows, Kp, writes, Kp, c + reads, d_gram, 1, gram_width, gram_rows, Kp, add_writing, Kp});
    pull_rows();
    if constexpr (gated) pull_decays();
  }

  // Clears what a row does not see; one decay a head is in the Gram matrices, so they give its gradient and their rows' is decayed.
  PHYLA_INLINE void pull_grams(const T* of_chunk) {
    std::fill_n(d_row, gate == Gate::scalar ? writes : 0, T(0));
    for (int64_t i = 0; i < c + reads; ++i) {
      for (int64_t first = 0; first < writes; first += C::kind()) {
        T* row = d_gram + i * gram_width + first;
        const int64_t sees = C::seen(i), token = i < c ? i : (i - c) / in.n;
        if constexpr (gate == Gate::scalar) {
          const T *value = of_chunk + i * gram_width, *decay = between + token * columns;
          T sum = 0;
          for (int64_t j = 0; j < sees; ++j) {
            const T both = row[j] * value[j];
            sum += both;
            d_row[j] += both;
            row[j] *= decay[j];
          }
          d_inner[token] += sum;
        }
        std::fill_n(row + sees, C::kind() - sees, T(0));
      }
    }
    if constexpr (gate == Gate::scalar) {
      for (int64_t i = 0; i < c; ++i)
        for (int64_t j = i * in.n; j < (i + 1) * in.n; ++j) d_inner[i] -= d_row[j];
    }
  }

  // d_row += sign * the gradient of the undecayed row `row` of queries and reads, decayed up to token i (-1 for before the first token).
  PHYLA_INLINE void pull_reading(int64_t row, int64_t i, T sign) {
    const T *outer = d_state_rows + row * Kp, *within = d_gram_rows + row * Kp;
    if constexpr (!gated) {
      for (int64_t k = 0; k < K; ++k) d_row[k] += sign * outer[k];
    } else if constexpr (gate == Gate::scalar) {
      for (int64_t k = 0; k < K; ++k) d_row[k] += sign * (start[i] * outer[k] + within[k]);
      d_start[i] += start[i] * dot(outer, state_rows + row * Kp, K);
    } else {
      if (i < 0) {  // it sees no write of this chunk
        for (int64_t k = 0; k < K; ++k) d_row[k] += sign * outer[k];
        return;
      }
      const T *from_start = start + i * Kp, *from_first = inner + i * Kp, *decayed = state_rows + row * Kp, *plain = gram_rows + row * Kp;
      T *d_from_start = d_start + i * Kp, *d_from_first = d_inner + i * Kp;
#pragma omp simd
      for (int64_t k = 0; k < K; ++k) {
        d_row[k] += sign * (from_start[k] * outer[k] + from_first[k] * within[k]);
        d_from_start[k] += outer[k] * decayed[k];
        d_from_first[k] += within[k] * plain[k];
      }
    }
  }
  // d_row += the gradient of the undecayed row `row` of the writes, of token i.
  PHYLA_INLINE void pull_writing(int64_t row, int64_t i) {
    const T *outer = d_end_rows + row * Kp, *within = d_inverse_rows + row * Kp;
    if constexpr (!gated) {
      for (int64_t k = 0; k < K; ++k) d_row[k] += outer[k];
    } else if constexpr (gate == Gate::scalar) {
      const T decay = between[(c - 1) * columns + row], change = dot(outer, end_rows + row * Kp, K);
      for (int64_t k = 0; k < K; ++k) d_row[k] += decay * outer[k] + within[k];
      d_inner[i] -= change;
      d_inner[c - 1] += change;
    } else {
      const T *from_first = inner + i * Kp, *last = inner + (c - 1) * Kp, *decayed = end_rows + row * Kp, *plain = inverse_rows + row * Kp;
      T *d_from_first = d_inner + i * Kp, *d_last = d_inner + (c - 1) * Kp;
      for (int64_t k = 0; k < K; ++k) {
        d_row[k] += (last[k] * outer[k] + within[k]) / from_first[k];
        const T change = outer[k] * decayed[k];
        d_from_first[k] -= within[k] * plain[k] + change;
        d_last[k] += change;
      }
    }
  }

  // out = the gradient of x, from that of factor x in d_row, which is cleared; factor = scale / length(x) if rows are divided by it.
  PHYLA_INLINE void finish_row(T* out, const T* x, T factor, T length) {
    T along = 0;
    if (in.unit_keys) along = length * length * dot(x, d_row, K);
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) {
      out[k] = factor * (d_row[k] - along * x[k]);
      d_row[k] = 0;
    }
  }

  PHYLA_INLINE void pull_rows() {
    std::fill_n(d_row, K, T(0));
    for (int64_t i = 0; i < c; ++i) {
      pull_reading(i, i, T(1));
      finish_row(to.q + ((begin + i) * in.value_heads + head) * K, C::query(i), in.scale * query_length[i], query_length[i]);
    }
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t row = i * in.n; row < (i + 1) * in.n; ++row) {
        if (removal == Removal::key) pull_reading(c + row, i, T(-1));
        pull_writing(row, i);
        finish_row(to.k + ((begin * in.n + row) * in.value_heads + head) * K, C::key(row), key_length[row], key_length[row]);
      }
    }
    if constexpr (removal == Removal::low_rank) {
      for (int64_t i = 0; i < c; ++i) {
        const int64_t place = ((begin + i) * in.value_heads + head) * K;
        pull_reading(c + i, i - 1, T(1));
        finish_row(to.a + place, C::low_rank(in.a, i), T(1), T(1));
        pull_writing(c + i, i);
        finish_row(to.b + place, C::low_rank(in.b, i), T(1), T(1));
      }
    }
  }

  // A token's log decay is in `start` of it and of later ones, and in `inner` of those if it is not the first.
  PHYLA_INLINE void pull_decays() {
    const int64_t width = channel ? K : 1, ld = channel ? Kp : 1;
    for (int64_t i = c - 1; i >= 0; --i) {
      T* d_g = to.g + ((begin + i) * in.value_heads + head) * width;
      T *now = d_start + i * ld, *within = d_inner + i * ld;
      for (int64_t k = 0; k < width; ++k) {
        if (i + 1 < c) {
          now[k] += now[ld + k];
          within[k] += within[ld + k];
        }
        d_g[k] = now[k] + (i > 0 ? within[k] : T(0));
      }
    }
  }
};

// The hot loops of a chunk and of its gradient.
#define PHYLA_CHUNK_BACKWARD(T, GATE, REMOVAL)                                                                                        \
  PHYLA_CLONES void make_rows(ChunkBackward<T, Gate::GATE, Removal::REMOVAL>& chunk, int64_t first, int64_t tokens) {                 \
    chunk.make_rows(first, tokens);                                                                                                   \
  }                                                                                                                                   \
  PHYLA_CLONES void pull_chunk(ChunkBackward<T, Gate::GATE, Removal::REMOVAL>& chunk, const T* gram) { chunk.pull_inputs(gram); }

// Gradients of some heads of one sequence.
template <class T, Gate gate, Removal removal>
void backward_heads(const Inputs<T>& in, const Gradients<T>& to, const Heads& heads) {
  using C = ChunkBackward<T, gate, removal>;
  using Record = typename C::Record;
  constexpr int64_t budget = int64_t(4) << 20;  // bytes a thread: more is no faster, records then leave the cache
  const int64_t begin = in.offsets[heads.sequence], end = in.offsets[heads.sequence + 1], most = in.chunk(), n = heads.count;
  const int64_t Kp = padded<T>(in.K), Vp = padded<T>(in.V), state_size = Kp * Vp;
  const int64_t readings = most + C::reads_of(most, in.n), columns = padded<T>(C::writes_of(most, in.n));
  const int64_t record_size = state_size + readings * columns + readings * Vp + columns * Vp;
  // Records of one window of tokens, at most, and of all that are kept at a time.
  const int64_t window_records = n * (gate == Gate::channel ? most : 1), windows = most > 0 ? (end - begin + most - 1) / most : 0;
  const int64_t slots = std::max<int64_t>(1, std::min(windows, budget / int64_t(sizeof(T)) / record_size / std::max<int64_t>(1, window_records))) * window_records;
  Arena<T> arena(C::size(in)), memory(slots * record_size + 2 * n * state_size);
  C chunk(in, to, arena);
  T *starts = memory.take(n * state_size), *d_states = memory.take(n * state_size), *tape = memory.next;
  std::fill_n(starts, n * state_size, T(0));
  const int64_t place = (heads.sequence * in.value_heads + heads.begin) * in.K * in.V;
  for (int64_t h = 0; h < n; ++h) {
    const int64_t at = place + h * in.K * in.V;
    if (in.state != nullptr) copy_rows(starts + h * state_size, Vp, in.state + at, in.V, in.K, in.V);
    copy_rows(d_states + h * state_size, Vp, to.final_state + at, in.V, in.K, in.V);
  }

  std::vector<Record> records;
  std::vector<T*> states(n);
  // Records the chunks of windows from token t on, with the heads' states in `starts`, until memory or tokens end; returns the token after.
  const auto record = [&](int64_t t) {
    records.clear();
    memory.next = tape;
    for (int64_t h = 0; h < n; ++h) states[h] = starts + h * state_size;
    for (; t < end && int64_t(records.size()) + window_records <= slots; t = std::min(end, t + most)) {
      const int64_t stop = std::min(end, t + most);
      for (int64_t h = 0; h < n; ++h) {
        chunk.at(heads.begin + h);
        const int64_t share = (most + n - 1) / n;
        chunk.expect(std::min(end, stop + h * share), std::min({end, stop + most, stop + (h + 1) * share}), heads.begin, n);
        for (int64_t token = t; token < stop; token += chunk.c) {
          T *after = memory.take(state_size), *gram = memory.take(readings * columns), *work = memory.take(readings * Vp);
          const Record r{h, token, 0, states[h], gram, work, memory.take(columns * Vp)};
          chunk.gram = gram;
          make_chunk(chunk, token, stop - token);
          chunk.advance(r.state, Vp, after, Vp, 0, in.V, r.work, r.values, r.work, Vp);
          states[h] = after;
          records.push_back(r);
          records.back().tokens = chunk.c;
        }
      }
    }
    return t;
  };
  struct Checkpoint {
    int64_t token;
    std::vector<T> states;
  };
  std::vector<Checkpoint> blocks;
  for (int64_t t = begin; t < end;) {
    blocks.push_back({t, std::vector<T>(starts, starts + n * state_size)});
    t = record(t);
    for (int64_t h = 0; h < n && t < end; ++h) std::copy_n(states[h], state_size, starts + h * state_size);
  }
  for (size_t left = blocks.size(); left > 0; --left) {
    if (left < blocks.size()) {  // the last block is still recorded
      std::copy_n(blocks[left - 1].states.data(), n * state_size, starts);
      record(blocks[left - 1].token);
    }
    for (auto r = records.rbegin(); r != records.rend(); ++r) {
      chunk.at(heads.begin + r->head);
      chunk.d_state = d_states + r->head * state_size;
      const int64_t earlier = std::max(begin, r->begin - most);
      chunk.expect(earlier, r->begin, chunk.head, 1);
      for (int64_t t = earlier; t < r->begin; ++t) touch(to.out + (t * in.value_heads + chunk.head) * in.V, in.V);
      make_rows(chunk, r->begin, r->tokens);
      chunk.pull(*r);
    }
  }
  for (int64_t h = 0; h < n; ++h) copy_rows(to.state + place + h * in.K * in.V, in.V, d_states + h * state_size, Vp, in.K, in.V);
}

}  // namespace phyla::linear_rnn

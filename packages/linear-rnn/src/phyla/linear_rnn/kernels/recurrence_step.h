// One token: sweeps over the state as it lies, each of which writes what the last one found and reads for the next.
//
// Where every sequence has one token there is nothing to gain from chunks: the state goes through the first cache level once, in n + 1 sweeps
// (the first only reads) with a removal and in one without.
#pragma once

#include "recurrence.h"

namespace phyla::linear_rnn {

template <class T>
void forward_step(const Inputs<T>& in, Gate gate, Removal removal, const Heads& heads, T* out, T* final_state) {
  const int64_t K = in.K, V = in.V, Kp = padded<T>(K), group = in.value_heads / in.heads;
  Arena<T> arena(4 * Kp + 3 * V + 64);
  T *decay = arena.take(Kp), *query = arena.take(Kp), *key = arena.take(Kp), *decayed = arena.take(Kp);
  T *found = arena.take(V), *x = arena.take(V);
  const auto unit = [&](T* row, const T* given, T factor) {
    if (in.unit_keys) factor *= inverse_length(given, K);
    for (int64_t k = 0; k < K; ++k) row[k] = factor * given[k];
  };
  for (int64_t h = heads.begin; h < heads.begin + heads.count; ++h) {
    const int64_t t = in.offsets[heads.sequence], place = (heads.sequence * in.value_heads + h) * K * V, row = t * in.heads + h / group;
    T* state = final_state + place;
    const T* before = in.state != nullptr ? in.state + place : state;
    if (in.state == nullptr) std::fill_n(state, K * V, T(0));
    if (t == in.offsets[heads.sequence + 1]) {
      if (in.state != nullptr) std::copy_n(before, K * V, state);
      continue;
    }
    if (gate == Gate::channel) exponentials(decay, in.g + (t * in.value_heads + h) * K, K);
    else std::fill_n(decay, K, gate == Gate::none ? T(1) : T(std::exp(in.g[t * in.value_heads + h])));
    unit(query, in.q + row * K, in.scale);
    T* outs = out + (t * in.value_heads + h) * V;
    if (removal == Removal::key) {
      const auto key_of = [&](int64_t i) { return in.k + ((t * in.n + i) * in.heads + h / group) * K; };
      unit(key, key_of(0), T(1));
      for (int64_t k = 0; k < K; ++k) decayed[k] = decay[k] * key[k];
      sweep(Sweep<T>{K, V, before, nullptr, nullptr, {}, {}, decayed, found});
      for (int64_t i = 0; i < in.n; ++i) {
        const int64_t step = (t * in.n + i) * in.value_heads + h;
        for (int64_t j = 0; j < V; ++j) x[j] = in.beta[step] * (in.v[step * V + j] - found[j]);
        const bool last = i + 1 == in.n;
        if (!last) unit(decayed, key_of(i + 1), T(1));
        sweep(Sweep<T>{K, V, before, state, i == 0 ? decay : nullptr, {key}, {x}, last ? query : decayed, last ? outs : found});
        std::swap(key, decayed);
        before = state;
      }
    } else {
      unit(key, in.k + row * K, T(1));
      const T *value = in.v + (t * in.value_heads + h) * V, *write = nullptr;
      if (removal == Removal::low_rank) {
        sweep(Sweep<T>{K, V, before, nullptr, nullptr, {}, {}, in.a + row * K, found});
        write = in.b + row * K;
      }
      sweep(Sweep<T>{K, V, before, state, decay, {key, write}, {value, found}, query, outs});
    }
  }
}

}  // namespace phyla::linear_rnn

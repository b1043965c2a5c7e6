// From tensors to the heads of sequences: what the three operations share around recurrence.h.
#pragma once

#include "recurrence.h"
#include "recurrence_backward.h"
#include "recurrence_step.h"

namespace phyla::linear_rnn {

using Maybe = std::optional<Tensor>;

// Contiguous tensors kept alive while a kernel reads them.
struct Held {
  std::vector<Tensor> tensors;
  template <class T>
  const T* keep(const Maybe& t) {
    if (!t.has_value()) return nullptr;
    tensors.push_back(dense(*t));
    return data<T>(tensors.back());
  }
};

inline std::vector<int64_t> offsets_of(const Maybe& cu_seqlens, int64_t batch, int64_t tokens) {
  std::vector<int64_t> offsets;
  if (!cu_seqlens.has_value()) {
    for (int64_t s = 0; s <= batch; ++s) offsets.push_back(s * tokens);
    return offsets;
  }
  const Tensor held = dense(*cu_seqlens);
  const auto* given = static_cast<const int64_t*>(held.const_data_ptr());
  offsets.assign(given, given + held.numel());
  bool fits = batch == 1 && offsets.front() == 0 && offsets.back() == tokens;
  for (size_t s = 1; s < offsets.size(); ++s) fits = fits && offsets[s - 1] <= offsets[s];
  STD_TORCH_CHECK(fits, "cu_seqlens: expected offsets that start at 0, never decrease and end at the number of tokens of a batch of 1");
  return offsets;
}

// fn(gate) with the gate as a constant, after the rank of g.
template <class Fn>
auto dispatch_gate(const Maybe& g, Fn&& fn) {
  if (!g.has_value()) return fn(std::integral_constant<Gate, Gate::none>());
  if (g->dim() == 3) return fn(std::integral_constant<Gate, Gate::scalar>());
  return fn(std::integral_constant<Gate, Gate::channel>());
}

// Runs `fn(heads)` over groups of up to eight heads of each sequence, fewer where there would be less groups than threads. What is computed
// for a head does not depend on its group.
template <class T, class Fn>
void over_heads(const Inputs<T>& in, const Fn& fn) {
  const int64_t tasks = in.sequences() * in.value_heads, threads = torch::stable::get_num_threads();
  const int64_t size = std::clamp<int64_t>(tasks / threads, 1, 8), groups = (in.value_heads + size - 1) / size;
  parallel_units(in.sequences() * groups, [&](int64_t u) {
    const int64_t begin = u % groups * size;
    fn(Heads{u / groups, begin, std::min(size, in.value_heads - begin)});
  });
}
// `fn(heads, first column, columns)`: where there are fewer heads than threads, over ranges of columns too, whose arithmetic is the same
// wherever they are cut at whole tiles.
template <class T, class Fn>
void over_heads_and_columns(const Inputs<T>& in, const Fn& fn) {
  constexpr int64_t tile = 128 / sizeof(T);
  const int64_t tasks = in.sequences() * in.value_heads, threads = torch::stable::get_num_threads(), tiles = in.V / tile;
  if (tasks >= threads || tasks == 0 || tiles < 2) return over_heads(in, [&](const Heads& heads) { fn(heads, 0, in.V); });
  const int64_t wanted = std::min(tiles, (threads + tasks - 1) / tasks), width = (tiles + wanted - 1) / wanted * tile;
  const int64_t pieces = std::max<int64_t>(1, in.V / width);
  parallel_units(tasks * pieces, [&](int64_t u) {
    const int64_t task = u / pieces, first = u % pieces * width;
    fn(Heads{task / in.value_heads, task % in.value_heads, 1}, first, u % pieces + 1 == pieces ? in.V - first : width);
  });
}

// Gradients of the arguments in their order: the memory they are written to, and what is returned of it.
template <class T>
struct Results {
  const Inputs<T>& in;
  int64_t needs;
  struct Slot {
    Tensor values;
    std::vector<int64_t> sizes;
    bool present, grouped;
  };
  std::vector<Slot> slots;

  T* plain(const std::vector<int64_t>& sizes, bool present = true) {
    slots.push_back({empty<T>(sizes), sizes, present, false});
    return mutable_data<T>(slots.back().values);
  }
  // Of what value heads share: one row a value head, added up at the end.
  T* keys(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> wide = sizes;
    wide[wide.size() - 2] = in.value_heads;
    slots.push_back({empty<T>(wide), sizes, true, in.value_heads != in.heads});
    return mutable_data<T>(slots.back().values);
  }
  Tensor take(size_t i) const {
    const Slot& slot = slots[i];
    if (!slot.present || (needs >> i & 1) == 0) return unwanted<T>();
    if (!slot.grouped) return slot.values;
    Tensor sums = empty<T>(slot.sizes);
    const T* from = data<T>(slot.values);
    T* to = mutable_data<T>(sums);
    const int64_t group = in.value_heads / in.heads, K = in.K;
    parallel_for(0, sums.numel() / K, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::copy_n(from + row * group * K, K, to + row * K);
        for (int64_t member = 1; member < group; ++member)
          for (int64_t k = 0; k < K; ++k) to[row * K + k] += from[(row * group + member) * K + k];
      }
    });
    return sums;
  }
};

#define PHYLA_RECURRENCE(GATE, REMOVAL)       \
  PHYLA_CHUNK(float, GATE, REMOVAL)           \
  PHYLA_CHUNK(double, GATE, REMOVAL)          \
  PHYLA_CHUNK_BACKWARD(float, GATE, REMOVAL)  \
  PHYLA_CHUNK_BACKWARD(double, GATE, REMOVAL)

// Outputs (batch, tokens, value heads, V) and final states of a removal with the gate that is a constant.
template <class T, Gate gate, Removal removal>
std::tuple<Tensor, Tensor> forward(const Inputs<T>& in, int64_t batch, int64_t tokens) {
  Tensor out = empty<T>({batch, tokens, in.value_heads, in.V}), final_state = empty<T>({in.sequences(), in.value_heads, in.K, in.V});
  T *outs = mutable_data<T>(out), *states = mutable_data<T>(final_state);
  if (in.longest() == 1 && padded<T>(in.V) == in.V) {
    over_heads(in, [&](const Heads& heads) { forward_step(in, gate, removal, heads, outs, states); });
    return {out, final_state};
  }
  over_heads_and_columns(
      in, [&](const Heads& heads, int64_t first, int64_t width) { forward_heads<T, gate, removal>(in, heads, first, width, outs, states); });
  return {out, final_state};
}
template <class T, Gate gate, Removal removal>
void backward(const Inputs<T>& in, const Gradients<T>& to) {
  over_heads(in, [&](const Heads& heads) { backward_heads<T, gate, removal>(in, to, heads); });
}

}  // namespace phyla::linear_rnn

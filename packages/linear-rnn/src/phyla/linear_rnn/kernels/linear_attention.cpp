// Linear attention: S <- Diag(e^g) S + k v^T, o = scale S^T q.
#include "recurrence_ops.h"

namespace phyla::linear_rnn {

PHYLA_RECURRENCE(none, none)
PHYLA_RECURRENCE(scalar, none)
PHYLA_RECURRENCE(channel, none)

namespace {

template <class T>
Inputs<T> inputs(Held& held, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& g, const Maybe& state, const Maybe& cu_seqlens, double scale) {
  return {.q = held.keep<T>(q),
          .k = held.keep<T>(k),
          .v = held.keep<T>(v),
          .g = held.keep<T>(g),
          .state = held.keep<T>(state),
          .offsets = offsets_of(cu_seqlens, q.size(0), q.size(1)),
          .heads = q.size(2),
          .value_heads = v.size(2),
          .K = q.size(3),
          .V = v.size(3),
          .scale = T(scale)};
}

std::tuple<Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& g, const Maybe& state, const Maybe& cu_seqlens,
                                            double scale, int64_t) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Inputs<T> in = inputs<T>(held, q, k, v, g, state, cu_seqlens, scale);
    return dispatch_gate(g, [&](auto gate) { return forward<T, gate, Removal::none>(in, q.size(0), q.size(1)); });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(const Tensor& d_out, const Tensor& d_final, const Tensor& q, const Tensor& k,
                                                                             const Tensor& v, const Maybe& g, const Maybe& state, const Maybe& cu_seqlens,
                                                                             double scale, int64_t, int64_t needs) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Inputs<T> in = inputs<T>(held, q, k, v, g, state, cu_seqlens, scale);
    Results<T> results{in, needs, {}};
    Gradients<T> to{held.keep<T>(d_out), held.keep<T>(d_final)};
    to.q = results.keys(sizes_of(q));
    to.k = results.keys(sizes_of(k));
    to.v = results.plain(sizes_of(v));
    to.g = results.plain(g.has_value() ? sizes_of(*g) : std::vector<int64_t>{0}, g.has_value());
    to.state = results.plain({in.sequences(), in.value_heads, in.K, in.V}, state.has_value());
    dispatch_gate(g, [&](auto gate) { backward<T, gate, Removal::none>(in, to); });
    return std::make_tuple(results.take(0), results.take(1), results.take(2), results.take(3), results.take(4));
  });
}

}  // namespace
}  // namespace phyla::linear_rnn

STABLE_TORCH_LIBRARY_IMPL(phyla_linear_rnn, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&phyla::linear_rnn::linear_attention));
  m.impl("linear_attention_backward", TORCH_BOX(&phyla::linear_rnn::linear_attention_backward));
}

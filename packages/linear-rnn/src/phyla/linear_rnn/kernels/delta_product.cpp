// Gated delta product: S <- Diag(e^g) S, then n times S <- S + beta k (v - S^T k)^T, o = scale S^T q.
#include "recurrence_ops.h"

namespace phyla::linear_rnn {

PHYLA_RECURRENCE(none, key)
PHYLA_RECURRENCE(scalar, key)
PHYLA_RECURRENCE(channel, key)

namespace {

template <class T>
Inputs<T> inputs(Held& held, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const Maybe& g, const Maybe& state, const Maybe& cu_seqlens,
                 double scale, bool unit_keys) {
  return {.q = held.keep<T>(q),
          .k = held.keep<T>(k),
          .v = held.keep<T>(v),
          .beta = held.keep<T>(beta),
          .g = held.keep<T>(g),
          .state = held.keep<T>(state),
          .offsets = offsets_of(cu_seqlens, q.size(0), q.size(1)),
          .heads = q.size(2),
          .value_heads = v.size(3),
          .K = q.size(3),
          .V = v.size(4),
          .n = k.size(2),
          .scale = T(scale),
          .unit_keys = unit_keys};
}

std::tuple<Tensor, Tensor> delta_product(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const Maybe& g, const Maybe& state,
                                         const Maybe& cu_seqlens, double scale, bool unit_keys, int64_t) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Inputs<T> in = inputs<T>(held, q, k, v, beta, g, state, cu_seqlens, scale, unit_keys);
    return dispatch_gate(g, [&](auto gate) { return forward<T, gate, Removal::key>(in, q.size(0), q.size(1)); });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> delta_product_backward(const Tensor& d_out, const Tensor& d_final, const Tensor& q, const Tensor& k,
                                                                                  const Tensor& v, const Tensor& beta, const Maybe& g, const Maybe& state,
                                                                                  const Maybe& cu_seqlens, double scale, bool unit_keys, int64_t, int64_t needs) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Inputs<T> in = inputs<T>(held, q, k, v, beta, g, state, cu_seqlens, scale, unit_keys);
    Results<T> results{in, needs, {}};
    Gradients<T> to{held.keep<T>(d_out), held.keep<T>(d_final)};
    to.q = results.keys(sizes_of(q));
    to.k = results.keys(sizes_of(k));
    to.v = results.plain(sizes_of(v));
    to.beta = results.plain(sizes_of(beta));
    to.g = results.plain(g.has_value() ? sizes_of(*g) : std::vector<int64_t>{0}, g.has_value());
    to.state = results.plain({in.sequences(), in.value_heads, in.K, in.V}, state.has_value());
    dispatch_gate(g, [&](auto gate) { backward<T, gate, Removal::key>(in, to); });
    return std::make_tuple(results.take(0), results.take(1), results.take(2), results.take(3), results.take(4), results.take(5));
  });
}

}  // namespace
}  // namespace phyla::linear_rnn

STABLE_TORCH_LIBRARY_IMPL(phyla_linear_rnn, CPU, m) {
  m.impl("delta_product", TORCH_BOX(&phyla::linear_rnn::delta_product));
  m.impl("delta_product_backward", TORCH_BOX(&phyla::linear_rnn::delta_product_backward));
}

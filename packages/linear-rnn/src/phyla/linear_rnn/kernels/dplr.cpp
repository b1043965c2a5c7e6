// Diagonal plus low rank: S <- Diag(e^g) S + b (S^T a)^T + k v^T, o = scale S^T q.
#include "recurrence_ops.h"

namespace phyla::linear_rnn {

PHYLA_RECURRENCE(channel, low_rank)

namespace {

template <class T>
Inputs<T> inputs(Held& held, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, const Tensor& g, const Maybe& state,
                 const Maybe& cu_seqlens, double scale) {
  return {.q = held.keep<T>(q),
          .k = held.keep<T>(k),
          .v = held.keep<T>(v),
          .a = held.keep<T>(a),
          .b = held.keep<T>(b),
          .g = held.keep<T>(g),
          .state = held.keep<T>(state),
          .offsets = offsets_of(cu_seqlens, q.size(0), q.size(1)),
          .heads = q.size(2),
          .value_heads = v.size(2),
          .K = q.size(3),
          .V = v.size(3),
          .scale = T(scale)};
}

std::tuple<Tensor, Tensor> dplr(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, const Tensor& g, const Maybe& state,
                                const Maybe& cu_seqlens, double scale, int64_t) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    return forward<T, Gate::channel, Removal::low_rank>(inputs<T>(held, q, k, v, a, b, g, state, cu_seqlens, scale), q.size(0), q.size(1));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dplr_backward(const Tensor& d_out, const Tensor& d_final, const Tensor& q, const Tensor& k,
                                                                                 const Tensor& v, const Tensor& a, const Tensor& b, const Tensor& g,
                                                                                 const Maybe& state, const Maybe& cu_seqlens, double scale, int64_t,
                                                                                 int64_t needs) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const Inputs<T> in = inputs<T>(held, q, k, v, a, b, g, state, cu_seqlens, scale);
    Results<T> results{in, needs, {}};
    Gradients<T> to{held.keep<T>(d_out), held.keep<T>(d_final)};
    to.q = results.plain(sizes_of(q));
    to.k = results.plain(sizes_of(k));
    to.v = results.plain(sizes_of(v));
    to.a = results.plain(sizes_of(a));
    to.b = results.plain(sizes_of(b));
    to.g = results.plain(sizes_of(g));
    to.state = results.plain({in.sequences(), in.value_heads, in.K, in.V}, state.has_value());
    backward<T, Gate::channel, Removal::low_rank>(in, to);
    return std::make_tuple(results.take(0), results.take(1), results.take(2), results.take(3), results.take(4), results.take(5), results.take(6));
  });
}

}  // namespace
}  // namespace phyla::linear_rnn

STABLE_TORCH_LIBRARY_IMPL(phyla_linear_rnn, CPU, m) {
  m.impl("dplr", TORCH_BOX(&phyla::linear_rnn::dplr));
  m.impl("dplr_backward", TORCH_BOX(&phyla::linear_rnn::dplr_backward));
}

"""Messages: the argument's name, what was expected, what came."""

import re

import pytest
import torch

from phyla.linear_rnn.functional import delta_product, delta_rule, dplr, linear_attention, transition_matrices

B, T, N, H, HV, K, V = 2, 6, 3, 2, 4, 8, 5
PRODUCT = {
    "q": torch.zeros(B, T, H, K),
    "k": torch.zeros(B, T, N, H, K),
    "v": torch.zeros(B, T, N, HV, V),
    "beta": torch.zeros(B, T, N, HV),
    "g": torch.zeros(B, T, HV),
}
PACKED = {name: x[:1] for name, x in PRODUCT.items()}
ERRORS = [
    ({"k": torch.zeros(2, 5, 2, 2, 8)}, ValueError, "k: expected shape (2, 6, n, 2, 8) to match q, got (2, 5, 2, 2, 8)"),
    ({"q": torch.zeros(2, 6, 2)}, ValueError, "q: expected shape (B, T, H, K) with T, H and K at least 1, got (2, 6, 2)"),
    ({"q": torch.zeros(2, 0, 2, 8)}, ValueError, "q: expected shape (B, T, H, K) with T, H and K at least 1, got (2, 0, 2, 8)"),
    ({"q": PRODUCT["q"].long()}, TypeError, "q: expected a float16, bfloat16, float32 or float64 tensor, got int64 on cpu"),
    ({"q": [1.0]}, TypeError, "q: expected a Tensor, got list"),
    ({"v": torch.zeros(2, 6, 3, 3, 5)}, ValueError, "v: expected a number of heads that is a multiple of the 2 of q, got 3"),
    ({"v": torch.zeros(2, 6, 2, 4, 5)}, ValueError, "v: expected shape (2, 6, 3, HV, V) to match q and k, got (2, 6, 2, 4, 5)"),
    ({"beta": torch.zeros(2, 6, 3, 2)}, ValueError, "beta: expected shape (2, 6, 3, 4) to match v, got (2, 6, 3, 2)"),
    ({"g": torch.zeros(2, 6, 2)}, ValueError, "g: expected shape (2, 6, 4) or (2, 6, 4, 8) to match q, got (2, 6, 2)"),
    ({"g": torch.zeros(2, 6)}, ValueError, "g: expected shape (2, 6, 4) or (2, 6, 4, 8) to match q, got (2, 6)"),
    (
        {"initial_state": torch.zeros(1, 4, 8, 5)},
        ValueError,
        "initial_state: expected shape (2, 4, 8, 5) to match q and v, got (1, 4, 8, 5)",
    ),
    ({"k": PRODUCT["k"].to("meta")}, ValueError, "k: expected a tensor on cpu like q, got one on meta"),
    ({"chunk_size": 0}, ValueError, "chunk_size: expected a positive int, got 0"),
    ({"chunk_size": 2.0}, TypeError, "chunk_size: expected a positive int, got float 2.0"),
    ({"mode": "chunks"}, ValueError, "mode: expected one of 'auto', 'recurrent', 'chunk', got 'chunks' (did you mean 'chunk'?)"),
    ({"scale": float("nan")}, ValueError, "scale: expected a number in (-inf, inf), got nan"),
    ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens: expected a batch of 1 that holds the packed sequences, got B=2"),
]
PACKING_ERRORS = [
    (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens: expected an int32 or int64 Tensor, got torch.float32"),
    ([0, 6], TypeError, "cu_seqlens: expected an int32 or int64 Tensor, got list"),
    (torch.tensor([[0, 6]]), ValueError, "cu_seqlens: expected shape (N + 1,) with N at least 1, got (1, 2)"),
    (torch.tensor([0]), ValueError, "cu_seqlens: expected shape (N + 1,) with N at least 1, got (1,)"),
    (torch.tensor([1, 6]), ValueError, "cu_seqlens: expected offsets that start at 0, never decrease and end at 6, got [1, 6]"),
    (torch.tensor([0, 5]), ValueError, "cu_seqlens: expected offsets that start at 0, never decrease and end at 6, got [0, 5]"),
    (torch.tensor([0, 4, 3, 6]), ValueError, "cu_seqlens: expected offsets that start at 0, never decrease and end at 6, got [0, 4, 3, 6]"),
]


@pytest.mark.parametrize("mode", ["auto", "recurrent", "chunk"])
@pytest.mark.parametrize(("changed", "kind", "message"), ERRORS)
def test_delta_product(changed, kind, message, mode):
    with pytest.raises(kind, match="^" + re.escape(message)):
        delta_product(**{"mode": mode, **PRODUCT, **changed})


@pytest.mark.parametrize(("packing", "kind", "message"), PACKING_ERRORS)
def test_packing(packing, kind, message):
    with pytest.raises(kind, match="^" + re.escape(message)):
        delta_product(**PACKED, cu_seqlens=packing)


def test_state_of_packed_sequences():
    with pytest.raises(
        ValueError, match=re.escape("initial_state: expected shape (2, 4, 8, 5) to match q, v and cu_seqlens, got (1, 4, 8, 5)")
    ):
        delta_product(**PACKED, cu_seqlens=torch.tensor([0, 2, 6]), initial_state=torch.zeros(1, 4, 8, 5))


def test_native_kernel_looks_at_offsets_of_traced_calls():
    from phyla.linear_rnn.functional.delta import _delta_product

    args = [*PACKED.values(), None, torch.tensor([0, 99]), 1.0, False, 4]
    with pytest.raises(RuntimeError):
        _delta_product.op(*args)


def test_other_functions():
    x, v = torch.zeros(B, T, H, K), torch.zeros(B, T, H, V)
    with pytest.raises(ValueError, match=re.escape("k: expected shape (2, 6, 2, 8) to match q, got (2, 6, 1, 2, 8)")):
        delta_rule(x, x.unsqueeze(2), v, torch.zeros(B, T, H))
    with pytest.raises(ValueError, match=re.escape("beta: expected shape (2, 6, 2) to match v, got (2, 6, 2, 1)")):
        delta_rule(x, x, v, torch.zeros(B, T, H, 1))
    with pytest.raises(ValueError, match=re.escape("v: expected shape (2, 6, HV, V) to match q, got (2, 6, 5)")):
        linear_attention(x, x, torch.zeros(B, T, V))
    with pytest.raises(ValueError, match=re.escape("g: expected shape (2, 6, 2, 8) to match q, got (2, 6, 2)")):
        dplr(x, x, v, x, x, torch.zeros(B, T, H))
    with pytest.raises(ValueError, match=re.escape("a: expected shape (2, 6, 2, 8) to match q, got (2, 6, 2, 5)")):
        dplr(x, x, v, v, x, x)
    with pytest.raises(ValueError, match=re.escape("beta: expected shape (2, 6, 3, 2) to match k, got (2, 6, 3, 4)")):
        transition_matrices(PRODUCT["k"], PRODUCT["beta"])

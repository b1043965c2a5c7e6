from functools import partial

import pytest
import torch
from oracles_mlstm import conv_oracle, separately
from torch import Tensor

from phyla.linear_rnn.functional import causal_conv1d
from phyla.linear_rnn.functional.conv import _causal_conv1d
from phyla.shared.testing import assert_close, check_kernel, fuzz


def inputs(batch: int = 2, tokens: int = 11, channels: int = 5, width: int = 4, states: int | None = None, seed: int = 0):
    """x, weight, bias, state, float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, tokens, channels), (channels, width), (channels,), (batch if states is None else states, width - 1, channels)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]


def run(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, **options):
    return causal_conv1d(x, weight, bias, initial_state=state, **options)


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    return outs, torch.autograd.grad(outs, leaves, cotangents, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("tokens", "channels", "width"), [(11, 5, 4), (1, 3, 4), (2, 1, 4), (3, 8, 7), (40, 17, 1), (70, 33, 2), (300, 40, 3)]
)
def test_it_is_the_grouped_convolution(tokens: int, channels: int, width: int, with_bias: bool, activation) -> None:
    x, weight, bias, state = inputs(2, tokens, channels, width)
    tensors = [x, weight, *([bias] if with_bias else []), state]

    def split(function):
        return lambda x, weight, *rest: function(x, weight, rest[0] if with_bias else None, rest[-1])

    mine = gradients(split(partial(run, activation=activation)), tensors)
    theirs = gradients(split(partial(conv_oracle, silu=activation == "silu")), tensors)
    for a, b in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1]), strict=True):
        assert_close("result", a, b, 1e-9)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("pieces", [(5, 6), (1, 2, 8), (1,) * 11])
def test_pieces_give_the_whole(pieces: tuple[int, ...], width: int) -> None:
    x, weight, bias, state = inputs(width=width)
    whole = run(x, weight, bias, state, activation="silu")
    outs = []
    for part in x.split(pieces, 1):
        kept = state.clone()
        y, after = run(part, weight, bias, state, activation="silu")
        assert torch.equal(kept, state)
        outs, state = [*outs, y], after
    assert_close("outputs", torch.cat(outs, 1), whole[0], 1e-12)
    assert torch.equal(state, whole[1])


def test_no_state_is_a_state_of_zeros() -> None:
    x, weight, bias, state = inputs()
    for a, b in zip(causal_conv1d(x, weight, bias), run(x, weight, bias, torch.zeros_like(state)), strict=True):
        assert torch.equal(a, b)


def test_the_state_is_a_copy() -> None:
    x, weight, _, _ = inputs()
    _, state = causal_conv1d(x, weight)
    kept = state.clone()
    x.zero_()
    assert torch.equal(kept, state)


@pytest.mark.parametrize("lengths", [(5, 0, 1, 5), (11,), (0, 11), (2, 7, 2, 0), (3, 3, 5)])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_is_separate(lengths: tuple[int, ...], width: int, activation) -> None:
    tensors = inputs(1, width=width, states=len(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)

    def oracle(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor):
        return separately(lambda x, s: conv_oracle(x, weight, bias, s, activation == "silu"), lengths, [x], [state])

    mine = gradients(partial(run, activation=activation, cu_seqlens=offsets), tensors)
    theirs = gradients(oracle, tensors)
    for a, b in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1]), strict=True):
        assert_close("packed", a, b, 1e-9)


def test_packed_sequences_do_not_see_each_other() -> None:
    x, weight, bias, state = inputs(1, states=3)
    offsets = torch.tensor([0, 4, 6, 11])
    spoilt = x.clone()
    spoilt[:, 4:6] = torch.nan
    clean = gradients(partial(run, activation="silu", cu_seqlens=offsets), (x, weight, bias, state))
    got = gradients(partial(run, activation="silu", cu_seqlens=offsets), (spoilt, weight, bias, state))
    for a, b in ((got[0][0], clean[0][0]), (got[1][0], clean[1][0])):
        assert torch.equal(a[:, :4], b[:, :4])
        assert torch.equal(a[:, 6:], b[:, 6:])
    for a, b in ((got[0][1], clean[0][1]), (got[1][3], clean[1][3])):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("silu", [True, False])
def test_kernel(silu: bool) -> None:
    x, weight, bias, state = inputs(2, 6, 3, 3)

    def reference(x, weight, bias, state, offsets, silu):
        y, last = conv_oracle(x, weight, bias, state, silu)
        return y, last.clone()

    check_kernel(_causal_conv1d, x, weight, bias, state, None, silu, reference=reference, batch=(0, 3))
    check_kernel(_causal_conv1d, x, weight, None, None, None, silu)


def test_kernel_packed() -> None:
    x, weight, bias, state = inputs(1, 9, 3, 3, states=3)
    offsets = torch.tensor([0, 4, 4, 9])
    torch.library.opcheck(_causal_conv1d.op, (x, weight, bias, state, offsets, True))
    compiled = torch.compile(partial(run, activation="silu", cu_seqlens=offsets), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, weight, bias, state), _causal_conv1d.plain(x, weight, bias, state, offsets, True), strict=True):
        assert_close("compiled", a, b, 1e-12)


def test_dtypes() -> None:
    x, weight, bias, state = inputs()
    y, last = causal_conv1d(x.bfloat16(), weight.float(), bias.bfloat16(), initial_state=state.float())
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = conv_oracle(x.bfloat16().double(), weight.float().double(), bias.bfloat16().double(), state.float().double(), False)
    assert_close("bfloat16", y, expected, 1e-2)


def test_long_sums_are_accurate() -> None:
    """The gradient of a weight is a sum over all tokens."""
    x, weight, bias, _ = (t.float() for t in inputs(1, 20000, 8))
    mine, theirs = (
        gradients(lambda *t: causal_conv1d(*t, activation="silu"), [t.to(d) for t in (x, weight, bias)]) for d in (x.dtype, torch.float64)
    )
    for a, b in zip(mine[1], theirs[1], strict=True):
        assert_close("gradient", a, b, 1e-5)


def test_fuzz() -> None:
    fuzz(lambda x, w, b, s: causal_conv1d(x, w, b, initial_state=s, activation="silu"), *inputs())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 0, 5)}, ValueError, r"^x: expected shape \(B, T, D\) with T and D at least 1, got \(2, 0, 5\)"),
        ({"x": torch.zeros(11, 5)}, ValueError, "^x: expected shape"),
        ({"x": torch.zeros(2, 11, 5, dtype=torch.int64)}, TypeError, "^x: expected a float"),
        ({"weight": torch.zeros(6, 4)}, ValueError, "^weight: expected shape"),
        ({"weight": torch.zeros(5, 1, 4)}, ValueError, "^weight: expected shape"),
        ({"bias": torch.zeros(4)}, ValueError, "^bias: expected shape"),
        ({"initial_state": torch.zeros(2, 4, 5)}, ValueError, r"^initial_state: expected shape \(2, 3, 5\)"),
        ({"activation": "gelu"}, ValueError, "^activation: expected one of"),
        ({"activation": True}, TypeError, "^activation: expected one of"),
        ({"cu_seqlens": torch.tensor([0, 11])}, ValueError, "^cu_seqlens: expected a batch of 1"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    x, weight, bias, _ = inputs()
    with pytest.raises(error, match=message):
        causal_conv1d(**({"x": x, "weight": weight, "bias": bias} | change))

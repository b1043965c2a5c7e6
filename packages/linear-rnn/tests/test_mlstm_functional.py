from functools import partial
from pathlib import Path

import pytest
import torch
from oracles_mlstm import mlstm_oracle, separately
from torch import Tensor

from phyla.linear_rnn.functional import MLSTMState, mlstm
from phyla.linear_rnn.functional.mlstm import _mlstm
from phyla.shared.testing import assert_close, check_kernel, fuzz, load_golden

GOLDEN = Path(__file__).parent / "golden"
MODES = ["auto", "recurrent", "chunk"]
NAMES = ("q", "k", "v", "i", "f", "c", "n", "m")
FORMS = 2e-6  # where eps stands makes forms differ by as much


def inputs(batch: int = 2, tokens: int = 21, heads: int = 2, width: int = 5, value: int = 6, states: int | None = None, seed: int = 0):
    """q, k, v, i, f and a state c, n, m, float64."""
    generator = torch.Generator().manual_seed(seed)
    states = batch if states is None else states
    sizes = [(batch, tokens, heads, s) for s in (width, width, value)] + [(batch, tokens, heads)] * 2
    sizes += [(states, heads, width, value), (states, heads, width), (states, heads)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    tensors[4] = tensors[4] + 2.0
    return tensors


def run(*tensors: Tensor, **options):
    """`mlstm` with the state as three tensors."""
    out, state = mlstm(*tensors[:5], initial_state=MLSTMState(*tensors[5:]), **options)
    return out, *state


def gradients(function, tensors, seed: int = 1):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outs = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    return outs, torch.autograd.grad(outs, leaves, cotangents)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlstm_h0", "mlstm_zero_state"])
def test_golden(name: str, mode: str) -> None:
    g = load_golden(GOLDEN / f"{name}.npz")
    keys = [*NAMES[:5], "c0", "n0", "m0"]
    leaves = [g[k].requires_grad_() for k in keys]
    out, c, n, m = run(*leaves, mode=mode, chunk_size=7)
    state = torch.cat([c, n.unsqueeze(-1), m[..., None, None].expand(*n.shape, 1)], -1)
    assert_close("out", out, g["out"], FORMS)
    assert_close("state", state, g["state"], FORMS)
    grads = torch.autograd.grad((out, state), leaves, (g["ct_out"], g["ct_state"]))
    for key, grad in zip(keys[:-1], grads, strict=False):
        assert_close(f"grad_{key}", grad, g[f"grad_{key}"], 5 * FORMS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 21, 50])
def test_every_mode_is_the_definition(mode: str, chunk_size: int | None) -> None:
    tensors = inputs()
    mine = gradients(partial(run, mode=mode, chunk_size=chunk_size), tensors)
    theirs = gradients(partial(mlstm_oracle, scale=5**-0.5, eps=1e-6), tensors)
    for name, a, b in zip(("out", "c", "n", "m"), mine[0], theirs[0], strict=True):
        assert_close(name, a, b, FORMS)
    for name, a, b in zip(NAMES, mine[1], theirs[1], strict=True):
        assert_close(f"gradient of {name}", a, b, 5 * FORMS)


@pytest.mark.parametrize(("tokens", "width", "value"), [(1, 3, 4), (2, 1, 1), (65, 16, 16), (130, 17, 33)])
def test_sizes(tokens: int, width: int, value: int) -> None:
    tensors = inputs(1, tokens, 3, width, value)
    mine, theirs = gradients(run, tensors), gradients(partial(mlstm_oracle, scale=width**-0.5, eps=1e-6), tensors)
    for a, b in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1]), strict=True):
        assert_close("result", a, b, 5 * FORMS)


@pytest.mark.parametrize("mode", MODES)
def test_scale_and_eps(mode: str) -> None:
    tensors = inputs()
    for a, b in zip(run(*tensors, mode=mode, scale=0.3, eps=0.5), mlstm_oracle(*tensors, scale=0.3, eps=0.5), strict=True):
        assert_close("result", a, b, 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_no_state_is_a_state_of_zeros(mode: str) -> None:
    tensors = inputs()
    out, state = mlstm(*tensors[:5], mode=mode)
    for a, b in zip((out, *state), run(*tensors[:5], *(torch.zeros_like(t) for t in tensors[5:]), mode=mode), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pieces", [(10, 11), (1, 1, 19), (1,) * 21])
def test_pieces_give_the_whole(mode: str, pieces: tuple[int, ...]) -> None:
    tensors = inputs()
    whole = run(*tensors, mode=mode)
    outs, state = [], tensors[5:]
    for part in zip(*(t.split(pieces, 1) for t in tensors[:5]), strict=True):
        kept = [s.clone() for s in state]
        out, *after = run(*part, *state, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))
        outs, state = [*outs, out], after
    for a, b in zip((torch.cat(outs, 1), *state), whole, strict=True):
        assert_close("pieces", a, b, FORMS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [(5, 0, 1, 15), (21,), (0, 21), (2, 17, 2, 0)])
def test_packed_is_separate(mode: str, lengths: tuple[int, ...]) -> None:
    tensors = inputs(1, states=len(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    oracle = partial(mlstm_oracle, scale=5**-0.5, eps=1e-6)
    mine = gradients(partial(run, mode=mode, cu_seqlens=offsets, chunk_size=4), tensors)
    theirs = gradients(lambda *t: separately(oracle, lengths, t[:5], t[5:]), tensors)
    for a, b in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1]), strict=True):
        assert_close("packed", a, b, 5 * FORMS)


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_do_not_see_each_other(mode: str) -> None:
    tensors = inputs(1, states=3)
    offsets = torch.tensor([0, 8, 13, 21])
    clean = gradients(partial(run, mode=mode, cu_seqlens=offsets), tensors)
    spoilt = [t.clone() for t in tensors]
    for t in spoilt[:5]:
        t[:, 8:13] = torch.nan
    got = gradients(partial(run, mode=mode, cu_seqlens=offsets), spoilt)
    for a, b in zip((got[0][0], *got[1][:5]), (clean[0][0], *clean[1][:5]), strict=True):
        assert torch.equal(a[:, :8], b[:, :8])
        assert torch.equal(a[:, 13:], b[:, 13:])
    for a, b in zip((*got[0][1:], *got[1][5:]), (*clean[0][1:], *clean[1][5:]), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(1, 5, 2, 2, 3)]
    torch.autograd.gradcheck(partial(run, mode=mode, chunk_size=2), tensors, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_output_does_not_depend_on_the_stabiliser(mode: str) -> None:
    """(c, n, m) and (e^s c, e^s n, m - s) are one memory."""
    *tensors, c, n, m = inputs()
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    moved = (shift.exp()[None, :, None, None] * c, shift.exp()[None, :, None] * n, m - shift)
    assert_close("out", run(*tensors, *moved, mode=mode, eps=0.0)[0], run(*tensors, c, n, m, mode=mode, eps=0.0)[0], 1e-9)
    m = m.requires_grad_()
    (grad,) = torch.autograd.grad(run(*tensors, *moved[:2], m, mode=mode, eps=0.0)[0].sum(), m)
    assert grad.abs().max() > 1e-3  # with c and n fixed, m scales the memory,
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # with the memory fixed it does nothing
    out = run(*tensors, s.exp()[:, None, None] * c, s.exp()[:, None] * n, m.detach() - s, mode=mode, eps=0.0)[0]
    assert torch.autograd.grad(out.sum(), s)[0].abs().max() < 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates(mode: str, dtype: torch.dtype) -> None:
    tensors = inputs(1, 40)
    tensors[4][:, [0, 7, 8, 30]] = -1e4
    tensors[3][:, [0, 8, 12, 31]] = -1e4
    tensors[3][:, 20] = 500.0
    mine = gradients(partial(run, mode=mode, chunk_size=16), [t.to(dtype) for t in tensors])
    theirs = gradients(partial(run, mode="recurrent"), tensors)
    for a, b in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1]), strict=True):
        assert a.isfinite().all()
        assert_close("extreme gate", a, b, 5e-3 if dtype == torch.float32 else 5 * FORMS)
    assert_close("extreme gate", mine[0][0], mlstm_oracle(*tensors, scale=5**-0.5, eps=1e-6)[0], 3e-3 if dtype == torch.float32 else FORMS)


def test_a_strong_forget_gate_leaves_its_neighbours_their_digits() -> None:
    tensors = [t.float() for t in inputs(1, 64)]
    tensors[4][:, 10] = -1e4
    after = [t[:, 11:] for t in tensors[:5]]
    fresh = run(*(t[:, 10:11] for t in tensors[:5]), *tensors[5:])[1:]
    assert_close("out", run(*tensors, chunk_size=64, mode="chunk")[0][:, 11:], run(*after, *fresh, mode="recurrent")[0], 2e-5)


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.float32, 2e-4, 1e-3), (torch.bfloat16, 1e-2, 2e-2)])
def test_precision(dtype: torch.dtype, forward: float, backward: float) -> None:
    tensors = [t.to(dtype) for t in inputs(1, 1500, 2, 16, 16)[:5]]
    exact = gradients(lambda *t: mlstm(*t, mode="chunk")[:1], [t.double() for t in tensors])
    mine = gradients(lambda *t: mlstm(*t)[:1], tensors)
    assert_close("out", mine[0][0], exact[0][0], forward)
    assert mine[0][0].dtype == dtype
    assert {s.dtype for s in mlstm(*tensors)[1]} == {torch.float32}
    for a, b in zip(mine[1], exact[1], strict=True):
        assert_close("gradient", a, b, backward)


def test_mixed_dtypes() -> None:
    tensors = inputs()
    mixed = [*(t.bfloat16() for t in tensors[:3]), *(t.float() for t in tensors[3:5])]
    out, state = mlstm(*mixed)
    expected, _ = mlstm(*(t.double() for t in mixed))
    assert (out.dtype, state.c.dtype) == (torch.bfloat16, torch.float32)
    assert_close("out", out, expected, 1e-2)


def test_kernel() -> None:
    tensors = inputs(2, 5, 2, 2, 3)

    def reference(*args):
        return mlstm_oracle(*args[:8], scale=args[9], eps=args[10])

    check_kernel(_mlstm, *tensors, None, 0.7, 1e-6, 4, reference=reference, batch=range(8))


def test_kernel_packed() -> None:
    *tensors, c, n, m = inputs(1, 9, 2, 2, 3, states=3)
    offsets = torch.tensor([0, 4, 4, 9])
    for op in (_mlstm.op, torch.compile(_mlstm, fullgraph=True, backend="aot_eager")):
        got = op(*tensors, c, n, m, offsets, 0.7, 1e-6, 4)
        for a, b in zip(got, _mlstm.plain(*tensors, c, n, m, offsets, 0.7, 1e-6, 0), strict=True):
            assert_close("packed", a, b, FORMS)
    torch.library.opcheck(_mlstm.op, (*tensors, c, n, m, offsets, 0.7, 1e-6, 4))


def test_results_do_not_depend_on_threads() -> None:
    tensors = [t.float() for t in inputs(3, 70, 3, 16, 20)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outs, grads = gradients(run, tensors)
            results.append([*outs, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fuzz() -> None:
    fuzz(lambda *t: mlstm(*t[:5], initial_state=MLSTMState(*t[5:])), *inputs())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 0, 2, 5)}, ValueError, r"^q: expected shape \(B, T, H, K\) with T, H and K at least 1, got \(2, 0, 2, 5\)"),
        ({"q": torch.zeros(2, 21, 5)}, ValueError, r"^q: expected shape"),
        ({"k": torch.zeros(2, 20, 2, 5)}, ValueError, r"^k: expected shape \(2, 21, 2, 5\) to match q, got \(2, 20, 2, 5\)"),
        ({"v": torch.zeros(2, 21, 4, 6)}, ValueError, r"^v: expected shape"),
        ({"v": torch.zeros(2, 21, 2, 6, dtype=torch.int64)}, TypeError, r"^v: expected a float"),
        ({"i": torch.zeros(2, 21, 2, 1)}, ValueError, r"^i: expected shape"),
        ({"f": None}, TypeError, r"^f: expected a Tensor"),
        ({"f": torch.zeros(2, 21, 2, device="meta")}, ValueError, r"^f: expected a tensor on cpu"),
        ({"initial_state": torch.zeros(2, 2, 5, 6)}, TypeError, r"^initial_state: expected an MLSTMState"),
        (
            {"initial_state": MLSTMState(torch.zeros(2, 2, 5, 7), torch.zeros(2, 2, 5), torch.zeros(2, 2))},
            ValueError,
            r"^initial_state.c: expected shape \(2, 2, 5, 6\)",
        ),
        (
            {"initial_state": MLSTMState(torch.zeros(2, 2, 5, 6), torch.zeros(2, 2, 5), torch.zeros(3, 2))},
            ValueError,
            r"^initial_state.m: expected shape \(2, 2\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 21])}, ValueError, r"^cu_seqlens: expected a batch of 1"),
        ({"chunk_size": 0}, ValueError, r"^chunk_size: expected a positive int"),
        ({"chunk_size": 2.0}, TypeError, r"^chunk_size: expected a positive int"),
        ({"mode": "parallel"}, ValueError, r"^mode: expected one of"),
        ({"scale": "big"}, TypeError, r"^scale: expected a number"),
        ({"eps": -1.0}, ValueError, r"^eps: expected a number"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = dict(zip(NAMES[:5], inputs(), strict=False)) | change
    with pytest.raises(error, match=message):
        mlstm(**arguments)


@pytest.mark.parametrize(
    ("offsets", "error"),
    [([0, 5, 20], ValueError), ([1, 21], ValueError), ([0, 9, 5, 21], ValueError), ([21], ValueError), ([0.0, 21.0], TypeError)],
)
def test_bad_offsets(offsets: list, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^cu_seqlens: expected"):
        mlstm(*inputs(1)[:5], cu_seqlens=torch.tensor(offsets))

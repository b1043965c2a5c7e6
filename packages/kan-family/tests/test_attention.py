from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phyla.kan_family.attention import AttentionOperator, KANAttention
from phyla.kan_family.bases import RBF, Basis, BSpline, Chebyshev, Fourier, Rational, ReLUBump, Wavelet
from phyla.kan_family.functional.attention import _fourier_hidden, learned_attention, learned_attention_weights, simplex_projection
from phyla.shared.testing import assert_close, check_kernel, check_module, fuzz, golden_text, load_golden

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(p.stem for p in GOLDEN.glob("karat_*.npz"))
NAMES = ("q", "k", "v", "coef", "proj")
BASES: tuple[Basis, ...] = (Fourier(3), BSpline(), Chebyshev(), RBF(), Wavelet(), ReLUBump(), Rational(1))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fourier(frequencies: int) -> Callable[[Tensor], Tensor]:
    """The Fourier basis as a plain function."""
    m = torch.arange(1, frequencies + 1)
    return lambda x: torch.cat([(x[..., None] * m).cos(), (x[..., None] * m).sin()], dim=-1)


def operands(
    batch: int = 2, heads: int = 2, queries: int = 7, keys: int = 5, width: int = 3, rank: int = 2, functions: int = 4
) -> list[Tensor]:
    shapes = ((batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, width), (heads, rank, keys, functions))
    return [draw(*s, seed=i) for i, s in enumerate((*shapes, (heads, keys, rank)))]


def hidden_oracle(q: Tensor, k: Tensor, coef: Tensor, padding: Tensor | None, base: str, scale: float) -> Tensor:
    """Section 8.1's double sum, one key and one frequency after the other."""
    b = {"none": torch.zeros_like, "identity": lambda a: a, "silu": nn.functional.silu, "gelu": nn.functional.gelu}[base]
    out = q.new_zeros((*q.shape[:3], coef.shape[1]))
    for j in range(k.shape[2]):
        a = (q * k[:, :, None, j]).sum(-1, keepdim=True) * scale
        term = b(a).expand_as(out)
        frequencies = coef.shape[3] // 2
        for m in range(frequencies):
            cosine, sine = coef[:, :, j, m, None].mT, coef[:, :, j, frequencies + m, None].mT
            term = term + cosine * torch.cos((m + 1) * a) + sine * torch.sin((m + 1) * a)
        out = out + (term if padding is None else term * (~padding[:, j, None, None, None]))
    return out


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_golden(name: str, native: bool) -> None:
    g = load_golden(GOLDEN / f"{name}.npz")
    frequencies, base = int(g["num_frequencies"]), golden_text(g["base"])
    options = {
        "basis": Fourier(frequencies).build(g["k"].shape[2], dtype=torch.float64) if native else fourier(frequencies),
        "base": None if base == "none" else base,
        "projection": golden_text(g["projection"]),
    }
    leaves = [g[n].requires_grad_() for n in NAMES]
    out = learned_attention(*leaves, **options)
    assert_close("output", out, g["output"], 1e-9)
    scores = g["q"] @ g["k"].mT * g["q"].shape[-1] ** -0.5
    assert_close("weights", learned_attention_weights(scores, g["coef"], g["proj"], **options), g["weights"], 1e-9)
    if "grad_q" in g:
        for n, grad in zip(NAMES, torch.autograd.grad(out, leaves, g["grad_output"]), strict=True):
            assert_close(n, grad, g[f"grad_{n}"], 1e-9)


def test_kernel() -> None:
    q, k, _, coef, _ = operands(queries=2, keys=3, width=2, rank=1)
    check_kernel(_fourier_hidden, q, k, coef, None, "silu", 0.7, reference=hidden_oracle, batch=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("base", "frequencies"), [("none", 1), ("identity", 4), ("silu", 2), ("gelu", 3)])
def test_kernel_with_padding_and_many_tiles(base: str, frequencies: int, dtype: torch.dtype) -> None:
    q, k, _, coef, _ = operands(batch=2, heads=3, queries=75, keys=300, width=5, rank=3, functions=2 * frequencies)
    padding = draw(2, 300, seed=9) > 0.5
    results = []
    for function, to in ((_fourier_hidden, dtype), (hidden_oracle, torch.float64)):
        leaves = [t.to(to).requires_grad_() for t in (q, k, coef)]
        out = function(*leaves, padding, base, 0.6)
        results.append((out, *torch.autograd.grad(out, leaves, draw(*out.shape, seed=3).to(to))))
    for n, ours, theirs, tolerance in zip(("value", "q", "k", "coef"), *results, (5e-6, 2e-5, 2e-5, 2e-5), strict=True):
        assert_close(n, ours, theirs, tolerance if dtype == torch.float32 else 1e-9)
    assert not results[0][2].mT[..., padding[0]][0].any()
    assert not results[0][3][:, :, padding.all(0)].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e7])
def test_large_scores(size: float, dtype: torch.dtype) -> None:
    """Scores of any size: the phase is reduced, or left to the C library where a reduction in one step would not do."""
    q, k, coef = draw(1, 1, 40, 1).to(dtype) * size, torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 2, dtype=dtype)
    exact = hidden_oracle(q.double(), k.double(), coef.double(), None, "none", 1.0)
    assert_close("value", _fourier_hidden(q, k, coef, None, "none", 1.0), exact, 1e-9 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("base", [None, "gelu"])
@pytest.mark.parametrize("basis", BASES, ids=lambda b: type(b).__name__)
def test_every_basis(basis: Basis, base: str | None) -> None:
    """The route of the package's own bases agrees with the definition, and so do padded and cut sequences."""
    q, k, v, coef, proj = operands(queries=40, keys=6, functions=basis.num_basis)
    built = basis.build(6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v, coef, proj, *built.parameters())]
    scores = q @ k.mT * 3**-0.5
    weights = torch.einsum("bhnNk,hrNk->bhnr", built(scores), coef)
    if base:
        weights = weights + nn.functional.gelu(scores).sum(-1, keepdim=True)
    direct = (weights @ proj.mT) @ v
    ours = learned_attention(q, k, v, coef, proj, basis=built, base=base)
    cotangent = draw(*ours.shape, seed=4)
    for j, (a, b) in enumerate(
        zip(torch.autograd.grad(ours, leaves, cotangent), torch.autograd.grad(direct, leaves, cotangent), strict=True)
    ):
        assert_close(f"gradient {j}", a, b, 1e-9)
    assert_close("value", ours, direct, 1e-9)

    none = torch.zeros(2, 6, dtype=torch.bool)
    assert_close("no padding", learned_attention(q, k, v, coef, proj, basis=built, base=base, key_padding_mask=none), direct, 1e-9)


@pytest.mark.parametrize("projection", ["none", "hidden", "output"])
@pytest.mark.parametrize("native", [True, False])
def test_padding_has_no_influence(native: bool, projection: str) -> None:
    q, k, v, coef, proj = operands(keys=6)
    basis = Fourier(2).build(6, dtype=torch.float64) if native else fourier(2)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    run = lambda q, k, v: learned_attention(  # noqa: E731
        q, k, v, coef, proj, basis=basis, base="silu", projection=projection, key_padding_mask=padding
    )
    out = run(q, k, v)
    wild = [t.clone() for t in (k, v)]
    for t, value in zip(wild, (float("nan"), float("inf")), strict=True):
        t[1, :, 4:] = value
    assert torch.equal(run(q, *wild), out)
    short = learned_attention(
        q[1:], k[1:, :, :4], v[1:, :, :4], coef[:, :, :4], proj[:, :4], basis=fourier(2), base="silu", projection=projection
    )
    assert_close("cut sequence", out[1:], short, 1e-9)


@pytest.mark.parametrize("projection", ["none", "hidden", "output"])
def test_second_derivatives_of_plain_functions(projection: str) -> None:
    leaves = [t.requires_grad_() for t in operands(batch=1, heads=1, queries=3, keys=4, width=2)]
    function = lambda *t: learned_attention(*t, basis=fourier(2), projection=projection)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("projection", ["none", "hidden", "output"])
@pytest.mark.parametrize("basis", [Fourier(2), RBF(4)], ids=["fourier", "rbf"])
def test_transforms(basis: Basis, projection: str) -> None:
    tensors = operands()
    built = basis.build(5, dtype=torch.float64)
    function = lambda q: learned_attention(q, *tensors[1:], basis=built, projection=projection).square().sum()  # noqa: E731
    q = tensors[0].requires_grad_()
    (expected,) = torch.autograd.grad(function(q), q)
    assert_close("grad", torch.func.grad(function)(q), expected, 1e-9)
    tangent = draw(*q.shape, seed=8)
    assert_close("jvp", torch.func.jvp(function, (q,), (tangent,))[1], (expected * tangent).sum(), 1e-9)
    stacked = torch.stack([q, 2 * q])
    assert_close("vmap", torch.vmap(torch.func.grad(function))(stacked)[1], torch.func.grad(function)(2 * q), 1e-9)


def test_dropout() -> None:
    """The mean over many draws is the output without dropout; forward and recomputation draw alike."""
    q, k, v, coef, proj = operands(batch=1, queries=40)
    basis = Fourier(2).build(5, dtype=torch.float64)
    torch.manual_seed(0)
    plain = learned_attention(q, k, v, coef, proj, basis=basis)
    many = [t.expand(4000, -1, -1, -1) for t in (q, k, v)]
    assert_close("mean", learned_attention(*many, coef, proj, basis=basis, dropout=0.3).mean(0, keepdim=True), plain, 0.03)
    v.requires_grad_()
    out = learned_attention(q, k, v, coef, proj, basis=basis, dropout=0.3)
    (grad,) = torch.autograd.grad(out, v, out.detach())
    assert_close("linear in v", (grad * v).sum(), out.square().sum(), 1e-9)  # v . (W^T W v) = |W v|^2 only if both W are the same


def test_simplex_projection_is_the_nearest_point() -> None:
    y = draw(6, 9)
    x = simplex_projection(y)
    assert (x >= 0).all()
    assert_close("sum", x.sum(-1), torch.ones(6, dtype=torch.float64), 1e-12)
    assert_close("idempotent", simplex_projection(x), x, 1e-12)
    corners = torch.eye(9, dtype=torch.float64)
    angles = torch.einsum("ni,nci->nc", y - x, corners - x[:, None])  # no corner lies on y's side of the tangent plane at x
    assert (angles <= 1e-12).all()
    assert_close("dimension", simplex_projection(y.mT, dim=0).mT, x, 0.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
def test_simplex_projection_of_anything(values: list[float]) -> None:
    x = simplex_projection(torch.tensor(values, dtype=torch.float64))
    assert (x >= 0).all()
    assert abs(float(x.sum()) - 1) < 1e-8


def test_simplex_projection_derivatives_and_special_values() -> None:
    y = draw(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(simplex_projection, (y,))
    assert torch.autograd.gradgradcheck(simplex_projection, (y,))
    (grad,) = torch.autograd.grad(simplex_projection(y), y, draw(3, 7, seed=1))
    support = simplex_projection(y) > 0
    assert not grad[~support].any()
    assert grad.sum(-1).abs().max() < 1e-12
    assert simplex_projection(torch.tensor([0.5, -torch.inf, 0.1])).tolist() == pytest.approx([0.7, 0.0, 0.3])
    assert simplex_projection(torch.tensor([0.5, torch.nan, 0.1])).isnan().any()
    assert simplex_projection(torch.zeros(0, 3)).shape == (0, 3)
    torch.testing.assert_close(torch.vmap(simplex_projection)(y), simplex_projection(y))


def make(**options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return KANAttention(12, 3, 7, rank=4, **options)

    return build


@pytest.mark.parametrize("options", [{}, {"basis": RBF(4), "projection": "hidden"}], ids=["fourier", "rbf-hidden"])
def test_module_battery(options: dict[str, object]) -> None:
    check_module(make(**options), draw(3, 7, 12).float())


def test_hybrid_battery() -> None:
    reason = "torch's fused softmax attention has no forward mode and no second derivatives on the CPU"
    options = {"softmax_heads": 1, "base": "silu", "projection": "output"}
    check_module(make(**options), draw(3, 7, 12).float(), without={"module_transforms": reason})


def test_operator_battery() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return AttentionOperator(2, 5, rank=3, basis="chebyshev", base="identity")

    check_module(build, draw(3, 2, 4, 5).float())


def test_attention_is_its_weights_times_values() -> None:
    layer = KANAttention(12, 3, 7, rank=4, softmax_heads=1, base="gelu").double()
    x = draw(2, 7, 12)
    values = layer.qkv(x)[..., 24:].unflatten(-1, (3, 4)).transpose(1, 2)
    expected = layer.proj((layer.attention_weights(x) @ values).transpose(1, 2).flatten(2))
    assert_close("output", layer(x), expected, 1e-9)
    assert_close("softmax head", layer.attention_weights(x)[:, 0].sum(-1), torch.ones(2, 7, dtype=torch.float64), 1e-12)


def test_padded_tokens_are_seen_by_no_other() -> None:
    layer = KANAttention(12, 3, 7, rank=4, softmax_heads=1)
    x = draw(2, 7, 12).float()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[:, 5:] = True
    changed = x.clone()
    changed[:, 5:] = 100.0
    torch.testing.assert_close(layer(x, key_padding_mask=padding)[:, :5], layer(changed, key_padding_mask=padding)[:, :5])


def test_universal_mode_shares_one_operator() -> None:
    operator = AttentionOperator(3, 7, rank=4)
    model = nn.Sequential(*(KANAttention(12, 3, operator=operator) for _ in range(3)))
    own = nn.Sequential(*(KANAttention(12, 3, 7, rank=4) for _ in range(3)))
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(own) - count(model) == 2 * count(operator) == 2 * (3 * 7 * 4 * (2 * 3 + 1))
    model(draw(2, 7, 12).float()).sum().backward()
    assert operator.coef.grad is not None
    assert model[0].operator is model[2].operator


@pytest.mark.parametrize("basis", BASES, ids=lambda b: type(b).__name__)
def test_start_keeps_the_variance_of_the_values(basis: Basis) -> None:
    torch.manual_seed(0)
    operator = AttentionOperator(4, 64, rank=32, basis=basis)
    q, k, v = (torch.randn(8, 4, 64, 16) for _ in range(3))
    assert 0.6 < float(operator.attend(q, k, v).std()) < 1.6


def test_dropout_only_in_training() -> None:
    layer = KANAttention(12, 3, 7, attn_dropout=0.5, proj_dropout=0.5)
    x = draw(2, 7, 12).float()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest number of elements that any op returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size() if isinstance(t, Tensor) else 0)
        return out


@pytest.mark.parametrize("native", [True, False])
def test_memory(native: bool) -> None:
    """Kept for backward: at most 4.6 times q, inputs included; no tensor of a step half as large as the basis values would be."""
    batch, heads, tokens, width, rank, frequencies = 2, 3, 197, 64, 12, 3
    q, k, v = (torch.randn(batch, heads, tokens, width, requires_grad=True) for _ in range(3))
    coef, proj = torch.randn(heads, rank, tokens, 2 * frequencies, requires_grad=True), torch.randn(heads, tokens, rank, requires_grad=True)
    basis = Fourier(frequencies).build(tokens)
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with _Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = learned_attention(q, k, v, coef, proj, basis=basis if native else lambda x: basis(x))
        out.sum().backward()
    for parameter in (coef, proj):
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 4.6 * q.untyped_storage().nbytes()
    assert largest.elements < batch * heads * tokens**2 * 2 * frequencies / 2


def test_errors() -> None:
    q, k, v, coef, proj = operands()
    basis = fourier(2)
    layer = KANAttention(12, 3, 7)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (
            ValueError,
            r"k: expected shape \(2, 2, 5, 3\), got shape \(2, 2, 4, 3\)",
            lambda: learned_attention(q, k[:, :, 1:], v, coef, proj, basis=basis),
        ),
        (ValueError, "q: expected shape", lambda: learned_attention(q[0], k, v, coef, proj, basis=basis)),
        (ValueError, r"proj: expected shape \(2, 5, 2\)", lambda: learned_attention(q, k, v, coef, proj.mT, basis=basis)),
        (TypeError, "v: expected a float", lambda: learned_attention(q, k, v.long(), coef, proj, basis=basis)),
        (ValueError, "base: expected one of 'silu'", lambda: learned_attention(q, k, v, coef, proj, basis=basis, base="swish")),
        (
            ValueError,
            "projection: expected one of",
            lambda: learned_attention_weights(q @ k.mT, coef, proj, basis=basis, projection="both"),
        ),
        (ValueError, "scores: expected shape", lambda: learned_attention_weights(q[0], coef, proj, basis=basis)),
        (ValueError, "dropout: expected", lambda: learned_attention(q, k, v, coef, proj, basis=basis, dropout=1.5)),
        (
            TypeError,
            "key_padding_mask: expected a bool",
            lambda: learned_attention(q, k, v, coef, proj, basis=basis, key_padding_mask=torch.ones(2, 5)),
        ),
        (
            ValueError,
            "coef: expected 4 basis functions, as basis gives, got 3",
            lambda: learned_attention(q, k, v, coef[..., :3], proj, basis=basis),
        ),
        (ValueError, r"coef: expected shape \(\*, \*, 5, 6\)", lambda: learned_attention(q, k, v, coef, proj, basis=Fourier(3).build(5))),
        (ValueError, "dim: expected", lambda: simplex_projection(torch.zeros(2, 0))),
        (ValueError, "scores: expected 7 tokens, got 6", lambda: AttentionOperator(3, 7)(torch.zeros(1, 3, 6, 6))),
        (ValueError, "k: expected 7 tokens, got 6", lambda: AttentionOperator(3, 7).attend(*(torch.zeros(1, 3, 6, 4) for _ in range(3)))),
        (ValueError, r"x: expected shape \(\*, 7, 12\), got shape \(2, 8, 12\)", lambda: layer(torch.zeros(2, 8, 12))),
        (ValueError, "num_tokens: expected", lambda: KANAttention(12, 3)),
        (ValueError, "num_heads: expected a divisor", lambda: KANAttention(12, 5, 7)),
        (ValueError, "softmax_heads: expected an int from 0 to 2, got 3", lambda: KANAttention(12, 3, 7, softmax_heads=3)),
        (ValueError, "operator: expected 3 heads and 7 tokens, got 2 heads", lambda: KANAttention(12, 3, operator=AttentionOperator(2, 7))),
        (TypeError, "operator: expected an AttentionOperator", lambda: KANAttention(12, 3, operator=nn.Identity())),  # type: ignore[arg-type]
        (ValueError, "rank: expected a positive int, got 0", lambda: AttentionOperator(3, 7, rank=0)),
        (ValueError, "basis: expected a Basis or one of", lambda: AttentionOperator(3, 7, basis="nope")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_fuzz() -> None:
    q, k, v, coef, proj = operands(batch=1, heads=1, queries=2, keys=3, width=2, rank=1)
    basis = Fourier(2).build(3, dtype=torch.float64)
    fuzz(lambda *t: learned_attention(*t, basis=basis), q, k, v, coef, proj)

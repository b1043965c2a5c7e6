import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from phyla.kan_family.functional import rational as public
from phyla.kan_family.functional.rational import _rational, rational
from phyla.kan_family.rational import _COEFFICIENTS, _FUNCTIONS, GRKAN, GroupRational, fit_rational, initial_coefficients, rational_gain
from phyla.shared.testing import assert_close, check_kernel, check_module, fuzz, golden_text, load_golden

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(p.stem for p in GOLDEN.glob("rational_*.npz"))


def oracle(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, dim: int) -> Tensor:
    """The two equations of the paper with explicit powers and one group at a time; |.| has slope zero at zero."""
    rows = max(numerator.shape[0], denominator.shape[0])
    out = []
    for j, z in enumerate(x.movedim(dim, -1).chunk(rows, dim=-1)):
        a, b = numerator[j % numerator.shape[0]], denominator[j % denominator.shape[0]]
        p = sum(a[i] * z**i for i in range(len(a)))
        if form == "sum_abs":
            q = 1 + sum(b[i].abs() * z.abs() ** (i + 1) for i in range(len(b)))
        else:
            q = 1 + sum(b[i] * z ** (i + 1) for i in range(len(b))).abs()
        out.append(p / q)
    return torch.cat(out, dim=-1).movedim(-1, dim)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str) -> None:
    g = load_golden(GOLDEN / f"{name}.npz")
    leaves = [g[k].requires_grad_() for k in ("x", "numerator", "denominator")]
    y = rational(*leaves, form=golden_text(g["form"]))
    assert_close("output", y, g["output"], 1e-9)
    grads = torch.autograd.grad(y, leaves, g["grad_output"])
    for key, grad in zip(("x", "numerator", "denominator"), grads, strict=True):
        assert_close(f"grad_{key}", grad, g[f"grad_{key}"], 1e-9)


@pytest.mark.parametrize(
    ("shape", "dim", "rows", "degree", "form"),
    [
        ((3, 2, 8), -1, (1, 4), (5, 4), "sum_abs"),
        ((2, 8, 1, 2), -3, (4, 4), (5, 4), "abs_sum"),
        ((3, 6), -1, (2, 1), (3, 2), "sum_abs"),
        ((2, 3, 4), -2, (3, 3), (2, 3), "abs_sum"),
    ],
)
def test_kernel(shape: tuple[int, ...], dim: int, rows: tuple[int, int], degree: tuple[int, int], form: str) -> None:
    check_kernel(
        _rational, draw(*shape), draw(rows[0], degree[0] + 1, seed=1), draw(rows[1], degree[1], seed=2), form, dim, reference=oracle
    )


@pytest.mark.parametrize("form", ["sum_abs", "abs_sum"])
@pytest.mark.parametrize(("m", "n"), [(5, 4), (1, 1), (7, 6), (0, 1)])
def test_every_tail_length(m: int, n: int, form: str) -> None:
    a, b = draw(1, m + 1).requires_grad_(), draw(1, n, seed=3).requires_grad_()
    for size in (1, 3, 7, 8, 9, 31, 5000):
        x = draw(2, size, seed=size).requires_grad_()
        mine, theirs = rational(x, a, b, form=form), oracle(x, a, b, form, -1)
        assert_close("value", mine, theirs, 1e-12)
        for one, two in zip(*(torch.autograd.grad(y, (x, a, b), torch.ones_like(y)) for y in (mine, theirs)), strict=True):
            assert_close("gradient", one, two, 1e-11)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, a, b = draw(3, 8), draw(1, 6), draw(4, 4)
    full = torch.autograd.grad(rational(*(t.requires_grad_() for t in (x, a, b))).sum(), (x, a, b))
    for wanted in itertools.chain.from_iterable(itertools.combinations(range(3), r) for r in (1, 2)):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, a, b))]
        got = torch.autograd.grad(rational(*leaves).sum(), [leaves[i] for i in wanted])
        for i, grad in zip(wanted, got, strict=True):
            torch.testing.assert_close(grad, full[i], rtol=1e-12, atol=1e-12)


def test_identity_is_exact() -> None:
    x = torch.randn(64, 40) * 10.0 ** torch.arange(-20, 20)
    act = GroupRational(num_groups=8, init="identity")
    assert torch.equal(act(x), x)
    leaf = x.double().requires_grad_()
    y = rational(leaf, torch.eye(3, dtype=torch.float64)[1:2], torch.zeros(1, 2, dtype=torch.float64), form="abs_sum")
    assert torch.equal(y, leaf)
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], torch.ones_like(leaf))


@pytest.mark.parametrize("name", ["silu", "gelu", "tanh", "relu"])
def test_finite_far_out(name: str) -> None:
    act = GroupRational(num_groups=2, init=name, shared_numerator=False)
    x = torch.tensor([-1e6, -1e5, -1e3, -1.0, 0.0, 1.0, 1e4, 1e6]).requires_grad_()
    act(x).sum().backward()
    for tensor in (act(x), x.grad, act.numerator.grad, act.denominator.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_slope_of_absolute_value_is_zero_at_zero() -> None:
    x, a, b = torch.zeros(1, 2), torch.tensor([[2.0, 3.0]]), torch.tensor([[0.5, -1.0]])
    leaf = x.requires_grad_()
    for form in ("sum_abs", "abs_sum"):
        assert torch.equal(torch.autograd.grad(rational(leaf, a, b, form=form).sum(), leaf)[0], torch.full((1, 2), 3.0))
    zero = torch.zeros(1, 2).requires_grad_()
    grad = torch.autograd.grad(rational(torch.ones(1, 2), a, zero).sum(), zero)[0]
    assert torch.equal(grad, torch.zeros(1, 2))


def test_channel_dimension_needs_no_permutation() -> None:
    x = draw(2, 12, 5, 3)
    act = GroupRational(num_groups=4, dim=1, dtype=torch.float64)
    with torch.no_grad():
        act.denominator.copy_(draw(4, 4))
        last = rational(x.movedim(1, -1), act.numerator, act.denominator).movedim(-1, 1)
        torch.testing.assert_close(act(x), last, rtol=1e-13, atol=1e-13)
        assert act(x).is_contiguous()


def test_saves_no_more_than_the_input() -> None:
    act, x = GroupRational(), torch.randn(64, 768, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        act(x)
    assert sum(kept) <= 1.05 * x.numel()


def test_leading_shapes() -> None:
    act = GroupRational(num_groups=2)
    x = torch.randn(2, 5, 4)
    assert torch.equal(act(x)[1, 2], act(x[1, 2]))
    assert act(x[:0]).shape == (0, 5, 4)
    empty = torch.zeros(0, 4, requires_grad=True)
    act(empty).sum().backward()
    assert act.numerator.grad is not None
    assert torch.equal(act.numerator.grad, torch.zeros(1, 6))


def test_fuzz() -> None:
    fuzz(lambda x, a, b: public(x, a, b), torch.randn(3, 8), torch.randn(1, 6), torch.randn(4, 4))


def max_error(name: str, numerator: Tensor, denominator: Tensor, form: str = "sum_abs") -> float:
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    with torch.no_grad():
        return float((rational(x[:, None], numerator[None], denominator[None], form=form)[:, 0] - _FUNCTIONS[name](x)).abs().max())


@pytest.mark.parametrize(
    ("name", "bound", "gain"),
    [
        ("silu", 3e-6, 2.8108),
        ("gelu", 2e-3, 2.3520),
        ("tanh", 5e-5, 2.5362),
        ("sigmoid", 1e-8, 3.4086),
        ("relu", 4e-2, 2.0044),
        ("leaky_relu", 4e-2, 2.0042),
        ("mish", 1e-4, 2.2107),
        ("elu", 3e-4, 1.5504),
        ("softplus", 1e-5, 1.0855),
    ],
)
def test_table_of_starts(name: str, bound: float, gain: float) -> None:
    a, b = initial_coefficients(name)
    assert max_error(name, a, b) <= bound
    assert rational_gain(a, b) == pytest.approx(gain, abs=2e-4)


def test_gain_is_the_inverse_second_moment() -> None:
    assert set(_COEFFICIENTS) == set(_FUNCTIONS)
    assert GroupRational(init="identity").gain() == pytest.approx(1.0, abs=1e-6)
    act = GroupRational(init="silu", num_groups=4)
    with torch.no_grad():
        act.denominator.copy_(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)))
        z = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(1))
        assert act.gain() == pytest.approx(1 / float(act(z).square().mean()), rel=2e-2)


@pytest.mark.parametrize(
    ("name", "degree", "form", "bound"),
    [
        ("tanh", (3, 2), "sum_abs", 1.4e-3),
        ("gelu", (5, 4), "abs_sum", 5e-4),
        ("silu", (5, 4), "sum_abs", 1.2e-6),
        ("relu", (5, 4), "sum_abs", 1.5e-2),
        ("tanh", (4, 4), "abs_sum", 1e-4),
    ],
)
def test_fit(name: str, degree: tuple[int, int], form: str, bound: float) -> None:
    a, b = fit_rational(_FUNCTIONS[name], degree=degree, form=form)
    assert a.shape == (degree[0] + 1,)
    assert b.shape == (degree[1],)
    assert a.dtype == b.dtype == torch.float64
    assert max_error(name, a, b, form) <= bound


def test_fit_of_a_rational_function_is_exact_and_deterministic() -> None:
    fn = lambda x: (1 + x**2) / (1 + 2 * x.abs())  # noqa: E731
    a, b = fit_rational(fn, degree=(2, 1), interval=(-1.0, 2.0))
    torch.testing.assert_close(a, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.abs(), torch.tensor([2.0], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    again = fit_rational(fn, degree=(2, 1), interval=(-1.0, 2.0))
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])


def test_start_as_any_function_and_degree() -> None:
    act = GroupRational(init=torch.sin, degree=(5, 4), form="abs_sum", shared_numerator=False, num_groups=2)
    assert act.numerator.shape == (2, 6)
    x = torch.linspace(-3, 3, 200)[:, None].expand(-1, 2)
    assert float((act(x) - x.sin()).detach().abs().max()) < 1e-3
    assert GroupRational(init="silu", degree=(3, 2)).numerator.shape == (1, 4)


def test_grkan_golden() -> None:
    g = load_golden(GOLDEN / "grkan_mlp.npz")
    layer = GRKAN(16, 32, 24, num_groups=8, dtype=torch.float64)
    layer.load_state_dict(
        {k.removeprefix("param.").replace("weight_nu", "nu").replace("weight_de", "de"): v for k, v in g.items() if k.startswith("param.")}
    )
    x = g["x"].requires_grad_()
    y = layer(x)
    assert_close("output", y, g["output"], 1e-9)
    y.backward(g["grad_output"])
    assert_close("grad_x", x.grad, g["grad_x"], 1e-9)
    for name, parameter in layer.named_parameters():
        key = name.replace("numerator", "weight_numerator").replace("denominator", "weight_denominator")
        assert_close(name, parameter.grad, g[f"grad.{key}"], 1e-9)


def test_deep_stack_keeps_its_scale() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        stack = nn.Sequential(*(GRKAN(256, 1024, 256) for _ in range(12)))
        mean_square = float(stack(torch.randn(256, 256)).square().mean())
    assert 0.35 <= mean_square <= 3.0


def test_start_is_variance_preserving() -> None:
    torch.manual_seed(0)
    layer = GRKAN(512, 1024, 256, init="gelu")
    assert float(layer.fc1.weight.var()) == pytest.approx(1 / 512, rel=2e-2)
    assert float(layer.fc2.weight.var()) == pytest.approx(2.3520 / 1024, rel=2e-2)
    assert not layer.fc1.bias.any()


def test_group_rational_module() -> None:
    check_module(lambda: GroupRational(num_groups=2), torch.randn(4, 8))


def test_grkan_module() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return GRKAN(8, 16, 4, num_groups=4)

    check_module(make, torch.randn(4, 3, 8))
    assert GRKAN(8, bias=False, num_groups=2).fc1.bias is None


def test_meta_device() -> None:
    assert GRKAN(8, 16, device="meta").fc1.weight.is_meta
    assert GroupRational(device="meta").numerator.is_meta


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: rational(torch.zeros(2, 9), torch.zeros(1, 6), torch.zeros(4, 4)),
            ValueError,
            r"x: expected size .* divisible by 4 groups",
        ),
        (lambda: rational(torch.zeros(2, 8), torch.zeros(2, 6), torch.zeros(4, 4)), ValueError, "denominator: expected 1 or 2 rows"),
        (lambda: rational(torch.zeros(2, 8), torch.zeros(6), torch.zeros(4, 4)), ValueError, r"numerator: expected shape \(1 or groups"),
        (lambda: rational(torch.zeros(2, 8), torch.zeros(1, 6), torch.zeros(1, 4), form="sum"), ValueError, "form: expected one of"),
        (lambda: rational(torch.zeros(2, 8), torch.zeros(1, 6), torch.zeros(1, 4), dim=2), ValueError, "dim: expected a dimension of x"),
        (lambda: rational(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(1, 6), torch.zeros(1, 4)), TypeError, "x: expected a float16"),
        (lambda: GroupRational(num_groups=3)(torch.zeros(2, 8)), ValueError, "divisible by 3 groups"),
        (lambda: GroupRational(init="swoosh"), ValueError, "init: expected one of .*swoosh"),
        (lambda: GroupRational(num_groups=0), ValueError, "num_groups: expected a positive int, got 0"),
        (lambda: GRKAN(12, num_groups=8), ValueError, "num_groups: must divide in_features, got num_groups=8, in_features=12"),
        (lambda: GRKAN(8)(torch.zeros(2, 9)), ValueError, "x: expected last dimension 8"),
        (lambda: fit_rational(torch.tanh, interval=(1.0, 1.0)), ValueError, "interval: expected low < high"),
        (lambda: fit_rational(torch.log), ValueError, "fn: expected finite values"),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=message):
        call()

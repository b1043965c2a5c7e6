import copy
import math
import weakref

import bases_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from test_basis import SPECS, built, curves
from torch import Tensor, nn

from phyla.kan_family import (
    KAN,
    RBF,
    ActivationPair,
    Basis,
    BSpline,
    Chebyshev,
    Fourier,
    Jacobi,
    KANLinear,
    Rational,
    ReLUBump,
    Wavelet,
    functional,
)
from phyla.kan_family.functional import linear as functional_linear
from phyla.kan_family.functional.linear import _basis_linear
from phyla.shared.kernels import Kernel
from phyla.shared.testing import _Case as Battery
from phyla.shared.testing import (
    assert_close,
    check_kernel,
    check_module,
    kernel_compile,
    kernel_empty,
    kernel_export,
    kernel_gradcheck,
    kernel_layouts,
    kernel_nan,
    kernel_opcheck,
    kernel_parity,
    kernel_threads,
    kernel_transforms,
)

BASES = ("silu", "gelu", "relu", "tanh", "identity")
KNOTS = 3  # their place among the arguments of the kernels


def arguments(spec: Basis, base: str | None, rows: int = 5, inputs: int = 3, outputs: int = 2) -> tuple[object, ...]:
    basis = built(spec, inputs)
    o = basis.operands()
    coef = torch.randn(outputs, inputs, spec.num_basis, dtype=torch.float64)
    weight = None if base is None else torch.randn(outputs, inputs, dtype=torch.float64)
    first, second = (None if o[name] is None else o[name].detach().clone() for name in ("first", "second"))
    x = torch.randn(rows, inputs, dtype=torch.float64)
    x = torch.where((x.abs() - 1).abs() < 0.02, 0.9 * x, x)  # away from the kinks of the clamp, which rounding to bfloat16 would cross
    return x, coef, weight, first, second, o["kind"], base or "silu", o["ints"], o["floats"]


def check_with_constant_knots(kernel: Kernel, args: tuple[object, ...]) -> None:
    """`check_kernel`, with the gradients of all arguments but the knots."""
    case = Battery(kernel, args, None, (0,))
    case.places = tuple(i for i in case.places if i != KNOTS)
    for check in (
        kernel_parity,
        kernel_gradcheck,
        kernel_transforms,
        kernel_opcheck,
        kernel_compile,
        kernel_export,
        kernel_nan,
        kernel_threads,
        kernel_layouts,
        kernel_empty,
    ):
        check(case)


@pytest.mark.parametrize(
    ("spec", "base", "second"),
    [(BSpline(5, 4), "silu", True), (BSpline(20, 3), None, True), (Wavelet(), "tanh", True), (ReLUBump(), None, False)],
    ids=str,
)
def test_kernel(spec: Basis, base: str | None, second: bool) -> None:
    args = arguments(spec, base)
    layer = curves(spec, built(spec, 3))

    def reference(x: Tensor, coef: Tensor, base_weight: Tensor | None, *rest: object) -> Tensor:
        return oracle.linear(x, coef, base_weight, base or "silu", layer)

    assert_close("value", _basis_linear(*args), reference(*args), 1e-9)
    if isinstance(spec, BSpline):
        check_with_constant_knots(_basis_linear, args)
    else:
        check_kernel(_basis_linear, *args, second=second)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kernel_of_every_basis(spec: Basis) -> None:
    for base, rows, inputs in (("silu", 37, 5), (None, 300, 19)):
        case = Battery(_basis_linear, arguments(spec, base, rows, inputs, 11), None, (0,))
        kernel_parity(case)
        kernel_threads(case)


@pytest.mark.parametrize("base", BASES)
def test_kernel_of_every_base(base: str) -> None:
    case = Battery(_basis_linear, arguments(RBF(), base, 37), None, (0,))
    kernel_parity(case)
    kernel_gradcheck(Battery(_basis_linear, arguments(RBF(), base, 3), None, (0,)), second=base != "relu")


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("outputs", [1, 9, 40])
def test_large_grids_agree_with_the_composite(order: int, outputs: int) -> None:
    for rows, inputs in ((1, 1), (150, 7)):
        args = arguments(BSpline(64, order), "silu", rows, inputs, outputs)
        x = args[0]
        assert isinstance(x, Tensor)
        x[0] = args[3][:, 0]  # a first knot
        x[-1] = args[3][:, -1]  # a last knot: outside
        case = Battery(_basis_linear, args, None, (0,))
        kernel_parity(case)
        kernel_threads(case)
    x[0, 0] = math.nan
    assert _basis_linear(*args)[0].isnan().all()


@pytest.mark.parametrize("spec", [BSpline(), BSpline(6, 4, outside="linear"), Wavelet(), Fourier(), ActivationPair()], ids=str)
def test_tiles_of_the_composite_make_no_difference(spec: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Derivatives of the first two orders, forward mode, per-sample gradients: from tiles of two rows of an input, and from one tile."""
    args = arguments(spec, "silu", 5, 3, 2)
    case = Battery(_basis_linear, args, None, (0,))
    leaves = [args[i].clone().requires_grad_() for i in case.places]
    function = case.of(_basis_linear.plain, args)

    def derivatives() -> list[Tensor]:
        (y,) = function(*leaves)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        moved = torch.func.jvp(lambda x: function(x, *leaves[1:])[0], (leaves[0].detach(),), (torch.ones_like(leaves[0]),))[1]
        each = torch.func.vmap(torch.func.jacrev(lambda row: function(row[None], *leaves[1:])[0]))(leaves[0].detach())
        return [y, *first, *second, moved, each]

    whole = derivatives()
    monkeypatch.setattr(functional_linear, "_TILE_ROWS", 2)
    monkeypatch.setattr(functional_linear, "_TILE_ELEMENTS", 1)
    for tiled, expected in zip(derivatives(), whole, strict=True):
        assert_close(f"tiles of {spec}", tiled, expected, 1e-12)
    case.places = tuple(i for i in case.places if not (isinstance(spec, BSpline) and i == KNOTS))
    kernel_gradcheck(case, second=True)
    kernel_transforms(case)


@pytest.mark.parametrize("spec", [BSpline(16, 3), RBF(19)], ids=str)
def test_the_composite_keeps_one_tile_alive(spec: Basis) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, inputs = 4096, 256
    alive, peak, known = 0, 0, set()

    def release(pointer: int, size: int) -> None:
        nonlocal alive
        known.discard(pointer)
        alive -= size

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal alive, peak
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor) and t._base is None and t.untyped_storage().data_ptr() not in known:
                    storage = t.untyped_storage()
                    known.add(storage.data_ptr())
                    alive += storage.nbytes()
                    weakref.finalize(t, release, storage.data_ptr(), storage.nbytes())
            peak = max(peak, alive)
            return out

    args = arguments(spec, "silu", rows, inputs, 8)
    leaves = [a.detach().float().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    with Watch():
        _basis_linear.plain(*leaves).sum().backward()
    assert peak < 4 * rows * inputs * spec.num_basis / 2


def test_functional_forms() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)

    def contracted(phi: Tensor, coef: Tensor) -> Tensor:
        return torch.einsum("...ik,oik->...o", phi, coef) + bias

    def coef(functions: int) -> Tensor:
        return torch.randn(4, 3, functions, dtype=torch.float64)

    knots = built(BSpline(6, 2)).knots
    low = torch.randn(3, 7, dtype=torch.float64)
    centers = torch.randn(6, dtype=torch.float64)
    f = functional
    for ours, phi, c in (
        (lambda c: f.bspline_linear(x, c, knots, 2, bias), f.bspline_basis(x, knots, 2), coef(8)),
        (
            lambda c: f.relu_bump_linear(x, c, low, low + 1, scale=4.0, bias=bias),
            f.relu_bump_basis(x, low, low + 1, scale=4.0),
            coef(7),
        ),
        (lambda c: f.fourier_linear(x, c, bias), f.fourier_basis(x, 4), coef(8)),
        (lambda c: f.chebyshev_linear(x, c, bias), f.chebyshev_basis(x, 5), coef(6)),
        (lambda c: f.rbf_linear(x, c, centers, 1.5, bias), f.rbf_basis(x, centers, 1.5), coef(6)),
    ):
        assert_close("functional", ours(c), contracted(phi, c), 1e-12)


@pytest.mark.parametrize("spec", [BSpline(), ReLUBump(), Fourier(), Rational(num_groups=2), ActivationPair()], ids=str)
def test_module(spec: Basis) -> None:
    torch.manual_seed(0)
    check_module(lambda: KANLinear(4, 3, basis=spec), torch.randn(5, 4))


@pytest.mark.parametrize(
    "options",
    [{"base": None, "bias": False}, {"norm": "layer"}, {"norm": "layer", "base": None}, {"base": torch.sin}],
    ids=str,
)
def test_module_options(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = KANLinear(4, 3, dtype=torch.float64, **options)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    z = x if layer.norm is None else F.layer_norm(x, (4,))
    expected = torch.einsum("...ik,oik->...o", layer.basis(z), layer.coef)
    if layer.base is not None:
        expected = expected + F.linear(torch.sin(x) if callable(layer.base) else F.silu(x), layer.base_weight)
    assert_close("layer", layer(x), expected, 1e-12)
    assert torch.autograd.gradcheck(layer, x[0, :2].clone().requires_grad_())


def test_batch_norm_takes_any_leading_shape() -> None:
    layer = KANLinear(4, 3, norm="batch")
    x = torch.randn(2, 5, 4)
    assert_close("train", copy.deepcopy(layer)(x).flatten(0, 1), layer(x.flatten(0, 1)), 1e-6)
    assert isinstance(layer.norm, nn.BatchNorm1d)
    assert layer.norm.running_mean.abs().sum() > 0


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 5, 4), (1, 4), (3, 0, 4)])
@pytest.mark.parametrize("basis", ["bspline", "rational"])
def test_leading_shapes(shape: tuple[int, ...], basis: str) -> None:
    layer = KANLinear(4, 3, basis=Rational(num_groups=2) if basis == "rational" else basis)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 3)
    y.sum().backward()
    assert x.grad.shape == shape
    assert_close("rows", y.reshape(-1, 3), layer(x.reshape(-1, 4)), 1e-6)


def test_edge_outputs_sum_to_the_output() -> None:
    layer = KANLinear(4, 3, norm="layer", dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert_close("edges", layer.edge_outputs(x).sum(-1) + layer.bias, layer(x), 1e-12)


@pytest.mark.parametrize("unbiased", [True, False])
def test_edge_std_is_that_of_the_edge_outputs(unbiased: bool) -> None:
    layer = KANLinear(4, 3, dtype=torch.float64)
    x = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    ours, plain = layer.edge_std(x, unbiased=unbiased), layer.edge_outputs(x).std(0, unbiased=unbiased)
    assert_close("std", ours, plain, 1e-12)
    leaves = [x, layer.coef, layer.base_weight]
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True):
        assert_close("gradient", a, b, 1e-9)


def test_edge_std_of_a_dead_edge_has_a_finite_gradient() -> None:
    layer = KANLinear(2, 2)
    nn.init.zeros_(layer.coef)
    nn.init.zeros_(layer.base_weight)
    layer.edge_std(torch.randn(10, 2)).sum().backward()
    assert (layer.coef.grad == 0).all()


def test_variance_preserving_start() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 256)
    for spec in (BSpline(), ReLUBump(grid_range=(-2.0, 2.0)), Fourier(), Chebyshev(), Jacobi(), RBF(), Wavelet(), Rational()):
        assert KANLinear(256, 128, basis=spec, base=None)(x).square().mean().item() == pytest.approx(1, rel=0.15), spec


def test_the_start_is_seeded() -> None:
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layers.append(KANLinear(4, 3, basis="wavelet"))
    torch.manual_seed(3)
    layers[1].reset_parameters()
    for name, value in layers[0].state_dict().items():
        assert torch.equal(value, layers[1].state_dict()[name]), name


@pytest.mark.parametrize("samples", [3, 400])
def test_update_grid_keeps_the_function_and_the_parameter(samples: int) -> None:
    """Also with fewer samples than functions, and with repeated samples and a constant column."""
    torch.manual_seed(0)
    layer = KANLinear(4, 3, basis=BSpline(8, 3, (-3.0, 3.0)), dtype=torch.float64)
    x = torch.randn(samples, 4, dtype=torch.float64).clamp(-2.9, 2.9)
    x[:, 1] = 0.3
    x[: samples // 2] = x[0]
    before, coef, knots = layer(x), layer.coef, layer.basis.knots.clone()
    layer.update_grid(x)
    assert layer.coef is coef
    assert torch.equal(layer.basis.knots[1], knots[1])
    assert not torch.equal(layer.basis.knots[0], knots[0])
    assert (layer.basis.knots.diff(dim=1) >= 0).all()
    samples_inside = (x < layer.basis.knots[:, -4]).all(1)
    error = (layer(x) - before)[samples_inside].abs().max() / before.abs().max()
    assert error < (1e-6 if samples == 3 else 0.05)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_refining_to_a_multiple_is_lossless(order: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    layer = KANLinear(3, 2, basis=BSpline(4, order), dtype=dtype)
    layer.update_grid(torch.rand(200, 3, dtype=dtype) ** 2)
    low, high = layer.basis.knots[:, order], layer.basis.knots[:, -order - 1]
    x = low + (high - low) * torch.rand(100, 3, dtype=dtype) * 0.9999
    before = layer(x)
    layer.refine(12)
    assert layer.coef.shape == (2, 3, 12 + order)
    assert layer.basis.spec == BSpline(12, order)
    assert_close("refined", layer(x), before, tolerance)


def test_coverage_counts_the_samples_inside_the_grid() -> None:
    layer = KANLinear(2, 1)
    x = torch.tensor([[-1.0, 1.0], [0.0, 0.5], [0.99, -3.0], [2.0, 0.0]])
    assert torch.equal(layer.coverage(x), torch.tensor([0.75, 0.5]))
    assert torch.equal(KANLinear(2, 1, basis="rbf").coverage(x), torch.ones(2))


def test_state_dict_after_refine_and_mask_loads() -> None:
    layer, fresh = KANLinear(4, 3), KANLinear(4, 3)
    layer.refine(9)
    layer.edge_mask = (torch.rand(3, 4) > 0.5).float()
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(KANLinear(4, 3).state_dict())
    assert fresh.edge_mask is None
    with pytest.raises(ValueError, match=r"state_dict: expected coef with \(out_features, in_features\) = \(3, 4\), got \(3, 5\)"):
        layer.load_state_dict(KANLinear(5, 3).state_dict())


def test_masked_edges_are_gone() -> None:
    layer = KANLinear(4, 3, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    edges = layer.edge_outputs(x)
    mask = torch.ones(3, 4, dtype=torch.float64)
    mask[1, 2] = 0
    layer.edge_mask = mask
    assert_close("masked", layer(x), (edges * mask).sum(-1) + layer.bias, 1e-12)


@pytest.mark.parametrize(("base", "limit"), [(None, 2.1), ("silu", 4.1)])
def test_memory_kept_for_backward(base: str | None, limit: float) -> None:
    layer = KANLinear(784, 64, base=base)
    x = torch.randn(1024, 784, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(kept.values()) <= limit * x.nbytes


def test_no_step_makes_a_large_tensor() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, inputs, functions = 4096, 512, 19
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    layer = KANLinear(inputs, 8, basis=BSpline(16, 3))
    x = torch.randn(rows, inputs, requires_grad=True)
    with Watch():
        layer(x).sum().backward()
        layer.edge_std(x.detach())
    assert largest < rows * inputs * functions / 2


def test_second_derivatives_train() -> None:
    """u'' = -pi^2 sin(pi x), u(-1) = u(1) = 0, by a network of order 4."""
    torch.manual_seed(0)
    model = KAN([1, 4, 1], basis=BSpline(6, 4, (-1.5, 1.5)), dtype=torch.float64)
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None].requires_grad_()
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (laplacian,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        loss = (laplacian + math.pi**2 * torch.sin(math.pi * x)).square().mean() + 10 * u[[0, -1]].square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="in_features: expected a positive int, got 0"):
        KANLinear(0, 3)
    with pytest.raises(ValueError, match=r"x: expected last dimension 4, got shape \(2, 5\)"):
        KANLinear(4, 3)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"basis: expected a Basis or one of .*, got 'nope'"):
        KANLinear(4, 3, basis="nope")
    with pytest.raises(ValueError, match=r"base: expected one of 'silu', .*, got 'swish'"):
        KANLinear(4, 3, base="swish")
    with pytest.raises(ValueError, match="norm: expected one of 'layer', 'batch'"):
        KANLinear(4, 3, norm="group")
    with pytest.raises(TypeError, match="update_grid: expected a BSpline basis, got RBF"):
        KANLinear(4, 3, basis="rbf").update_grid(torch.zeros(5, 4))
    with pytest.raises(TypeError, match="refine: expected a BSpline basis"):
        KANLinear(4, 3, basis="rbf").refine(4)
    with pytest.raises(ValueError, match="x: expected at least 2 samples"):
        KANLinear(4, 3).edge_std(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="x: expected finite values"):
        KANLinear(4, 3).update_grid(torch.full((5, 4), math.nan))
    with pytest.raises(TypeError, match="x: expected a float16"):
        KANLinear(4, 3)(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"coef: expected shape \(\*, 4, 8\)"):
        BSpline().build(4).linear(torch.zeros(2, 4), torch.zeros(3, 4, 7))
    with pytest.raises(ValueError, match="knots: expected shape"):
        functional.bspline_linear(torch.zeros(2, 4), torch.zeros(3, 4, 7), torch.zeros(4, 12))
    with pytest.raises(ValueError, match="coef: expected an even number"):
        functional.fourier_linear(torch.zeros(2, 4), torch.zeros(3, 4, 7))

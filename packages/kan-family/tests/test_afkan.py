import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyla.kan_family.afkan import AFKAN, AFKANLinear
from phyla.kan_family.bases import ActivationPair
from phyla.kan_family.functional import afkan as functional
from phyla.kan_family.functional.basis import ACTIVATIONS, COMBINATIONS
from phyla.shared.testing import check_kernel, check_module

GOLDEN = Path(__file__).parent / "golden"
REDUCTIONS = ("global", "spatial", "multistep")

# The oracle: the paper's equations with all features in memory, in float64.
ORACLE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda t: t * torch.sigmoid(t),
    "relu": torch.relu,
    "gelu": lambda t: t * torch.special.ndtr(t),
    "elu": F.elu,
    "selu": torch.selu,
    "softplus": lambda t: torch.logaddexp(t, torch.zeros_like(t)),
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "identity": lambda t: t,
}
ORACLE_COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quad1": lambda u, v: (u * v) ** 2,
    "quad2": lambda u, v: u * v + u**2 + v**2,
    "sum": lambda u, v: u + v,
    "prod": lambda u, v: u * v,
    "sum_prod": lambda u, v: u + v + u * v,
    "cubic1": lambda u, v: (u + v) * (u**2 + v**2),
    "cubic2": lambda u, v: (u * v) ** 3,
}


def oracle_features(x: Tensor, low: Tensor, high: Tensor, activation: str, combine: str) -> Tensor:
    act = ORACLE_ACTIVATIONS[activation]
    return ORACLE_COMBINATIONS[combine](act(x.unsqueeze(-1) - low), act(high - x.unsqueeze(-1)))


def oracle_sums(x: Tensor, low: Tensor, high: Tensor, score_weight: Tensor, activation: str, combine: str) -> tuple[Tensor, ...]:
    f = oracle_features(x, low, high, activation, combine)
    return f.sum(-1), (f * score_weight).sum(-1), f.amin(), f.amax()


def oracle_layer(layer: AFKANLinear, x: Tensor) -> Tensor:
    """Training mode, in x's dtype."""
    f = oracle_features(x, layer.basis.low, layer.basis.high, layer.spec.activation, layer.spec.combine)
    if layer.feature_norm is not None:
        f = (f - f.amin()) / (f.amax() - f.amin())
    weight, bias = layer.score.weight, layer.score.bias
    if layer.reduction == "multistep":
        z = (f * weight[0]).sum(-1) + bias
    elif layer.reduction == "global":
        scores = (f * weight[0]).sum(-1) + bias
        z = torch.softmax(scores / layer.temperature.clamp(min=1), -1) * f.sum(-1)
    else:
        padded = F.pad(f, (0, 0, 1, 1))
        scores = sum(padded[..., t : t + f.shape[-2], :] * weight[:, 0, t] for t in range(3)) + bias
        z = (torch.softmax(scores / layer.temperature.clamp(min=1), -1) * f).sum(-1)
    if layer.norm is not None:
        z = layer.norm(z)
    return ORACLE_ACTIVATIONS[layer.spec.activation](z) @ layer.weight.T


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(float(expected.detach().abs().max()), 1e-12) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("afkan_*.npz")))
def test_parity_with_the_authors_layer(name: str) -> None:
    stored = np.load(GOLDEN / f"{name}.npz")
    data = {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files if stored[key].dtype.kind == "f"}
    reduction = {"global_attn": "global", "spatial_attn": "spatial", "multistep": "multistep"}[str(stored["method"])]
    norm = {"none": None}.get(str(stored["norm"]), str(stored["norm"]))
    layer = AFKANLinear(
        data["x"].shape[1],
        data["output"].shape[1],
        basis=ActivationPair(int(stored["grid_size"]), int(stored["order"]), str(stored["activation"]), str(stored["combine"])),
        reduction=reduction,
        norm=norm,
        feature_norm="batch" if stored["feature_norm"] else None,
        dtype=torch.float64,
    )
    keys = {"phase_low": "basis.low", "phase_high": "basis.high", "base_weight": "weight", "temperature": "temperature"}
    keys |= {f"{old}.{part}": f"score.{part}" for old in ("gk_linear", "conv1d") for part in ("weight", "bias")}
    keys |= {f"norm.{part}": f"norm.{part}" for part in ("weight", "bias")}
    names = {old: new for old, new in keys.items() if old in data}
    missing, unexpected = layer.load_state_dict({new: data[old] for old, new in names.items()}, strict=False)
    assert not unexpected
    assert not [key for key in missing if "running" not in key and "num_batches" not in key]
    x = data["x"].requires_grad_()
    y = layer(x)
    close(y, data["output"], 1e-9)
    y.backward(data["grad_output"])
    close(x.grad, data["grad_x"], 1e-7)
    parameters = dict(layer.named_parameters())
    for old, new in names.items():
        torch.testing.assert_close(parameters[new].grad, data[f"grad_{old}"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sums_agree_with_the_oracle(activation: str, combine: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 67, dtype=torch.float64) * 2
    low = torch.linspace(-1, 0.8, 5, dtype=torch.float64)
    inputs = [x, low, low + 0.9, torch.randn(5, dtype=torch.float64)]
    for dtype, value_tolerance, grad_tolerance in ((torch.float64, 1e-12, 1e-12), (torch.float32, 5e-6, 2e-5)):
        mine = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
        other = [t.detach().double().requires_grad_() for t in mine]
        sums = functional.afkan_sums(*mine, activation=activation, combine=combine)
        expected = oracle_sums(*other, activation, combine)
        grads = [torch.randn_like(t) for t in expected[:2]]
        for a, b in zip(sums[:2], expected[:2], strict=True):
            close(a, b, value_tolerance)
        close(torch.stack(sums[2:]), torch.stack(expected[2:]), value_tolerance)
        # Where features are constant (identity-sum) or saturate, rounding decides where the extremes are: their gradients have own tests.
        torch.autograd.backward(sums[:2], [g.to(dtype) for g in grads])
        torch.autograd.backward(expected[:2], grads)
        for a, b in zip(mine, other, strict=True):
            close(a.grad, b.grad, grad_tolerance)


@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layer_agrees_with_the_oracle_in_float32(reduction: str, norm: str | None) -> None:
    torch.manual_seed(1)
    layer = AFKANLinear(30, 7, reduction=reduction, norm=norm)
    exact = AFKANLinear(30, 7, reduction=reduction, norm=norm, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(40, 30)
    wide = x.double()
    grad = torch.randn(40, 7)
    y, expected = layer(x.requires_grad_()), oracle_layer(exact, wide.requires_grad_())
    close(y, expected, 2e-5)
    y.backward(grad)
    expected.backward(grad.double())
    close(x.grad, wide.grad, 2e-4)  # normalised by LayerNorm of values near its epsilon: the noise of float32 is larger than an op's
    close(layer.weight.grad, exact.weight.grad, 2e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_evaluation_is_per_sample(reduction: str) -> None:
    torch.manual_seed(0)
    model = AFKAN([6, 5, 3], reduction=reduction, dtype=torch.float64)
    for _ in range(3):
        model(torch.randn(20, 6, dtype=torch.float64))
    model.eval()
    x = torch.randn(9, 6, dtype=torch.float64) * 3
    together = model(x)
    close(torch.cat([model(row[None]) for row in x]), together, 1e-12)
    close(torch.stack([model(row) for row in x]), together, 1e-12)
    close(model(x.reshape(3, 3, 6)).reshape(9, 3), together, 1e-12)


def test_batch_statistics_depend_on_the_batch_in_evaluation_too() -> None:
    layer = AFKANLinear(6, 3, feature_norm="batch", norm=None).eval()
    x = torch.randn(9, 6)
    assert "running_low" not in layer.state_dict()
    assert not torch.allclose(layer(x)[0], layer(x[:1])[0])


def test_running_values_copy_the_first_batch_and_then_follow() -> None:
    layer = AFKANLinear(4, 2, momentum=0.25, dtype=torch.float64)
    extremes = []
    for seed in range(3):
        x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        layer(x)
        f = oracle_features(x, layer.basis.low, layer.basis.high, "silu", "quad1")
        extremes.append((f.min().item(), f.max().item()))
    for buffer, values in ((layer.running_low, [e[0] for e in extremes]), (layer.running_high, [e[1] for e in extremes])):
        follow = values[0]
        for value in values[1:]:
            follow += 0.25 * (value - follow)
        assert float(buffer) == pytest.approx(follow, rel=1e-12)
    assert int(layer.num_batches) == 3
    again = AFKANLinear(4, 2, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(again.eval()(x), layer.eval()(x))
    layer.reset_parameters()
    assert (float(layer.running_low), float(layer.running_high), int(layer.num_batches)) == (0, 1, 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("feature_norm", ["running", "batch", None])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0)])
def test_leading_shapes(shape: tuple[int, ...], reduction: str, feature_norm: str | None, training: bool) -> None:
    layer = AFKANLinear(5, 3, reduction=reduction, feature_norm=feature_norm).train(training)
    x = torch.randn(*shape, 5, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    if feature_norm == "running":
        assert int(layer.num_batches) == int(training and x.numel() > 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_inputs_stay_finite(activation: str) -> None:
    for scale in (1e4, -1e4):
        layer = AFKANLinear(5, 3, basis=ActivationPair(activation=activation))
        x = torch.full((4, 5), scale)
        x[0] = 0.3
        x.requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert bool(torch.isfinite(y).all())
        assert bool(torch.isfinite(x.grad).all())
    constant = torch.full((4, 5), 1e4)  # equal inputs, all features in saturation: the span of the features may be zero
    assert bool(torch.isfinite(AFKANLinear(5, 3, basis=ActivationPair(activation=activation))(constant)).all())


def test_wide_intervals_keep_their_accuracy() -> None:
    """Ends so large that one exponential per input would overflow."""
    for activation in ACTIVATIONS:
        x = torch.linspace(-300, 500, 61, dtype=torch.float64)[None]
        low = torch.linspace(-90, 255, 6, dtype=torch.float64)
        inputs = [x, low, low + 170, torch.randn(6, dtype=torch.float64)]
        expected = oracle_sums(*inputs, activation, "sum")
        for a, b in zip(functional.afkan_sums(*inputs, activation=activation, combine="sum"), expected, strict=True):
            close(a, b, 1e-9)
        narrow = functional.afkan_sums(*(t.float() for t in inputs), activation=activation, combine="sum")
        for a, b in zip(narrow, expected, strict=True):
            close(a, b, 5e-6)


def test_nan_and_infinity_are_seen() -> None:
    layer = AFKANLinear(4, 2, norm=None)
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(300, 4)
        x[170, 2] = bad
        sums = functional.afkan_sums(x, layer.basis.low, layer.basis.high, layer.score.weight[0])
        assert not bool(torch.isfinite(torch.stack([sums.smallest, sums.largest, sums.total.sum(), sums.score.sum()])).any())
        assert bool(torch.isfinite(sums.total[:170]).all())


@pytest.mark.parametrize("ties", [1, 2, 5])
def test_gradients_of_extremes_are_shared_by_ties(ties: int) -> None:
    x = torch.linspace(-0.5, 0.5, 4000, dtype=torch.float64)
    x[torch.arange(ties) * 700] = 2.0
    x[torch.arange(ties) * 650 + 7] = -0.7
    low, weight = torch.tensor([-1.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    x.requires_grad_()
    sums = functional.afkan_sums(x, low, low + 0.5, weight, activation="identity", combine="prod")
    oracle = oracle_sums(x, low, low + 0.5, weight, "identity", "prod")
    for mine, other in zip(sums[2:], oracle[2:], strict=True):
        expected = torch.autograd.grad(other, x, retain_graph=True)[0]
        assert int(expected.count_nonzero()) == ties
        close(torch.autograd.grad(mine, x, retain_graph=True)[0], expected, 1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bytes_kept_for_backward(reduction: str) -> None:
    layer = AFKANLinear(784, 64, reduction=reduction)
    x = torch.randn(64, 784, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    assert y.shape == (64, 64)
    assert total <= 10 * x.numel() * 4


@pytest.mark.parametrize(("activation", "combine"), [("silu", "quad1"), ("softplus", "sum_prod"), ("tanh", "cubic1"), ("gelu", "quad2")])
def test_sums_battery(activation: str, combine: str) -> None:
    torch.manual_seed(1)
    x, low, width, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (3,), (3,), (3,)))
    check_kernel(functional._sums, x, low, low + width, weight, activation, combine, reference=oracle_sums)


def test_spatial_battery() -> None:
    torch.manual_seed(1)
    x, low, width, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 4), (2,), (2,), (2, 1, 3), (2,)))
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (1.5, -0.2, 1.7)]  # temperature, smallest, largest
    check_kernel(functional._spatial, x, low, low + width, weight, bias, *scalars, "silu", "quad1")


@pytest.mark.parametrize("activation", ["silu", "relu", "softplus"])
@pytest.mark.parametrize(("temperature", "largest"), [(0.5, 1.7), (1.5, -0.2), (1.0, 3.0)])
def test_spatial_agrees_with_the_composite_over_many_vectors(activation: str, temperature: float, largest: float) -> None:
    """Rows longer than a vector, a clamped temperature, features without span."""
    torch.manual_seed(2)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((70, 67), (5,), (5,), (5, 1, 3), (5,))]
    inputs += [torch.tensor(value, dtype=torch.float64) for value in (temperature, -0.2, largest)]
    results = []
    for function in (functional._spatial, functional._spatial.plain):
        leaves = [t.clone().requires_grad_() for t in inputs]
        z = function(*leaves, activation, "quad2")
        results.append([z, *torch.autograd.grad(z.sin().sum(), leaves)])
    for mine, other in zip(*results, strict=True):
        close(mine, other.detach(), 1e-11)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    layer = AFKANLinear(300, 5)
    x = torch.randn(200, 300)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            sums = functional.afkan_sums(leaf, layer.basis.low, layer.basis.high, layer.score.weight[0])
            results.append(
                [*sums, *torch.autograd.grad([s.sum() for s in sums], [leaf, layer.basis.low, layer.basis.high, layer.score.weight])]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layer_battery(reduction: str) -> None:
    torch.manual_seed(0)
    check_module(lambda: AFKANLinear(6, 3, reduction=reduction), torch.randn(5, 6))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_training_mode_compiles(reduction: str) -> None:
    """The running values are updated inside the graph."""
    torch.manual_seed(0)
    layer, x = AFKANLinear(6, 3, reduction=reduction), torch.randn(5, 6)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 2.0):
        close(compiled(scale * x), layer(scale * x), 1e-6)
    compiled(x).sum().backward()
    layer(x)
    close(twin.running_high, layer.running_high, 1e-6)
    assert int(twin.num_batches) == 3


def test_low_precision_and_autocast() -> None:
    torch.manual_seed(0)
    layer = AFKANLinear(20, 6)
    x = torch.randn(16, 20)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, expected, 6e-2)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half, expected, 6e-2)


def test_parameters_and_initial_values() -> None:
    layer = AFKANLinear(9, 4)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (4, 9),
        "temperature": (),
        "basis.low": (6,),
        "basis.high": (6,),
        "score.weight": (1, 6),
        "score.bias": (1,),
        "norm.weight": (9,),
        "norm.bias": (9,),
    }
    assert layer.temperature.item() == 3.0
    close(layer.basis.low, (torch.arange(6) - 3) / 3, 1e-6)
    close(layer.basis.high, (torch.arange(6) + 1) / 3, 1e-6)
    assert AFKANLinear(9, 4, reduction="multistep").temperature is None
    assert isinstance(AFKANLinear(9, 4, reduction="spatial").score, nn.Conv1d)
    assert sum(p.numel() for p in AFKAN([64, 32, 10]).parameters()) == 2600
    torch.manual_seed(3)
    first = AFKANLinear(9, 4).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), AFKANLinear(9, 4).state_dict().values(), strict=True))


def test_errors_name_what_came() -> None:
    with pytest.raises(ValueError, match=r"x: expected last dimension 4, got shape \(2, 5\)"):
        AFKANLinear(4, 3)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="in_features: expected a positive int, got 0"):
        AFKANLinear(0, 3)
    with pytest.raises(ValueError, match="reduction: expected one of 'global', 'spatial', 'multistep', got 'globl'"):
        AFKANLinear(4, 3, reduction="globl")
    with pytest.raises(ValueError, match="norm: expected one of 'layer', 'batch', got 'group'"):
        AFKANLinear(4, 3, norm="group")
    with pytest.raises(ValueError, match="feature_norm: expected"):
        AFKANLinear(4, 3, feature_norm="layer")
    with pytest.raises(TypeError, match="basis: expected an ActivationPair, got 'silu'"):
        AFKANLinear(4, 3, basis="silu")
    with pytest.raises(ValueError, match="widths: expected at least two sizes"):
        AFKAN([4])
    with pytest.raises(ValueError, match=r"high: expected shape \(6,\), got shape \(5,\)"):
        functional.afkan_sums(torch.zeros(2), torch.zeros(6), torch.zeros(5), torch.zeros(6))

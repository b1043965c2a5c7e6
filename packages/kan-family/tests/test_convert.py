"""Conversions are checked by outputs: the foreign layers' formulas are stated plainly here, or their recorded outputs are used."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.kan_family import convert
from phyla.kan_family.bases import RBF, BSpline
from phyla.kan_family.linear import KANLinear
from phyla.kan_family.model import KAN
from phyla.shared.testing import load_golden

GOLDEN = Path(__file__).parent / "golden"


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _knots(inputs: int, grid_size: int, order: int) -> Tensor:
    steps = torch.arange(-order, grid_size + order + 1, dtype=torch.float64) * 2 / grid_size - 1
    return steps.repeat(inputs, 1)


def _splines(x_BI: Tensor, knots: Tensor, order: int) -> Tensor:
    """Cox-de Boor as the formula stands, `(B, I, G + k)`."""
    x = x_BI.unsqueeze(-1)
    phi = ((knots[:, :-1] <= x) & (x < knots[:, 1:])).double()
    for p in range(1, order + 1):
        left = (x - knots[:, : -p - 1]) / (knots[:, p:-1] - knots[:, : -p - 1]) * phi[..., :-1]
        right = (knots[:, p + 1 :] - x) / (knots[:, p + 1 :] - knots[:, 1:-p]) * phi[..., 1:]
        phi = left + right
    return phi


@pytest.mark.parametrize(("file", "grid_size"), [("efficient_kan_scaler0", 8), ("efficient_kan_scaler1", 5)])
def test_efficient_kan_layer_recorded(file: str, grid_size: int) -> None:
    golden = load_golden(GOLDEN / f"{file}.npz")
    state = {name: golden[name] for name in ("base_weight", "spline_weight", "spline_scaler") if name in golden} | {"grid": golden["knots"]}
    before = dict(state)
    inputs, outputs = golden["x"].shape[1], golden["output"].shape[1]
    layer = KANLinear(inputs, outputs, basis=BSpline(grid_size, 3), bias=False, dtype=torch.float64)
    converted = convert.efficient_kan(state)
    layer.load_state_dict(converted)
    torch.testing.assert_close(layer(golden["x"]), golden["output"], rtol=1e-9, atol=1e-9)
    assert state.keys() == before.keys()
    assert converted["basis.knots"] is state["grid"]
    if "spline_scaler" not in state:
        assert converted["coef"] is state["spline_weight"]


def test_efficient_kan_model_beside_other_modules() -> None:
    widths, grid_size, order = [3, 4, 2], 6, 2
    state = {"head.weight": _random(2, 2, seed=9)}
    x = h = _random(7, 3, seed=0).tanh()
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        grid, base = _knots(inputs, grid_size, order), _random(outputs, inputs, seed=layer + 1)
        spline, scaler = _random(outputs, inputs, grid_size + order, seed=layer + 3), _random(outputs, inputs, seed=layer + 5)
        state |= {
            f"kan.layers.{layer}.grid": grid,
            f"kan.layers.{layer}.base_weight": base,
            f"kan.layers.{layer}.spline_weight": spline,
            f"kan.layers.{layer}.spline_scaler": scaler,
        }
        h = F.silu(h) @ base.T + torch.einsum("bik,oik,oi->bo", _splines(h, grid, order), spline, scaler)
    model = torch.nn.ModuleDict(
        {"kan": KAN(widths, basis=BSpline(grid_size, order), bias=False), "head": torch.nn.Linear(2, 2, bias=False)}
    )
    model.double().load_state_dict(convert.efficient_kan(state))
    torch.testing.assert_close(model["kan"](x), h, rtol=1e-9, atol=1e-9)
    assert torch.equal(model["head"].weight, state["head.weight"])


def test_fast_kan_layer_recorded() -> None:
    golden = load_golden(GOLDEN / "fast_kan.npz")
    names = ("layernorm.weight", "layernorm.bias", "spline_linear.weight", "base_linear.weight", "base_linear.bias")
    converted = convert.fast_kan({name: golden[name] for name in names} | {"rbf.grid": golden["centers"]})
    layer = KANLinear(5, 3, basis=RBF(8, (-2.0, 2.0)), norm="layer", dtype=torch.float64)
    layer.load_state_dict(converted)
    torch.testing.assert_close(layer(golden["x"]), golden["output"], rtol=1e-6, atol=1e-6)


def _fast_kan_layer(x: Tensor, state: dict[str, Tensor], prefix: str) -> Tensor:
    centers = state[f"{prefix}rbf.grid"]
    normed = x
    if f"{prefix}layernorm.weight" in state:
        normed = F.layer_norm(x, x.shape[-1:], state[f"{prefix}layernorm.weight"], state[f"{prefix}layernorm.bias"])
    phi = torch.exp(-(((normed.unsqueeze(-1) - centers) / (centers[1] - centers[0])) ** 2))
    out = phi.flatten(-2) @ state[f"{prefix}spline_linear.weight"].T
    if f"{prefix}base_linear.weight" in state:
        out = out + F.linear(F.silu(x), state[f"{prefix}base_linear.weight"], state[f"{prefix}base_linear.bias"])
    return out


def test_fast_kan_model() -> None:
    widths, centers = [3, 4, 2], torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)
    state: dict[str, Tensor] = {}
    x = h = _random(6, 3, seed=0)
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        prefix = f"layers.{layer}."
        state |= {
            f"{prefix}layernorm.weight": _random(inputs, seed=10 + layer),
            f"{prefix}layernorm.bias": _random(inputs, seed=20 + layer),
            f"{prefix}rbf.grid": centers,
            f"{prefix}spline_linear.weight": _random(outputs, inputs * 5, seed=30 + layer),
            f"{prefix}base_linear.weight": _random(outputs, inputs, seed=40 + layer),
            f"{prefix}base_linear.bias": _random(outputs, seed=50 + layer),
        }
        h = _fast_kan_layer(h, state, prefix)
    model = KAN(widths, basis=RBF(5, (-1.5, 1.5)), norm="layer", dtype=torch.float64)
    model.load_state_dict(convert.fast_kan(state))
    torch.testing.assert_close(model(x), h, rtol=1e-9, atol=1e-9)


def test_fast_kan_layer_without_its_optional_parts() -> None:
    state = {"rbf.grid": torch.linspace(-2, 2, 4, dtype=torch.float64), "spline_linear.weight": _random(3, 8, seed=0)}
    x = _random(5, 2, seed=1)
    layer = KANLinear(2, 3, basis=RBF(4), base=None, bias=False, dtype=torch.float64)
    layer.load_state_dict(convert.fast_kan(state))
    torch.testing.assert_close(layer(x), _fast_kan_layer(x, state, ""), rtol=1e-9, atol=1e-9)


def _pykan_state(widths: list[int], grid_size: int, order: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {"input_id": torch.arange(widths[0])}
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        seeds = iter(range(100 * layer, 100 * layer + 20))
        state |= {
            f"act_fun.{layer}.grid": _knots(inputs, grid_size, order),
            f"act_fun.{layer}.coef": _random(inputs, outputs, grid_size + order, seed=next(seeds)),
            f"act_fun.{layer}.scale_base": _random(inputs, outputs, seed=next(seeds)),
            f"act_fun.{layer}.scale_sp": _random(inputs, outputs, seed=next(seeds)),
            f"act_fun.{layer}.mask": (_random(inputs, outputs, seed=next(seeds)) > -0.5).double(),
            f"symbolic_fun.{layer}.mask": torch.zeros(outputs, inputs),
            f"symbolic_fun.{layer}.affine": torch.zeros(outputs, inputs, 4),
        }
        for name in ("node_scale", "node_bias", "subnode_scale", "subnode_bias"):
            state[f"{name}_{layer}"] = _random(outputs, seed=next(seeds))
    return state


def _pykan(x: Tensor, state: dict[str, Tensor], depth: int, order: int) -> Tensor:
    for layer in range(depth):
        knots, coef, scale_base, scale_sp, mask = (
            state[f"act_fun.{layer}.{name}"] for name in ("grid", "coef", "scale_base", "scale_sp", "mask")
        )
        spline = torch.einsum("bik,iok->bio", _splines(x, knots, order), coef)
        edges = mask * (scale_base * F.silu(x).unsqueeze(-1) + scale_sp * spline)
        x = state[f"subnode_scale_{layer}"] * edges.sum(1) + state[f"subnode_bias_{layer}"]
        x = state[f"node_scale_{layer}"] * x + state[f"node_bias_{layer}"]
    return x


def test_pykan_model() -> None:
    widths, grid_size, order = [3, 4, 2], 5, 3
    state = _pykan_state(widths, grid_size, order)
    x = _random(9, 3, seed=1).tanh()
    model = KAN(widths, basis=BSpline(grid_size, order), dtype=torch.float64)
    model.load_state_dict(convert.pykan(state))
    torch.testing.assert_close(model(x), _pykan(x, state, 2, order), rtol=1e-9, atol=1e-9)


def test_pykan_model_recorded() -> None:
    golden = load_golden(GOLDEN / "pykan_regularisation.npz")
    widths = golden["widths"].tolist()
    state = {}
    for layer in range(2):
        state |= {f"act_fun.{layer}.{name}": golden[f"layer{layer}.{name}"] for name in ("coef", "scale_base", "scale_sp")}
        state[f"act_fun.{layer}.grid"] = golden[f"layer{layer}.knots"]
        state[f"act_fun.{layer}.mask"] = torch.ones_like(golden[f"layer{layer}.scale_base"])
    model = KAN(widths, basis=BSpline(5, 3), dtype=torch.float64)
    model.load_state_dict(convert.pykan(state))
    torch.testing.assert_close(model(golden["x"]), golden["output"], rtol=1e-9, atol=1e-9)


def test_pykan_refuses_what_has_no_counterpart() -> None:
    symbolic = _pykan_state([2, 2], 5, 3)
    symbolic["symbolic_fun.0.mask"] = torch.eye(2)
    with pytest.raises(ValueError, match=r"state_dict: expected no symbolic edges, got 2 in symbolic_fun.0.mask"):
        convert.pykan(symbolic)
    multiplying = _pykan_state([2, 3], 5, 3)
    multiplying["node_scale_0"], multiplying["node_bias_0"] = torch.ones(2), torch.zeros(2)
    with pytest.raises(ValueError, match=r"state_dict: expected no multiplication nodes, got 3 sums that make 2 nodes in layer 0"):
        convert.pykan(multiplying)


@pytest.mark.parametrize(
    ("function", "mark"), [(convert.efficient_kan, "spline_weight"), (convert.fast_kan, "spline_linear.weight"), (convert.pykan, "coef")]
)
def test_foreign_state_dicts_are_named(function: object, mark: str) -> None:
    with pytest.raises(ValueError, match=rf"state_dict: expected a key that ends in '{mark}', got \['weight', 'bias'\]"):
        function(torch.nn.Linear(2, 2).state_dict())  # type: ignore[operator]


def test_incomplete_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"state_dict: expected the key 'layers.0.grid'"):
        convert.efficient_kan({"layers.0.spline_weight": torch.zeros(1, 1, 8), "layers.0.base_weight": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match=r"state_dict: expected the key 'rbf.grid'"):
        convert.fast_kan({"spline_linear.weight": torch.zeros(1, 8)})
    state = _pykan_state([2, 2], 5, 3)
    del state["act_fun.0.mask"]
    with pytest.raises(ValueError, match=r"state_dict: expected the key 'act_fun.0.mask'"):
        convert.pykan(state)


def test_vision_conversions_are_here() -> None:
    assert all(callable(getattr(convert, name)) for name in convert.__all__)
    assert {"kat", "timm_vit"} <= set(convert.__all__)

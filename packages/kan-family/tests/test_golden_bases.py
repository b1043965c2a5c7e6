"""Parity with the authors' codes and scipy: values and gradients of the golden files (sources in golden/README)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from phyla.kan_family import KAN, RBF, BSpline, Chebyshev, Fourier, KANConv2d, KANLinear, ReLUBump, functional

GOLDEN = Path(__file__).parent / "golden"
VALUE, GRADIENT = 1e-9, 1e-9


class Golden(dict[str, Tensor]):
    """Arrays of a file as tensors; `option` gives the scalars as Python values."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as data:
            self.options = {key: value.item() for key, value in data.items() if value.ndim == 0}
            super().__init__({key: torch.from_numpy(value) for key, value in data.items() if value.ndim})


def close(actual: Tensor, expected: Tensor, tolerance: float = VALUE) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-300)


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


@pytest.mark.parametrize("name", ["bspline_scipy_k1", "bspline_scipy_k3", "bspline_scipy_k4"])
def test_bspline_basis_is_scipys(name: str) -> None:
    g = Golden(name)
    close(functional.bspline_basis(g["x"], g["knots"], g.options["order"]), g["basis"])


def test_jacobi_basis_is_scipys() -> None:
    g = Golden("jacobi_scipy")
    close(functional.jacobi_basis(g["x"], g.options["degree"], g.options["alpha"], g.options["beta"]), g["basis"])


@pytest.mark.parametrize("kind", ["dog", "mexican_hat"])
def test_wavelet_basis(kind: str) -> None:
    g = Golden(f"wavelet_{kind}")
    close(functional.wavelet_basis(g["x"], g["translation"], g["scale"], kind), g["basis"])


def test_rswaf_basis() -> None:
    g = Golden("rswaf")
    close(functional.rswaf_basis(g["x"], g["centers"], g.options["inv_width"]), g["basis"])


def spline_layer(g: Golden, knots: Tensor, coef: Tensor, base_weight: Tensor, bias: bool = False) -> KANLinear:
    inputs = knots.shape[0]
    spec = BSpline(g.options["grid_size"], g.options["order"])
    layer = KANLinear(inputs, coef.shape[0], basis=spec, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.coef.copy_(coef)
        layer.base_weight.copy_(base_weight)
        layer.basis.knots.copy_(knots)
    return layer


def pykan_layer(g: Golden, prefix: str = "") -> KANLinear:
    coef = (g[f"{prefix}coef"] * g[f"{prefix}scale_sp"].unsqueeze(-1)).transpose(0, 1)
    return spline_layer(g, g[f"{prefix}knots"], coef, g[f"{prefix}scale_base"].t())


@pytest.mark.parametrize("name", ["pykan_layer_G5_k3", "pykan_layer_G6_k1", "pykan_layer_G8_k2", "pykan_layer_G20_k3"])
def test_pykan_layer(name: str) -> None:
    g = Golden(name)
    layer, x = pykan_layer(g), leaf(g["x"])
    y = layer(x)
    close(y, g["output"])
    close(layer.edge_outputs(x), g["edge_outputs"])
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], GRADIENT)
    gradient = layer.coef.grad.transpose(0, 1)
    close(gradient * g["scale_sp"].unsqueeze(-1), g["grad_coef"], GRADIENT)
    close((gradient * g["coef"]).sum(-1), g["grad_scale_sp"], GRADIENT)
    close(layer.base_weight.grad.t(), g["grad_scale_base"], GRADIENT)


def test_update_grid_is_pykans() -> None:
    g = Golden("pykan_update_grid")
    layer = pykan_layer(g)
    close(layer(g["x"]), g["output_before"])
    layer.update_grid(g["x"], eps=g.options["eps"], margin=g.options["margin"])
    close(layer.basis.knots, g["knots_after"], 1e-12)
    close(layer(g["x"]), g["output_after"], 1e-6)


def test_refine_keeps_the_function_on_nested_grids() -> None:
    g = Golden("pykan_refine")
    layer = pykan_layer(g)
    layer.refine(g.options["new_grid_size"])
    close(layer.basis.knots, g["knots_after"], 1e-12)
    inside = (g["x"] >= layer.basis.knots[:, 3]) & (g["x"] < layer.basis.knots[:, -4])
    rows = inside.all(1)
    close(layer(g["x"])[rows], g["output_before"][rows])


def test_regularization_and_attribution_are_pykans() -> None:
    g = Golden("pykan_regularisation")
    g.options |= {"grid_size": 5, "order": 3}
    model = KAN(g["widths"].tolist(), dtype=torch.float64)
    model.layers = torch.nn.ModuleList([pykan_layer(g, "layer0."), pykan_layer(g, "layer1.")])
    close(model(g["x"]), g["output"])
    penalty = model.regularization(g["x"], l1=g.options["l1"], entropy=g.options["entropy"])
    assert abs(penalty.item() - g.options["regularization"]) < 1e-9 * g.options["regularization"]
    penalty.backward()
    close(model.layers[0].coef.grad.transpose(0, 1) * g["layer0.scale_sp"].unsqueeze(-1), g["grad_layer0.coef"], 1e-8)
    close(model.layers[0].edge_std(g["x"]), g["layer0.edge_std"])
    attribution = model.attribute(g["x"])
    for level in range(2):
        close(attribution.edges[level], g[f"layer{level}.edge_score"])
        close(attribution.nodes[level], g[f"node_score{level}"])
    close(attribution.nodes[2], g["node_score2"])


@pytest.mark.parametrize("name", ["efficient_kan_scaler0", "efficient_kan_scaler1"])
def test_efficient_kan(name: str) -> None:
    g = Golden(name)
    scaler = g.get("spline_scaler", torch.ones_like(g["base_weight"])).unsqueeze(-1)
    layer, x = spline_layer(g, g["knots"], g["spline_weight"] * scaler, g["base_weight"]), leaf(g["x"])
    y = layer(x)
    close(y, g["output"])
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], GRADIENT)
    close(layer.base_weight.grad, g["grad_base_weight"], GRADIENT)
    close(layer.coef.grad * scaler, g["grad_spline_weight"], GRADIENT)


def test_fast_kan() -> None:
    g = Golden("fast_kan")
    layer, x = KANLinear(5, 3, basis=RBF(8, (-2, 2)), norm="layer", dtype=torch.float64), leaf(g["x"])
    with torch.no_grad():
        layer.norm.weight.copy_(g["layernorm.weight"])
        layer.norm.bias.copy_(g["layernorm.bias"])
        layer.coef.copy_(g["spline_linear.weight"].reshape(3, 5, 8))
        layer.base_weight.copy_(g["base_linear.weight"])
        layer.bias.copy_(g["base_linear.bias"])
    y = layer(x)
    close(y, g["output"], 1e-6)
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], 1e-6)
    close(layer.coef.grad.reshape(3, 40), g["grad_spline_linear.weight"], 1e-6)
    close(layer.norm.weight.grad, g["grad_layernorm.weight"], 1e-6)
    close(layer.base_weight.grad, g["grad_base_linear.weight"], 1e-6)
    close(layer.bias.grad, g["grad_base_linear.bias"], 1e-6)


@pytest.mark.parametrize("name", ["fourier_kan", "fourier_kan_in1"])
def test_fourier_kan(name: str) -> None:
    g = Golden(name)
    outputs, inputs, frequencies = g["fouriercoeffs"].shape[1:]
    layer, x = KANLinear(inputs, outputs, basis=Fourier(frequencies), base=None, dtype=torch.float64), leaf(g["x"])
    with torch.no_grad():
        layer.coef.copy_(torch.cat(tuple(g["fouriercoeffs"]), -1))
        layer.bias.copy_(g["bias"][0])
    y = layer(x)
    close(y, g["output"])
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], GRADIENT)
    close(layer.coef.grad, torch.cat(tuple(g["grad_fouriercoeffs"]), -1), GRADIENT)
    close(layer.bias.grad, g["grad_bias"][0], GRADIENT)


@pytest.mark.parametrize("name", ["chebyshev_kan", "chebyshev_kan_d1"])
def test_chebyshev_kan(name: str) -> None:
    g = Golden(name)
    coef = g["cheby_coeffs"].transpose(0, 1)
    layer = KANLinear(coef.shape[1], coef.shape[0], basis=Chebyshev(g.options["degree"]), base=None, bias=False, dtype=torch.float64)
    x = leaf(g["x"])
    with torch.no_grad():
        layer.coef.copy_(coef)
    y = layer(x)
    close(y, g["output"])
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], GRADIENT)
    close(layer.coef.grad.transpose(0, 1), g["grad_cheby_coeffs"], GRADIENT)


@pytest.mark.parametrize("name", ["relu_kan_in1", "relu_kan_in3"])
def test_relu_kan(name: str) -> None:
    g = Golden(name)
    outputs, inputs = g["conv_weight"].shape[0], g["conv_weight"].shape[-1]
    spec = ReLUBump(g.options["grid_size"], g.options["order"])
    layer, x = KANLinear(inputs, outputs, basis=spec, base=None, dtype=torch.float64), leaf(g["x"])
    assert spec.constants()[1] == pytest.approx([g.options["r"]], rel=1e-12)
    with torch.no_grad():
        layer.coef.copy_(g["conv_weight"].reshape(layer.coef.shape))
        layer.bias.copy_(g["conv_bias"])
        layer.basis.low.copy_(g["low"])
        layer.basis.high.copy_(g["high"])
    y = layer(x)
    close(y, g["output"])
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], GRADIENT)
    close(layer.coef.grad.reshape(g["conv_weight"].shape), g["grad_conv_weight"], GRADIENT)
    close(layer.bias.grad, g["grad_conv_bias"], GRADIENT)
    close(layer.basis.low.grad, g["grad_low"], GRADIENT)
    close(layer.basis.high.grad, g["grad_high"], GRADIENT)


def taps(value: Tensor, layer: KANConv2d) -> Tensor:
    """An unfolded weight `(O, I kh kw, K)` as `(O, I, K, kh, kw)`."""
    kh, kw = layer.kernel_size
    return value.view(layer.out_channels, layer.in_channels, kh, kw, -1).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("name", ["conv_bspline_unfold", "conv_bspline_unfold_k5"])
def test_unfolded_bspline_convolution(name: str) -> None:
    g = Golden(name)
    o = g.options
    inputs, outputs = g["x"].shape[1], g["output"].shape[1]
    layer = KANConv2d(inputs, outputs, o["kernel_size"], stride=o["stride"], padding=o["padding"], bias=False, dtype=torch.float64)
    x, scaler = leaf(g["x"]), g["spline_scaler"].unsqueeze(-1)
    with torch.no_grad():
        layer.basis.knots.copy_(g["knots"].expand(inputs, -1))
        layer.coef.copy_(taps(g["spline_weight"] * scaler, layer))
        layer.base_weight.copy_(taps(g["base_weight"].unsqueeze(-1), layer)[:, :, 0])
    y = layer(x)
    close(y, g["output"])
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], GRADIENT)
    close(layer.coef.grad * taps(scaler, layer), taps(g["grad_spline_weight"], layer), GRADIENT)
    close(layer.base_weight.grad, taps(g["grad_base_weight"].unsqueeze(-1), layer)[:, :, 0], GRADIENT)


def test_unfolded_chebyshev_convolution() -> None:
    g = Golden("conv_chebyshev_unfold")
    layer = KANConv2d(2, 3, 3, padding=1, basis=Chebyshev(4, "clamp"), base=None, bias=False, dtype=torch.float64)
    x = leaf(g["x"])
    with torch.no_grad():
        layer.coef.copy_(taps(g["cheby_coeffs"].transpose(0, 1), layer))
    y = layer(x)
    close(y, g["output"])
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], GRADIENT)
    close(layer.coef.grad, taps(g["grad_cheby_coeffs"].transpose(0, 1), layer), GRADIENT)


def test_feature_padded_convolution() -> None:
    g = Golden("conv_bspline_features")
    layer = KANConv2d(2, 3, 3, padding=1, base="gelu", bias=False, pad="features", dtype=torch.float64)
    x = leaf(g["x"])
    with torch.no_grad():
        layer.basis.knots.copy_(g["knots"].expand(2, -1))
        layer.coef.copy_(g["spline_conv.0.weight"].view(3, 2, 8, 3, 3))
        layer.base_weight.copy_(g["base_conv.0.weight"])
    y = layer(x)
    close(y, g["output"], 1e-6)
    y.backward(g["grad_output"])
    close(x.grad, g["grad_x"], 1e-6)
    close(layer.coef.grad, g["grad_spline_conv.0.weight"].view(3, 2, 8, 3, 3), 1e-6)
    close(layer.base_weight.grad, g["grad_base_conv.0.weight"], 1e-6)

"""Binary layers: parity with the published layers, equality with the formula, padding, factors, one-bit checkpointing, the batteries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyla.quantized import (
    ApproxSign,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    BiPer,
    EDESign,
    IRNet,
    ReCU,
    RSign,
    SignSTE,
    SwishSign,
    biper_penalty,
    set_stage,
)
from phyla.quantized.layers import BinaryLayer
from phyla.shared.testing import assert_close, check_module, load_golden

_func: Any = torch.func

GOLDEN = Path(__file__).parent / "golden"


def golden_layer(name: str, g: dict[str, Tensor]) -> BinaryConv2d:
    out, per_group, *kernel = g["weight"].shape
    if "t" in g:
        t, k = float(g["t"]), float(g["k"])
        weights, inputs = IRNet(t, k), EDESign(t, k)
    else:
        weights = ReCU(float(g["tau"])) if "tau" in g else BiPer(float(g["frequency"]), stage=2 if int(g["stage"]) == 2 else 1)
        inputs = ApproxSign()
    layer = BinaryConv2d(
        per_group * int(g["groups"]),
        out,
        tuple(kernel),
        tuple(g["stride"].tolist()),
        tuple(g["padding"].tolist()),
        tuple(g["dilation"].tolist()),
        int(g["groups"]),
        weight_binarizer=weights,
        input_binarizer=inputs,
        scale="none" if "t" in g else "learned",
        normalize_input="t" not in g,
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.weight.copy_(g["weight"])
        if layer.scale is not None:
            layer.scale.copy_(g["scale"])
    return layer.train(bool(g["training"]))


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("*.npz") if p.stem.startswith(("biper", "recu", "irnet"))))
@pytest.mark.parametrize("save_bits", [False, True])
def test_published_layers(name: str, save_bits: bool) -> None:
    g = load_golden(GOLDEN / f"{name}.npz")
    layer, x = golden_layer(name, g), g["input"].requires_grad_()
    layer.save_bits = save_bits
    y = layer(x)
    assert_close("output", y, g["output"], 1e-9)
    y.backward(g["grad_output"])
    assert_close("gradient of the input", x.grad, g["grad_input"], 1e-8)
    assert_close("gradient of the weight", layer.weight.grad, g["grad_weight"], 1e-8)
    if layer.scale is not None:
        assert_close("gradient of the factors", layer.scale.grad, g["grad_scale"], 1e-8)
    if "penalty_tau1" in g:
        assert_close("penalty", biper_penalty(layer, weight=1.0), g["penalty_tau1"], 1e-9)


def sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x)


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_its_formula_exactly(padding_value: Any, groups: int, bias: bool) -> None:
    """In float32 the sums of +-1 are exact integers; the factor and the bias come behind them, rounded once each."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 11, 9)
    layer = BinaryConv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 2), groups, bias, padding_value=padding_value)
    padded = F.pad(sign(x), (1, 1, 2, 2), value=float(padding_value))
    sums = F.conv2d(padded, sign(layer.weight), None, (2, 1), 0, (1, 2), groups)
    assert torch.equal(sums, sums.round())
    expected = sums * layer.scale[:, None, None]
    assert torch.equal(layer(x), expected + layer.bias[:, None, None] if bias else expected)
    assert torch.equal(layer(x[0]), layer(x)[0])

    line = BinaryConv1d(4, 6, 3, 2, 2, 2, groups, bias, padding_value=padding_value, scale="mean_abs")
    sums = F.conv1d(F.pad(sign(x[..., 0]), (2, 2), value=float(padding_value)), sign(line.weight), None, 2, 0, 2, groups)
    expected = sums * line.weight.abs().mean((1, 2))[:, None]
    assert torch.equal(line(x[..., 0]), expected + line.bias[:, None] if bias else expected)

    dense = BinaryLinear(9, 5, bias, scale="none")
    expected = F.linear(sign(x), sign(dense.weight))
    assert torch.equal(dense(x), expected + dense.bias if bias else expected)


def test_all_factors_of_a_channel_are_one_vector() -> None:
    layer = BinaryLinear(7, 5, weight_binarizer=IRNet())
    expected = layer.scale * IRNet().scale(layer.weight)
    assert torch.equal(layer.output_scale(), expected)
    x = torch.randn(4, 7)
    assert torch.equal(layer(x), F.linear(sign(x), IRNet()(layer.weight)) * expected)
    assert BinaryLinear(7, 5, scale="none").output_scale() is None
    own = BinaryLinear(7, 5, scale="mean_abs")
    assert not own.output_scale().requires_grad
    binarizers = BinaryLinear(7, 5, scale="none", weight_binarizer=IRNet())
    assert torch.equal(binarizers.output_scale(), IRNet().scale(binarizers.weight))


def test_normalization_moves_the_window_only_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(4, 5, 3, normalize_input=True, dtype=torch.float64)
    x = 30 * torch.randn(3, 4, 6, 6, dtype=torch.float64)
    grads = {}
    for training in (True, False):
        leaf = x.clone().requires_grad_()
        y = layer.train(training)(leaf)
        y.square().sum().backward()
        grads[training] = leaf.grad
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert grads[True].count_nonzero() > 2 * grads[False].count_nonzero()
    alone = x[0].clone().requires_grad_()
    layer.train()(alone).square().sum().backward()
    assert_close("one sample without a batch", alone.grad, grads[True][0], 1e-12)


def test_normalization_does_not_move_a_learned_threshold() -> None:
    torch.manual_seed(0)
    layer = BinaryLinear(9, 4, input_binarizer=RSign(9, dim=-1), normalize_input=True)
    with torch.no_grad():
        layer.input_binarizer.shift.normal_()
    x = 3 * torch.randn(5, 9)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_real_inputs_and_real_weights() -> None:
    """Identity keeps inputs real; BiPer of stage 1 is smooth, so that finite differences see its gradients."""
    torch.manual_seed(0)
    layer = BinaryLinear(5, 3, True, weight_binarizer=BiPer(3.0), input_binarizer=nn.Identity(), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert_close("formula", layer(x), F.linear(x, (3 * layer.weight).sin()) * layer.scale + layer.bias, 1e-12)
    parameters = dict(layer.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    leaves = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(call, (x, *leaves))
    assert torch.autograd.gradgradcheck(call, (x, *leaves))
    set_stage(layer, 2)
    assert_close("stage 2", layer(x), F.linear(x, sign((3 * layer.weight).sin())) * layer.scale + layer.bias, 1e-12)


def test_a_binarizer_may_be_shared() -> None:
    shared = ReCU(0.9)
    model = nn.Sequential(BinaryLinear(6, 6, weight_binarizer=shared), BinaryLinear(6, 6, weight_binarizer=shared))
    model(torch.randn(2, 6)).sum().backward()
    twin = nn.Sequential(*(BinaryLinear(6, 6, weight_binarizer=ReCU()) for _ in range(2)))
    twin.load_state_dict(model.state_dict())
    assert all(layer.weight_binarizer.tau == 0.9 for layer in twin)


SMOOTH: Callable[[], nn.Module] = lambda: BinaryConv2d(4, 6, 3, padding=1, weight_binarizer=BiPer(5.0), input_binarizer=nn.Identity())  # noqa: E731
LAYERS: dict[str, tuple[Callable[[], BinaryLayer], tuple[int, ...]]] = {
    "linear": (lambda: BinaryLinear(7, 5, True), (4, 7)),
    "linear, sequences, bits": (lambda: BinaryLinear(7, 5, weight_binarizer=ReCU(), save_bits=True), (4, 3, 7)),
    "conv1d": (lambda: BinaryConv1d(4, 6, 3, padding=2, padding_value=1, scale="mean_abs", input_binarizer=SwishSign()), (3, 4, 9)),
    "conv2d, IR-Net": (
        lambda: BinaryConv2d(4, 6, 3, groups=2, bias=True, weight_binarizer=IRNet(), input_binarizer=EDESign(), save_bits=True),
        (3, 4, 6, 5),
    ),
    "conv2d, BiPer": (
        lambda: BinaryConv2d(
            4, 6, 3, padding=1, weight_binarizer=BiPer(stage=2), input_binarizer=SignSTE(), normalize_input=True, save_bits=True
        ),
        (3, 4, 6, 5),
    ),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
def test_battery(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    reason = "finite differences of a gradient see the flat sign, the second derivative its surrogate; see test_transforms"
    check_module(make, torch.randn(shape), without={"module_transforms": reason})


def test_battery_of_a_smooth_layer() -> None:
    torch.manual_seed(0)
    check_module(SMOOTH, torch.randn(3, 4, 6, 5))


@each_layer
def test_transforms(name: str) -> None:
    """grad, vmap, per-sample gradients, jvp and the order of differentiation agree with autograd."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x, direction = make().double(), torch.randn(shape).double(), torch.randn(shape).double()
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = _func.functional_call(layer, parameters, (x,))
        return (y.sin() * torch.linspace(0.5, 2, y.shape[-1], dtype=y.dtype)).sum()

    leaf = x.clone().requires_grad_()
    value = loss(dict(layer.named_parameters()), leaf)
    grads = torch.autograd.grad(value, [*layer.parameters(), leaf], create_graph=True)
    for (key, mine), theirs in zip(_func.grad(loss)(parameters, x).items(), grads, strict=False):
        assert_close(key, mine, theirs, 1e-10)
    assert_close("jvp", _func.jvp(lambda t: loss(parameters, t), (x,), (direction,))[1], (grads[-1] * direction).sum(), 1e-10)
    rows = _func.vmap(lambda row: _func.functional_call(layer, parameters, (row[None],))[0])(x)
    assert_close("vmap", rows, layer(x), 1e-10)
    each = _func.vmap(_func.grad(lambda p, row: loss(p, row[None])), in_dims=(None, 0))(parameters, x)
    for (key, mine), theirs in zip(each.items(), grads, strict=False):
        assert_close(f"per-sample gradients of {key}", mine.sum(0), theirs, 1e-10)
    product = torch.autograd.grad((grads[-1] * direction).sum(), leaf)[0]
    hessian = _func.jvp(_func.grad(lambda t: loss(parameters, t)), (x,), (direction,))[1]
    assert_close("Hessian-vector product", product, hessian, 1e-10)


def test_bad_arguments() -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: BinaryLinear(0, 3), "in_features"),
        (lambda: BinaryLinear(3, -1), "out_features"),
        (lambda: BinaryConv2d(4, 6, 3, groups=3), "groups"),
        (lambda: BinaryConv2d(4, 6, 0), "kernel_size"),
        (lambda: BinaryConv2d(4, 6, (3, 3, 3)), "kernel_size"),
        (lambda: BinaryConv2d(4, 6, 3, stride=0), "stride"),
        (lambda: BinaryConv2d(4, 6, 3, padding=-1), "padding"),
        (lambda: BinaryConv1d(4, 6, 3, padding_value=2), "padding_value"),  # type: ignore[arg-type]
        (lambda: BinaryLinear(3, 3, scale="max"), "scale"),  # type: ignore[arg-type]
        (lambda: BinaryLinear(3, 3, input_binarizer=nn.Identity(), save_bits=True), "save_bits"),
        (lambda: BinaryLinear(3, 3, input_binarizer=BiPer(), save_bits=True)(torch.randn(2, 3)), "save_bits"),
        (lambda: BinaryLinear(3, 4)(torch.randn(2, 5)), "5"),
        (lambda: BinaryConv2d(3, 4, 1)(torch.randn(2, 5, 4, 4)), r"\(2, 5, 4, 4\)"),
        (lambda: BinaryConv2d(3, 4, 1)(torch.randn(3, 4)), "x: "),
        (lambda: BinaryLinear(1, 4, normalize_input=True)(torch.randn(2, 1)), "x: "),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: BinaryLinear(3, 3, weight_binarizer=nn.Identity()), "weight_binarizer"),  # type: ignore[arg-type]
        (lambda: BinaryLinear(3, 3, input_binarizer=nn.ReLU()), "input_binarizer"),
        (lambda: BinaryLinear(2.0, 3), "in_features"),  # type: ignore[arg-type]
        (lambda: BinaryLinear(3, 3)(torch.ones(2, 3, dtype=torch.int64)), "x: "),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_start_of_training() -> None:
    """Kaiming's normal weights; with BiPer(20) the frequency times the mean absolute weight lies in the useful band around 1 to 2."""
    torch.manual_seed(0)
    layer = BinaryConv2d(16, 64, 3, bias=True)
    assert float(layer.weight.detach().std()) == pytest.approx((2 / 144) ** 0.5, rel=0.05)
    assert 1 < 20 * float(layer.weight.detach().abs().mean()) < 2.5
    assert float(layer.scale.detach().min()) >= 0
    assert float(layer.scale.detach().max()) < 1
    assert "padding_value=0" in repr(layer)
    assert "scale=learned" in repr(BinaryLinear(2, 3))

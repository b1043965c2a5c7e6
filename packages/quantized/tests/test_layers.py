"""Binary layers: parity with the published layers, equality with the formula, padding, factors, one-bit checkpointing, the batteries."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from phyla.quantized import (
    ApproxSign,
    BinaryConv2d,
    BiPer,
    EDESign,
    IRNet,
    ReCU,
    biper_penalty,
)
from phyla.shared.testing import assert_close, load_golden

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

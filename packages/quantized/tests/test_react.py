"""Activations with learned thresholds."""

import pytest
import torch
from torch import nn

from phyla.quantized import BinaryConv2d, BinaryLinear, RPReLU, RSign, SwishSign
from phyla.quantized import functional as QF
from phyla.shared.testing import assert_close, check_module


def test_rsign_is_a_sign_with_a_threshold_a_channel() -> None:
    act = RSign(3)
    with torch.no_grad():
        act.shift.copy_(torch.tensor([0.5, 0.0, -0.5]))
    x = torch.tensor([-0.6, -0.5, 0.0, 0.49, 0.5]).expand(1, 3, 5).contiguous()
    assert torch.equal(act(x), torch.where(x < -act.shift[:, None], -1.0, 1.0))
    y = act(x.requires_grad_())
    y.sum().backward()
    expected = (2 - 2 * (x + act.shift[:, None]).abs()).clamp(min=0)
    assert_close("input", x.grad, expected, 1e-6)
    assert_close("shift", act.shift.grad, expected.sum((0, 2)), 1e-6)


def test_rsign_stands_where_a_binarizer_stands() -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(4, 5, 3, input_binarizer=RSign(4, binarizer=SwishSign()), save_bits=True)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        layer.input_binarizer.shift.uniform_(-1, 1)
    layer(x).square().sum().backward()
    assert layer.input_binarizer.shift.grad.any()
    rows = BinaryLinear(6, 2, input_binarizer=RSign(6, dim=-1))
    assert rows(torch.randn(3, 5, 6)).shape == (3, 5, 2)
    assert layer.input_binarizer.is_binary


def test_rprelu_is_a_shifted_prelu() -> None:
    torch.manual_seed(0)
    act = RPReLU(3)
    with torch.no_grad():
        for parameter in act.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 4, 5)
    gamma, zeta = (p[:, None, None] for p in (act.gamma, act.zeta))
    assert_close("formula", act(x), nn.functional.prelu(x - gamma, act.slope) + zeta, 1e-6)
    fresh = RPReLU(3, slope=0.1)
    assert torch.equal(fresh(x), nn.functional.leaky_relu(x, 0.1))


def test_batteries() -> None:
    torch.manual_seed(0)
    reason = {"module_transforms": "finite differences of a gradient see the flat sign, the second derivative its surrogate"}
    check_module(lambda: RSign(4), torch.randn(3, 4, 5), without=reason)
    check_module(lambda: RPReLU(4), torch.randn(3, 4, 5))


def test_bad_arguments() -> None:
    for call, message in (
        (lambda: RSign(0), "num_channels"),
        (lambda: RSign(3)(torch.randn(2, 4)), "3 channels"),
        (lambda: RPReLU(3, dim=3)(torch.randn(2, 3)), "dimension 3"),
        (lambda: RPReLU(3, slope=float("nan")), "slope"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="binarizer"):
        RSign(3, binarizer=nn.ReLU())  # type: ignore[arg-type]
    assert torch.equal(QF.approx_sign(torch.zeros(2)), torch.ones(2))

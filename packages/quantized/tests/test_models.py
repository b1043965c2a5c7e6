"""Architectures by their parts and parameter counts; published checkpoints by their names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import run, wild
from torch import Tensor, nn

from phyla.quantized import (
    ApproxSign,
    BinaryBlock,
    BinaryConv2d,
    BinaryLinear,
    BiPer,
    EDESign,
    IRNet,
    ReCU,
    SignSTE,
    load_biper_state_dict,
    resnet18,
    resnet20,
    vgg_small,
)
from phyla.quantized.models import ResNet


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts() -> None:
    assert round(count(vgg_small()) / 1e6, 2) == 4.66
    assert count(resnet18()) == 11_005_002, "11.01 million"
    binary = 9 * 6 * 16**2 + 9 * (16 * 32 + 5 * 32**2) + 9 * (32 * 64 + 5 * 64**2)  # 3 x 3 taps of 18 convolutions
    norms_and_factors = 2 * (16 * 7 + 32 * 6 + 64 * 6 + 64) + 6 * (16 + 32 + 64)
    assert count(resnet20()) == binary + 27 * 16 + norms_and_factors + 650


@pytest.mark.parametrize("make", [vgg_small, resnet20, resnet18])
def test_first_and_last_layer_are_float_and_all_others_binary(make: Callable[..., nn.Module]) -> None:
    model = make(
        7, weight_binarizer=lambda: IRNet(t_min=1e-3), input_binarizer=EDESign, scale="none", normalize_input=False, padding_value=1
    )
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d | BinaryConv2d)]
    assert isinstance(convolutions[0], nn.Conv2d)
    assert len(convolutions) == {"vgg_small": 6, "resnet20": 19, "resnet18": 17}[make.__name__]
    for layer in convolutions[1:]:
        assert isinstance(layer, BinaryConv2d)
        assert isinstance(layer.weight_binarizer, IRNet)
        assert layer.weight_binarizer.t_min == 1e-3
        assert type(layer.input_binarizer) is EDESign
        assert layer.scale is None
        assert not layer.normalize_input
        assert layer.padding_value == 1
        assert layer.kernel_size == (3, 3)
        assert layer.bias is None
    assert len({id(layer.weight_binarizer) for layer in convolutions[1:]}) == len(convolutions) - 1, "each layer its own binarizer"
    assert [type(module) for module in model.modules()][-1] is nn.Linear
    assert run(model.eval(), torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_the_recipe_without_options_is_bipers() -> None:
    layer = resnet18().get_submodule("layer1.0.conv1")
    assert isinstance(layer, BinaryConv2d)
    assert isinstance(layer.weight_binarizer, BiPer)
    assert layer.weight_binarizer.frequency == 20
    assert type(layer.input_binarizer) is ApproxSign
    assert layer.normalize_input
    assert layer.scale is not None


def test_vgg_small_layer_by_layer() -> None:
    model = vgg_small(width=4, weight_binarizer=SignSTE)
    names = "conv0 bn0 nonlinear0 conv1 pool1 bn1 nonlinear1 conv2 bn2 nonlinear2 conv3 pool3 bn3 nonlinear3 "
    names += "conv4 bn4 nonlinear4 conv5 pool5 bn5 nonlinear5 flatten fc"
    assert [name for name, _ in model.named_children()] == names.split()
    channels = [(model.get_submodule(f"conv{i}").in_channels, model.get_submodule(f"conv{i}").out_channels) for i in range(6)]
    assert channels == [(3, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    assert model.fc.in_features == 16 * 4 * 4


def test_a_block_by_its_equation() -> None:
    torch.manual_seed(0)
    for planes, stride in ((6, 1), (12, 2), (9, 1), (6, 2)):
        block = wild(BinaryBlock(6, planes, stride, weight_binarizer=SignSTE))
        x = 2 * torch.randn(3, 6, 8, 8)
        around = torch.zeros(3, planes, 8 // stride, 8 // stride)
        first = (planes - 6) // 2
        around[:, first : first + 6] = x.unfold(2, stride, stride).unfold(3, stride, stride).mean((-1, -2))
        y = (run(block.bn1, run(block.conv1, x)) + around).clamp(-1, 1)
        z = (run(block.bn2, run(block.conv2, y)) + y).clamp(-1, 1)
        assert torch.allclose(run(block, x), z, atol=1e-6)


def test_a_residual_network_by_its_parts() -> None:
    torch.manual_seed(0)
    for model, activated in (
        (resnet20(width=4, weight_binarizer=ReCU), True),
        (resnet18(widths=(4, 4, 8, 8), weight_binarizer=ReCU), False),
    ):
        wild(model)
        assert isinstance(model, ResNet)
        assert [len(layer) for layer in model.layers] == ([3, 3, 3] if activated else [2, 2, 2, 2])
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            y = model.bn1(model.conv1(x))
            y = F.hardtanh(y) if activated else y
            for i, layer in enumerate(model.layers):
                y = layer(y)
                assert y.shape[2] == 32 // 2**i
            y = model.linear(model.bn2(y.mean((2, 3))))
        assert torch.allclose(run(model, x), y, atol=1e-6)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    for model in (vgg_small(width=4), resnet20(width=4), resnet18(widths=(4, 4, 4, 4))):
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: vgg_small(width=0), "width: expected a positive int, got 0"),
        (lambda: vgg_small(0), "num_classes: expected a positive int, got 0"),
        (lambda: vgg_small(image_size=20), "image_size: expected a multiple of 8, got 20"),
        (lambda: resnet18(widths=(4, 4, 4)), "widths: expected one width for each of 4 layers, got (4, 4, 4)"),
        (lambda: resnet18(widths=(8, 4, 4, 4)), "widths: expected a sequence that does not decrease, got 4 after 8"),
        (lambda: resnet20(width=4)(torch.randn(2, 3, 30, 30)), "x: expected height and width that are even before each halving"),
    ],
)
def test_messages(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert text in str(caught.value)


# published checkpoints


def published(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A model's state under the names of the BiPer repository."""
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("_extra_state"):
            continue
        if name.endswith(".scale"):
            layer = prefix + name.removesuffix("scale")
            state |= {f"{layer}alpha": value.view(-1, 1, 1), f"{layer}tau": torch.tensor(1.0), f"{layer}beta": torch.ones(len(value), 1, 1)}
        else:
            state[prefix + name] = value
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_bipers_checkpoints_load(prefix: str) -> None:
    torch.manual_seed(0)
    trained, fresh = wild(resnet20(width=4)), resnet20(width=4).eval()
    load_biper_state_dict(fresh, published(trained, prefix))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(run(fresh, x), run(trained, x))
    assert fresh.layer1[0].conv1.weight_binarizer.stage == 1, "the stage stays the model's"


def test_a_single_layer_and_statistics_without_a_counter_load() -> None:
    layer, model = BinaryConv2d(4, 6, 3, weight_binarizer=BiPer()), resnet20(width=4)
    load_biper_state_dict(layer, {"weight": torch.ones(6, 4, 3, 3), "alpha": torch.arange(6.0).view(6, 1, 1), "tau": torch.tensor(0.1)})
    assert layer.scale is not None
    assert layer.scale.tolist() == [0, 1, 2, 3, 4, 5]
    state = {name: value for name, value in published(model).items() if not name.endswith("num_batches_tracked")}
    load_biper_state_dict(model, state)


def test_what_does_not_fit_is_told_and_nothing_is_loaded() -> None:
    model = resnet20(width=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in published(model).items()}

    def error(changes: dict[str, Any], *drop: str) -> str:
        with pytest.raises(ValueError, match="state_dict: ") as caught:
            load_biper_state_dict(model, {name: value for name, value in (state | changes).items() if name not in drop})
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return str(caught.value)

    assert "unknown ['more']" in error({"more": torch.ones(1)})
    assert "missing ['layer1.0.conv1.scale', 'linear.bias']" in error({}, "layer1.0.conv1.alpha", "linear.bias")
    assert "unknown ['conv1.alpha']" in error({"conv1.alpha": torch.ones(1)}), "the first convolution is no binary layer"
    assert "linear.bias: expected shape (10,), got (9,)" in error({"linear.bias": torch.ones(9)})
    with pytest.raises(TypeError, match="state_dict: epoch: expected a Tensor, got int"):
        load_biper_state_dict(model, {"epoch": 3})  # type: ignore[dict-item]


def test_linear_layers_take_alpha_too() -> None:
    model = nn.Sequential(BinaryLinear(3, 4))
    load_biper_state_dict(model, {"0.weight": torch.ones(4, 3), "0.alpha": torch.full((4, 1, 1), 2.0)})
    assert model[0].scale.tolist() == [2.0] * 4

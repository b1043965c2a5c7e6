"""Packed models give the outputs of the float graph, bit for bit."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import run, wild
from torch import Tensor, nn

from phyla.quantized import (
    ApproxSign,
    BinaryBlock,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    BiPer,
    EDESign,
    IRNet,
    PackedBlock,
    PackedConv1d,
    PackedConv2d,
    PackedLinear,
    ReCU,
    SignSTE,
    SwishSign,
    pack,
    resnet18,
    resnet20,
    set_stage,
    vgg_small,
)
from phyla.quantized.models import ResNet
from phyla.quantized.packed import PackedMaxPool2d
from phyla.quantized.packing import packed_settings
from phyla.quantized.react import RPReLU, RSign

WEIGHTS = (SignSTE, ApproxSign, SwishSign, EDESign, lambda: BiPer(stage=2), ReCU, IRNet)


def same(model: nn.Module, x: Tensor, *, bits: int, blocks: int = 0) -> nn.Module:
    """Both packed forms give the model's output; returns the folded one, in which `bits` layers emit bits."""
    wanted = run(model, x)
    plain, folded = pack(model, fold=False), pack(model)
    assert torch.equal(run(plain, x), wanted), "without folding"
    assert torch.equal(run(folded, x), wanted), "folded"
    assert wanted.numel() == 0 or run(folded, x).stride() == wanted.stride()
    emits = [s for s in packed_settings(folded).values() if s.get("output") == "bits"]
    assert len(emits) == bits
    assert sum(isinstance(module, PackedBlock) for module in folded.modules()) == blocks
    assert not any(s.get("output") == "bits" for s in packed_settings(plain).values())
    assert not folded.training
    for name, buffer in folded.named_buffers():
        assert not name.endswith("weight_packed") or buffer.dtype == torch.int64
    return folded


def conv(inputs: int, outputs: int, **options: Any) -> BinaryConv2d:
    return BinaryConv2d(inputs, outputs, options.pop("kernel_size", 3), **{"padding": 1, **options})


# single layers


@pytest.mark.parametrize("make", WEIGHTS)
@pytest.mark.parametrize("scale", ["learned", "mean_abs", "none"])
def test_every_binarizer_and_factor(make: Callable[[], Any], scale: Any) -> None:
    torch.manual_seed(0)
    layers = (
        BinaryLinear(70, 9, bias=True, weight_binarizer=make(), scale=scale),
        BinaryConv1d(7, 6, 3, padding=1, weight_binarizer=make(), scale=scale),
        BinaryConv2d(7, 6, 3, bias=True, weight_binarizer=make(), scale=scale),
    )
    shapes = ((5, 70), (3, 7, 11), (3, 7, 6, 5))
    for layer, shape, kind in zip(layers, shapes, (PackedLinear, PackedConv1d, PackedConv2d), strict=True):
        assert isinstance(same(wild(layer), torch.randn(shape), bits=0), kind)


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_geometry(padding_value: Any, groups: int) -> None:
    torch.manual_seed(0)
    for channels, kernel, stride, padding, dilation in itertools.product((4, 132), ((1, 1), (3, 2)), (1, 2), (0, (2, 1)), (1, 2)):
        layer = BinaryConv2d(channels, 8, kernel, stride, padding, dilation, groups, padding_value=padding_value)
        same(wild(layer), torch.randn(2, channels, 8, 7), bits=0)
        row = BinaryConv1d(channels, 8, kernel[0], stride, 1, dilation, groups, padding_value=padding_value)
        same(wild(row), torch.randn(2, channels, 9), bits=0)


def test_shapes_of_inputs() -> None:
    torch.manual_seed(0)
    for shape in ((70,), (2, 70), (2, 3, 70), (0, 70), (2, 0, 70)):
        same(wild(BinaryLinear(70, 5)), torch.randn(shape), bits=0)
    for shape in ((6, 8, 9), (2, 6, 8, 9), (0, 6, 8, 9)):
        same(wild(BinaryConv2d(6, 5, 3)), torch.randn(shape), bits=0)
    for shape in ((6, 8), (2, 6, 8)):
        same(wild(BinaryConv1d(6, 5, 3)), torch.randn(shape), bits=0)
    same(wild(BinaryConv2d(6, 5, 3)), torch.randn(2, 6, 8, 9).contiguous(memory_format=torch.channels_last), bits=0)


def test_zero_and_not_a_number_are_positive() -> None:
    layer = wild(BinaryLinear(4, 3, scale="none"))
    same(layer, torch.tensor([[0.0, -0.0, float("nan"), -1.0], [float("inf"), -float("inf"), 1e-45, -1e-45]]), bits=0)


def test_float64_keeps_its_precision() -> None:
    torch.manual_seed(0)
    model = wild(nn.Sequential(conv(5, 6), nn.BatchNorm2d(6), conv(6, 7), nn.BatchNorm2d(7)).double())
    same(model, torch.randn(2, 5, 8, 8, dtype=torch.float64), bits=1)


def test_real_inputs_meet_packed_weights() -> None:
    torch.manual_seed(0)
    linear = BinaryLinear(130, 9, bias=True, input_binarizer=nn.Identity())
    image = BinaryConv2d(6, 8, 3, 2, 1, groups=2, padding_value=1, input_binarizer=nn.Identity())
    row = BinaryConv1d(6, 8, 3, padding=2, dilation=2, input_binarizer=BiPer(stage=1))
    for layer, shape in ((linear, (4, 130)), (image, (3, 6, 9, 8)), (row, (3, 6, 9))):
        packed = same(wild(layer), torch.randn(shape), bits=0)
        assert packed.real_input
    model = wild(nn.Sequential(conv(5, 6), nn.BatchNorm2d(6), conv(6, 7, input_binarizer=nn.Identity())))
    same(model, torch.randn(2, 5, 8, 8), bits=0)


@pytest.mark.parametrize("binarizer", [BiPer(2.0, stage=2), ReCU(), IRNet()])
def test_inputs_of_other_binarizers_are_binarized_before_they_are_packed(binarizer: Any) -> None:
    torch.manual_seed(0)
    model = wild(nn.Sequential(conv(5, 6), nn.BatchNorm2d(6), conv(6, 7, input_binarizer=binarizer)))
    same(model, torch.randn(4, 5, 8, 8), bits=0)


# chains


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("width", [5, 16, 64])
def test_vgg_small_is_equal(width: int, padding_value: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = vgg_small(width=width, padding_value=padding_value, weight_binarizer=lambda: BiPer(stage=2))
    same(wild(model, seed), torch.randn(3, 3, 32, 32), bits=4)


@given(
    seed=st.integers(0, 1000),
    widths=st.lists(st.sampled_from([1, 3, 63, 64, 65, 130]), min_size=2, max_size=4),
    pooled=st.lists(st.sampled_from(["no", "before", "after"]), min_size=4, max_size=4),
    extras=st.lists(st.sampled_from(["", "hardtanh", "narrow", "dropout", "identity"]), min_size=4, max_size=4),
    bias=st.booleans(),
    head=st.sampled_from(["float", "binary", "none"]),
)
@settings(max_examples=60, deadline=None)
def test_any_chain_of_convolutions(seed: int, widths: list[int], pooled: list[str], extras: list[str], bias: bool, head: str) -> None:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    inputs, size = 3, 12
    pools = 0
    for width, pool, extra in zip(widths, pooled, extras, strict=False):
        parts.append(conv(inputs, width, bias=bias, padding_value=seed % 3 - 1))
        middle: list[nn.Module] = [nn.BatchNorm2d(width)]
        pool = pool if size >= 4 else "no"
        if pool != "no":
            middle.insert(0 if pool == "before" else 1, nn.MaxPool2d(2 + seed % 2, 2))
            size = (size - 2 - seed % 2) // 2 + 1
            pools += 1
        if extra:
            middle.append(
                {
                    "hardtanh": nn.Hardtanh(),
                    "narrow": nn.Hardtanh(-0.1, 2.0, inplace=True),
                    "dropout": nn.Dropout(),
                    "identity": nn.Identity(),
                }[extra]
            )
        parts += middle
        inputs = width
    links = len(widths) - 1
    if head != "none":
        parts.append(nn.Flatten())
        parts.append(nn.Linear(inputs * size * size, 4) if head == "float" else BinaryLinear(inputs * size * size, 4, bias=bias))
        links += head == "binary"
    folded = same(wild(nn.Sequential(*parts), seed), torch.randn(2, 3, 12, 12), bits=links)
    assert sum(isinstance(module, PackedMaxPool2d) for module in folded.modules()) >= pools - (head != "binary")


@pytest.mark.parametrize("features", [30, 64, 100])
def test_a_chain_of_linear_layers(features: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        BinaryLinear(70, features, bias=True),
        nn.BatchNorm1d(features),
        nn.Hardtanh(),
        nn.Dropout(),
        BinaryLinear(features, 200),
        nn.BatchNorm1d(200),
        BinaryLinear(200, 10),
        nn.BatchNorm1d(10),
    )
    folded = same(wild(model), torch.randn(33, 70), bits=2)
    assert isinstance(folded[7], nn.BatchNorm1d), "ahead of a float layer it stays torch's"
    with pytest.raises(ValueError, match="x: expected shape"):
        folded(torch.randn(2, 33, 70))


def test_a_chain_of_sequences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        BinaryConv1d(4, 70, 3, padding=1),
        nn.BatchNorm1d(70),
        nn.Hardtanh(),
        BinaryConv1d(70, 30, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.BatchNorm1d(30),
        nn.Flatten(),
        BinaryLinear(30 * 10, 5),
    )
    same(wild(model), torch.randn(3, 4, 20), bits=2)


def test_nested_chains_and_names() -> None:
    torch.manual_seed(0)

    def unit(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv(inputs, outputs), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.Hardtanh())

    model = wild(nn.Sequential(unit(3, 8), nn.Sequential(unit(8, 70), unit(70, 12)), nn.Flatten(), nn.Linear(12 * 4, 3)))
    folded = same(model, torch.randn(2, 3, 16, 16), bits=2)
    names = {name for name in folded.state_dict() if name.endswith("weight_packed")}
    assert names == {"0.0.weight_packed", "1.0.0.weight_packed", "1.1.0.weight_packed"}


class Twice(nn.Module):
    """Uses its parts in an order that no Sequential shows."""

    def __init__(self, part: nn.Sequential, layer: nn.Module) -> None:
        super().__init__()
        self.part, self.again, self.layer = part, part, layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.again(self.part(x)))
        return out


def test_a_module_that_stands_twice_is_packed_but_not_folded() -> None:
    torch.manual_seed(0)
    shared = conv(6, 6)
    model = Twice(nn.Sequential(conv(6, 6), nn.BatchNorm2d(6), shared, nn.BatchNorm2d(6)), shared)
    folded = same(wild(model), torch.randn(2, 6, 8, 8), bits=0)
    assert folded.layer is folded.part[2]
    norm = nn.BatchNorm2d(6)
    once = wild(nn.Sequential(conv(6, 6), norm, nn.Hardtanh(), conv(6, 6), norm, nn.Hardtanh(), conv(6, 6)))
    same(once, torch.randn(2, 6, 8, 8), bits=2)


@pytest.mark.parametrize(
    "between",
    [
        [nn.BatchNorm2d(6, track_running_stats=False)],
        [nn.BatchNorm2d(6), nn.AvgPool2d(2)],
        [nn.BatchNorm2d(6), nn.MaxPool2d(3, padding=1)],
        [nn.BatchNorm2d(6), nn.MaxPool2d(3, ceil_mode=True)],
        [nn.BatchNorm2d(6), nn.MaxPool2d(2, dilation=2)],
        [nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.MaxPool2d(2)],
        [nn.BatchNorm2d(6), nn.Softmax(1)],
        [nn.GroupNorm(2, 6)],
        [nn.Hardtanh()],
        [],
    ],
)
def test_what_is_no_such_chain_is_packed_only(between: list[nn.Module]) -> None:
    torch.manual_seed(0)
    same(wild(nn.Sequential(conv(3, 6), *between, conv(6, 7, kernel_size=1))), torch.randn(3, 3, 12, 12), bits=0)


def test_a_sequential_with_its_own_forward_is_no_chain() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + super().forward(x)
            return out

    torch.manual_seed(0)
    model = nn.Sequential(conv(6, 6), Residual(nn.BatchNorm2d(6), conv(6, 6)), nn.BatchNorm2d(6), conv(6, 6))
    same(wild(model), torch.randn(3, 6, 8, 8), bits=0)


@pytest.mark.parametrize("place", ["binarizer", "module"])
@pytest.mark.parametrize("clip", [0.5, 10.0])
def test_the_shift_of_an_rsign_is_folded(place: str, clip: float) -> None:
    """Also behind a hardtanh that holds the shift's zero out of reach."""
    torch.manual_seed(0)

    def sign(channels: int, dim: int = 1) -> RSign:
        made = RSign(channels, dim=dim)
        made.shift.data.normal_()
        return made

    def join(norm: nn.Module, layer: Callable[..., nn.Module], dim: int = 1) -> list[nn.Module]:
        activated = [norm, nn.Hardtanh(-clip, clip)]
        return [*activated, layer(input_binarizer=sign(20, dim))] if place == "binarizer" else [*activated, sign(20, dim), layer()]

    image = [conv(3, 20), nn.MaxPool2d(2), *join(nn.BatchNorm2d(20), partial(BinaryConv2d, 20, 7, 3)), nn.BatchNorm2d(7)]
    row = [BinaryConv1d(3, 20, 3), *join(nn.BatchNorm1d(20), partial(BinaryConv1d, 20, 7, 3), -2)]
    flat = [BinaryLinear(30, 20), *join(nn.BatchNorm1d(20), partial(BinaryLinear, 20, 7), -1)]
    for parts, shape in ((image, (4, 3, 12, 12)), (row, (4, 3, 12)), (flat, (40, 30))):
        same(wild(nn.Sequential(*parts)), torch.randn(shape), bits=1)


def test_an_rsign_of_other_dimensions_or_pixels_is_not_folded() -> None:
    torch.manual_seed(0)
    along_rows = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), conv(12, 5, input_binarizer=RSign(12, dim=2)))
    pixels = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Flatten(), BinaryLinear(4 * 144, 5, input_binarizer=RSign(4 * 144)))
    steep = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), RPReLU(12), conv(12, 5))
    for model in (along_rows, pixels, steep):
        for module in model.modules():
            if isinstance(module, RSign):
                module.shift.data.normal_()
        same(wild(model), torch.randn(3, 3, 12, 12), bits=0)


# residual networks


@pytest.mark.parametrize("binarizer", [lambda: BiPer(stage=2), ReCU, IRNet])
def test_resnet20_is_equal(binarizer: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    for width, padding_value in ((16, 0), (5, 1)):
        model = resnet20(width=width, weight_binarizer=binarizer, padding_value=padding_value)
        same(wild(model), torch.randn(3, 3, 32, 32), bits=0, blocks=9)


def test_resnet18_is_equal() -> None:
    torch.manual_seed(0)
    model = resnet18(widths=(64, 64, 96, 200), weight_binarizer=SignSTE)
    same(wild(model), torch.randn(2, 3, 32, 32), bits=0, blocks=8)


def test_blocks_in_a_sequential_of_someone_else() -> None:
    torch.manual_seed(0)
    blocks = [BinaryBlock(8, 8, weight_binarizer=SignSTE), BinaryBlock(8, 16, 2, weight_binarizer=SignSTE)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.ReLU(), BinaryBlock(16, 16, weight_binarizer=ReCU), nn.AvgPool2d(2))
    same(wild(model), torch.randn(2, 3, 18, 18), bits=0, blocks=3)
    last = [module.last for module in pack(model).modules() if isinstance(module, PackedBlock)]
    assert last == [False, True, True]


def test_a_network_that_looks_in_between_gets_tensors_there() -> None:
    class Features(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            for part in (self.conv1, self.bn1, *self.layers):
                x = part(x)
                assert isinstance(x, Tensor)
            return x

    torch.manual_seed(0)
    model = wild(Features((2, 1), (4, 8), weight_binarizer=SignSTE))
    same(model, torch.randn(2, 3, 8, 8), bits=0, blocks=3)


def test_blocks_that_the_packed_form_cannot_take_stay_torch_modules() -> None:
    torch.manual_seed(0)
    real = BinaryBlock(8, 8, weight_binarizer=SignSTE, input_binarizer=nn.Identity)
    double = BinaryBlock(8, 8, weight_binarizer=SignSTE).double()
    biased = BinaryBlock(8, 8, weight_binarizer=SignSTE)
    biased.conv2 = BinaryConv2d(8, 8, 3, padding=1, bias=True)
    for block in (real, biased):
        same(wild(nn.Sequential(block)), torch.randn(2, 8, 6, 6), bits=0)
    same(wild(nn.Sequential(double)), torch.randn(2, 8, 6, 6, dtype=torch.float64), bits=0)


# a packed model is a module like any other


@pytest.fixture(params=["vgg", "resnet"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "vgg":
        return wild(vgg_small(width=16, image_size=16, weight_binarizer=SignSTE))
    return wild(resnet20(width=8, weight_binarizer=SignSTE))


@pytest.mark.parametrize("fold", [True, False])
def test_packing_leaves_the_model_as_it_was(network: nn.Module, fold: bool) -> None:
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = [type(module) for module in network.modules()]
    pack(network, fold=fold)
    assert all(module.training for module in network.modules())
    assert [type(module) for module in network.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("fold", [True, False])
def test_state_copy_compile_and_export(network: nn.Module, fold: bool) -> None:
    x = torch.randn(3, 3, 16, 16)
    packed = pack(network, fold=fold)
    wanted = run(packed, x)
    other = pack(wild(copy.deepcopy(network), seed=9), fold=fold)
    assert not torch.equal(run(other, x), wanted)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(run(other, x), wanted)
    assert torch.equal(run(copy.deepcopy(packed), x), wanted)
    exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)).module()
    assert torch.equal(run(exported, x), wanted)
    assert run(exported, torch.randn(5, 3, 16, 16)).shape == (5, 10)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, x), wanted)


def test_packing_again_changes_nothing(network: nn.Module) -> None:
    packed = pack(network)
    assert packed_settings(pack(packed)) == packed_settings(packed)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(run(pack(packed), x), run(packed, x))


def test_packed_layers_take_words() -> None:
    from phyla.quantized import functional as QF

    torch.manual_seed(0)
    linear, image, row = (pack(wild(layer)) for layer in (BinaryLinear(70, 5), BinaryConv2d(70, 5, 3), BinaryConv1d(70, 5, 3)))
    x = torch.randn(2, 70)
    assert torch.equal(linear(QF.pack(x)), linear(x))
    x = torch.randn(2, 70, 6, 6)
    assert torch.equal(image(QF.pack(x.permute(0, 2, 3, 1))), image(x))
    x = torch.randn(2, 70, 6)
    assert torch.equal(row(QF.pack(x.permute(0, 2, 1))), row(x))


def test_weights_take_a_thirtysecond_of_the_memory() -> None:
    model = resnet18(weight_binarizer=SignSTE)
    layers = {name: module.weight for name, module in model.named_modules() if isinstance(module, BinaryConv2d)}
    packed = {
        name.removesuffix(".weight_packed"): value for name, value in pack(model).state_dict().items() if name.endswith("weight_packed")
    }
    assert packed.keys() == layers.keys()
    for name, weight in layers.items():
        assert 8 * packed[name].numel() * 31.5 <= 4 * weight.numel()
    assert 8 * sum(value.numel() for value in packed.values()) < 1.4e6


# messages


def test_stage_1_of_biper_is_refused_and_the_layer_named() -> None:
    model = vgg_small(width=4)
    with pytest.raises(ValueError, match=r"conv1: weight_binarizer.*set_stage\(model, 2\)"):
        pack(model)
    set_stage(model, 2)
    pack(model)
    with pytest.raises(ValueError, match=r"^weight_binarizer: .*set_stage\(model, 2\)"):
        pack(BinaryLinear(3, 4, weight_binarizer=BiPer()))


def test_other_messages() -> None:
    with pytest.raises(TypeError, match=r"0: weight: expected float32 or float64, got bfloat16: call model\.float"):
        pack(nn.Sequential(BinaryLinear(3, 4, dtype=torch.bfloat16)))
    bad = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), conv(6, 6))
    bad[0].scale.data[3] = float("nan")
    bad[1].running_mean[2] = float("inf")
    pack(bad)  # constant channels are signs too
    bad[0].scale.data[1], bad[1].weight.data[1], bad[1].bias.data[1] = 1e38, 0.0, -1.0
    with pytest.raises(ValueError, match="0: channel 1: expected a sign that turns at most once"):
        pack(bad)
    linear, image = pack(BinaryLinear(70, 5)), pack(BinaryConv2d(6, 5, 3))
    with pytest.raises(ValueError, match="x: expected last dimension 70"):
        linear(torch.randn(2, 71))
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, 6, length, length\), with or without the batch"):
        image(torch.randn(2, 5, 8, 8))
    with pytest.raises(TypeError, match="x: expected a float16"):
        linear(torch.ones(2, 70, dtype=torch.int32))
    with pytest.raises(ValueError, match="words"):
        linear(torch.ones(2, 3, dtype=torch.int64))

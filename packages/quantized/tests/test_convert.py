"""A float model becomes a binary one: what is replaced, what is kept, what is refused."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phyla.quantized import ApproxSign, Binarizer, BinaryConv1d, BinaryConv2d, BinaryLinear, ReCU, SignSTE, binarize_model

convert = partial(binarize_model, weight_binarizer=SignSTE, input_binarizer=ApproxSign)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 12, (3, 2), 2, (1, 0), groups=2, bias=False), nn.ReLU()),
        nn.Flatten(2),
        nn.Conv1d(12, 4, 3, padding="same"),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.Linear(6, 2),
    )


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = network()
    made(torch.randn(2, 3, 9, 9))
    return made


def test_inner_layers_become_binary_and_keep_their_weights(model: nn.Sequential) -> None:
    model[2][0].weight.requires_grad_(False)
    model.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    binary = convert(model, padding_value=1, scale="learned")
    assert [type(binary.get_submodule(n)) for n in ("0", "2.0", "4", "6", "7")] == [
        nn.Conv2d,
        BinaryConv2d,
        BinaryConv1d,
        BinaryLinear,
        nn.Linear,
    ]
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), "the model is left as it is"
        assert torch.equal(binary.state_dict()[name], value)
    layer: Any = binary.get_submodule("2.0")
    assert not layer.training
    assert not layer.weight.requires_grad
    assert (layer.stride, layer.padding, layer.groups, layer.bias) == ((2, 2), (1, 0), 2, None)
    assert torch.equal(layer.scale, model[2][0].weight.abs().mean((1, 2, 3)))
    assert binary.get_submodule("4").padding == (1,)
    assert binary(torch.randn(2, 3, 9, 9)).shape == (2, 2)
    assert layer.weight_binarizer is not binary.get_submodule("4").weight_binarizer


def test_skip_names_layers_or_whole_branches(model: nn.Sequential) -> None:
    binary = convert(model, skip=["2", "7"], scale="none")
    kinds = {n: type(m) for n, m in binary.named_modules()}
    assert kinds["0"] is BinaryConv2d
    assert kinds["2.0"] is nn.Conv2d
    assert kinds["7"] is nn.Linear
    assert isinstance(convert(nn.Linear(3, 2), skip=()), BinaryLinear)
    assert isinstance(convert(nn.Linear(3, 2)), nn.Linear)


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(4, 4)
    binary = convert(nn.Sequential(shared, nn.Sequential(shared), shared), skip=())
    assert binary[0] is binary[1][0] is binary[2]
    assert isinstance(binary[0], BinaryLinear)


def test_dtype_and_training_follow() -> None:
    binary = convert(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double(), input_binarizer=nn.Identity)
    assert binary[1].scale.dtype == torch.float64
    assert isinstance(binary[1].input_binarizer, nn.Identity)
    binary(torch.randn(2, 4).double()).sum().backward()
    assert binary[1].weight.grad is not None


def test_only_plain_layers_count() -> None:
    """The projection of attention is read by its function, not called: a binary layer there would do nothing."""
    attention = convert(nn.MultiheadAttention(8, 2), skip=())
    assert not any(isinstance(m, BinaryLinear) for m in attention.modules())


def test_refusals() -> None:
    for model, options, message in (
        (nn.Linear(2, 2), {"skip": ["head"]}, "skip"),
        (nn.Linear(2, 2), {"skip": "first"}, "skip"),
        (nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")), {"skip": ()}, "padding_mode"),
        (nn.Sequential(nn.Conv1d(2, 2, 4, padding="same")), {"skip": ()}, "same"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(model, **options)  # type: ignore[arg-type]


def test_a_converted_model_trains() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x[:, :8].sum(1) > x[:, 8:].sum(1)).long()
    float_model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))

    def build() -> Binarizer:
        return ReCU(0.9)

    model = binarize_model(float_model, weight_binarizer=build, input_binarizer=ApproxSign)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float((model(x).argmax(1) == y).float().mean()) > 0.95

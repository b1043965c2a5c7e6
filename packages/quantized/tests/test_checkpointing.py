"""One-bit checkpointing: the same gradients to the last bit, and an input that is kept at 1/32 of its size."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from phyla.quantized import BinaryConv1d, BinaryConv2d, BinaryLinear, SignSTE
from phyla.quantized.checkpointing import _Bits

LAYERS: dict[str, tuple[Callable[[], BinaryLinear | BinaryConv1d | BinaryConv2d], tuple[int, ...]]] = {
    "linear": (lambda: BinaryLinear(70, 5, True), (9, 70)),
    "linear, sequences": (lambda: BinaryLinear(70, 5), (3, 5, 70)),
    "linear, one": (lambda: BinaryLinear(70, 5), (70,)),
    "conv1d": (lambda: BinaryConv1d(6, 4, 3, padding=1, padding_value=-1), (3, 6, 21)),
    "conv2d": (lambda: BinaryConv2d(6, 4, 3, 2, 1, groups=2), (3, 6, 11, 9)),
    "conv2d, ones": (lambda: BinaryConv2d(6, 4, 3, padding=2, padding_value=1, input_binarizer=SignSTE()), (3, 6, 11, 9)),
    "empty": (lambda: BinaryConv2d(6, 4, 3), (0, 6, 11, 9)),
}


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    weights = torch.linspace(0.1, 3, max(y.numel(), 1))[: y.numel()].view_as(y)
    return [y, *torch.autograd.grad((y.float().sin() * weights).sum(), [leaf, *layer.parameters()])]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "autocast", "channels last", "strided"])
def test_gradients_are_those_of_the_plain_layer(name: str, form: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain, x = make(), torch.randn(shape)
    if form == "bfloat16":
        plain, x = plain.bfloat16(), x.bfloat16()
    if form == "channels last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    if form == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    saving = copy.deepcopy(plain)
    saving.save_bits = True
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        results = [gradients(layer, x) for layer in (plain, saving)]
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_second_derivatives_are_those_of_the_plain_layer() -> None:
    torch.manual_seed(0)
    plain, x = BinaryConv2d(4, 5, 3), torch.randn(2, 4, 6, 6)
    saving = copy.deepcopy(plain)
    saving.save_bits = True
    results = []
    for layer in (plain, saving):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf).sin().sum(), layer.weight, create_graph=True)
        results.append(torch.autograd.grad(first.sin().sum(), [leaf, layer.weight]))
    for mine, theirs in zip(*results, strict=True):
        assert mine.any()
        assert torch.equal(mine, theirs)


def kept_bytes(y: Tensor) -> int:
    """Bytes of the distinct storages that the graph of ``y`` holds for its backward pass."""
    storages: dict[int, int] = {}
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        fields = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
        flat = [one for field in fields for one in (field if isinstance(field, tuple) else (field,))]
        for stored in (one.data for one in flat):
            storage = (stored.words if isinstance(stored, _Bits) else stored).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        nodes.extend(parent for parent, _ in node.next_functions)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("name", "elements"),
    [("linear", 9 * 70), ("linear, sequences", 15 * 70), ("conv1d", 3 * 6 * 23), ("conv2d", 3 * 6 * 99), ("conv2d, ones", 3 * 6 * 15 * 13)],
)
def test_the_binary_input_is_kept_as_bits(name: str, elements: int) -> None:
    """The only difference in what backward keeps: 4 bytes an element become one bit."""
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    sizes = {}
    for save_bits in (False, True):
        layer.save_bits = save_bits
        sizes[save_bits] = kept_bytes(layer(x.clone().requires_grad_()))
    assert sizes[False] - sizes[True] == 4 * elements - 8 * -(-elements // 64)


@pytest.mark.parametrize("name", ["linear", "linear, sequences", "conv1d", "conv2d", "conv2d, ones"])
def test_nothing_holds_the_binary_input(name: str) -> None:
    """Once the layer is through, the real tensor of -1 and +1 is free."""
    make, shape = LAYERS[name]
    layer, alive = make(), []
    layer.input_binarizer.register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(output)))
    for save_bits in (False, True):
        layer.save_bits, layer.padding_value = save_bits, 0
        y = layer(torch.randn(shape, requires_grad=True))
        assert (alive[-1]() is None) == save_bits
        del y


def test_a_layer_of_clipped_signs_keeps_two_bits_of_an_input() -> None:
    layer = BinaryConv2d(8, 1, 3, input_binarizer=SignSTE(), weight_binarizer=SignSTE(), save_bits=True, scale="none")
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    weights = 72 * 4 + 2 * 8 * 2  # the binary weight, and the mask of its window
    assert kept_bytes(layer(x)) <= 2 * x.numel() // 8 + weights

"""The pass behind a packed convolution rounds as the float graph does, on every path."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.quantized import functional as QF
from phyla.quantized.functional.residual import residual_op, stream_op
from phyla.quantized.packed_block import _line


def operands(channels: int, seed: int = 0, shape: tuple[int, ...] = (2, 5, 4)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(-600, 600, (*shape, channels), dtype=torch.int32, generator=generator)
    scale, gain, shift = torch.randn(3, channels, generator=generator) / torch.tensor([[30.0], [5.0], [1.0]])
    return sums, scale, gain, shift, torch.randn(*shape, channels, generator=generator)


def graph(sums: Tensor, scale: Tensor, bn: nn.BatchNorm2d, shortcut: Tensor) -> Tensor:
    """The modules one after the other, on images."""
    x = sums.permute(0, 3, 1, 2).contiguous().float() * scale.view(-1, 1, 1)
    with torch.no_grad():
        y = F.hardtanh(bn(x) + shortcut.permute(0, 3, 1, 2).contiguous())
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("channels", [1, 7, 8, 31, 32, 33, 63, 64, 65, 100, 128, 200])
def test_equal_to_the_modules(channels: int) -> None:
    for seed in range(5):
        sums, scale, weight, bias, shortcut = operands(channels, seed)
        bn = nn.BatchNorm2d(channels).eval()
        mean, var = 3 * torch.randn(channels), 10 * torch.rand(channels)
        bn.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}, strict=False)
        y, words = QF.residual(sums, scale, *_line(bn), shortcut, low=-1.0, high=1.0)
        assert torch.equal(y, graph(sums, scale, bn, shortcut))
        assert torch.equal(words, QF.pack(y))


@pytest.mark.parametrize("around", [True, False])
def test_native_and_composite_agree(around: bool) -> None:
    for channels in (3, 32, 70):
        sums, scale, gain, shift, shortcut = operands(channels)
        gain[0], shift[0] = 0.0, -0.0
        scale[1] = float("nan")
        shift[2] = float("inf")
        args = (sums, scale, gain, shift, shortcut if around else None, -1.0, 1.0)
        for ours, composite in zip(residual_op(*args), residual_op.composite(*args), strict=True):
            assert torch.equal(
                ours.nan_to_num(9.0) if ours.is_floating_point() else ours,
                composite.nan_to_num(9.0) if ours.is_floating_point() else composite,
            )


def test_without_bounds_and_shortcut() -> None:
    sums, scale, gain, shift, _ = operands(5)
    y, _ = QF.residual(sums, scale, gain, shift)
    assert torch.allclose(y.double(), sums.double() * scale.double() * gain.double() + shift.double(), rtol=1e-5, atol=1e-5)
    y, _ = QF.residual(sums, scale, gain, shift, low=-0.25, high=0.5)
    assert (y.min(), y.max()) == (-0.25, 0.5)


def test_strides_empty_images_and_threads() -> None:
    sums, scale, gain, shift, shortcut = operands(40, shape=(3, 40, 33))
    wanted = QF.residual(sums, scale, gain, shift, shortcut, low=-1.0, high=1.0)
    strided = QF.residual(*(t.repeat_interleave(2, -1)[..., ::2] for t in (sums, scale, gain, shift, shortcut)), low=-1.0, high=1.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = QF.residual(sums, scale, gain, shift, shortcut, low=-1.0, high=1.0)
    finally:
        torch.set_num_threads(before)
    for other in (strided, threaded):
        assert all(torch.equal(a, b) for a, b in zip(wanted, other, strict=True))
    y, words = QF.residual(sums[:0], scale, gain, shift, shortcut[:0])
    assert (y.shape, words.shape) == ((0, 40, 33, 40), (0, 40, 33, 1))


def test_the_op_is_registered_soundly() -> None:
    sums, scale, gain, shift, shortcut = operands(70)
    for args in ((sums, scale, gain, shift, shortcut, -1.0, 1.0), (sums, scale, gain, shift, None, -1.0, 1.0)):
        torch.library.opcheck(residual_op.op, args)


@pytest.mark.parametrize("channels", [1, 15, 16, 33, 64, 130])
def test_a_stream_begins_with_the_image_turned_and_its_signs(channels: int) -> None:
    torch.manual_seed(0)
    for shape in ((2, channels, 5, 7), (1, channels, 16, 16), (3, channels, 1, 1), (0, channels, 4, 4), (2, channels, 0, 4)):
        x = torch.randn(shape)
        for image in (x, x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 0)[::2]):
            y, words = stream_op(image)
            assert torch.equal(y, x.permute(0, 2, 3, 1))
            assert y.is_contiguous()
            assert torch.equal(words, QF.pack(x.permute(0, 2, 3, 1)))
    torch.library.opcheck(stream_op.op, (torch.randn(2, channels, 5, 7),))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"sums": torch.zeros(2, 5, 4, dtype=torch.int32)}, ValueError, "sums: expected shape (*, *, *, *)"),
        ({"sums": torch.zeros(2, 5, 4, 6)}, TypeError, "sums: expected int32, got float32"),
        ({"scale": torch.ones(5)}, ValueError, "scale: expected shape (6,)"),
        ({"gain": torch.ones(6).double()}, TypeError, "gain: expected float32, got float64"),
        ({"shift": 1.0}, TypeError, "shift: expected a Tensor"),
        ({"shortcut": torch.ones(2, 5, 4, 1)}, ValueError, "shortcut: expected shape (2, 5, 4, 6)"),
        ({"low": 2.0, "high": 1.0}, ValueError, "low: expected a number of at most high=1.0, got 2.0"),
    ],
)
def test_messages(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = dict(zip(("sums", "scale", "gain", "shift", "shortcut"), operands(6), strict=True)) | change
    with pytest.raises(error) as caught:
        QF.residual(**given)
    assert text in str(caught.value)

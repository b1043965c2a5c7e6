import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed_oracles import answers, matmul_oracle, random_signs, words_oracle
from test_packed_conv import GEOMETRIES, case
from torch import Tensor, nn

from phyla.quantized.functional import pack, packed_conv2d, packed_conv2d_residual, packed_conv2d_threshold, packed_matmul_threshold
from phyla.quantized.functional.epilogues import _conv2d_residual_op as residual_op
from phyla.quantized.functional.packed_conv import check_conv
from phyla.quantized.packed_block import _line

INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1


def thresholds(channels: int, spread: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Thresholds within and far outside of the range of the sums, and flips."""
    generator = torch.Generator().manual_seed(seed)
    threshold = torch.randint(-spread, spread + 1, (channels,), generator=generator, dtype=torch.int32)
    threshold[::7], threshold[3::11] = INT_MIN, INT_MAX
    return threshold, torch.randint(0, 2, (channels,), generator=generator).bool()


def positive(sums: Tensor, threshold: Tensor, flip: Tensor) -> Tensor:
    return words_oracle((((sums >= threshold) != flip).to(torch.int8) * 2 - 1).contiguous())


@pytest.mark.parametrize("length", [1, 64, 100, 1152])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 130), (3, 16), (21, 64), (9, 65), (6, 8)])
def test_thresholded_products(rows: int, cols: int, length: int) -> None:
    a, b = random_signs(2, rows, length), random_signs(cols, length, seed=1)
    threshold, flip = thresholds(cols, max(1, round(length**0.5)))
    words = packed_matmul_threshold(words_oracle(a), words_oracle(b), length, threshold, flip)
    assert torch.equal(words, positive(matmul_oracle(a, b), threshold, flip))


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("index", range(len(GEOMETRIES)))
def test_thresholded_convolutions(index: int, padding_value: int) -> None:
    x, weight, options, sums = case(index, padding_value)
    threshold, flip = thresholds(len(weight), 10)
    assert torch.equal(packed_conv2d_threshold(x, weight, threshold, flip, **options), positive(sums, threshold, flip))


@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("index", range(len(GEOMETRIES)))
def test_residual_convolutions(index: int, padding_value: int, with_shortcut: bool) -> None:
    x, weight, options, sums = case(index, padding_value)
    generator = torch.Generator().manual_seed(index)
    scale, shift = torch.randn(len(weight), generator=generator) * 0.05, torch.randn(len(weight), generator=generator)
    shortcut = torch.randn(sums.shape, generator=generator) if with_shortcut else None
    y, words = packed_conv2d_residual(x, weight, scale, shift, shortcut, low=-1.0, high=1.0, **options)
    exact = sums.double() * scale.double() + shift.double() + (0 if shortcut is None else shortcut.double())
    assert y.dtype == torch.float32
    assert float((y.double() - exact.clamp(-1, 1)).abs().max()) < 2e-6
    assert torch.equal(words, pack(y))
    expected = sums.float() * scale + shift + (0 if shortcut is None else shortcut)
    assert torch.equal(y, expected.clamp(-1, 1)), "the operations are those of torch, each rounded once"
    free, _ = packed_conv2d_residual(x, weight, scale, shift, shortcut, **options)
    assert torch.equal(free, expected)


@pytest.mark.parametrize("channels", [1, 7, 8, 31, 32, 33, 63, 64, 65, 100, 128, 200])
def test_residual_convolutions_round_as_the_modules_do(channels: int) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, weight = random_signs(2, 5, 4, 40, seed=seed), random_signs(channels, 3, 3, 40, seed=seed + 1)
        x, weight = words_oracle(x), words_oracle(weight.flatten(1))
        options: dict[str, Any] = {"channels": 40, "kernel_size": 3, "padding": 1}
        sums = packed_conv2d(x, weight, **options)
        scale, bias, slope, mean, variance = torch.randn(5, channels, generator=generator)
        shortcut = torch.randn(sums.shape, generator=generator)
        bn = nn.BatchNorm2d(channels).eval()
        bn.load_state_dict({"weight": slope / 5, "bias": bias, "running_mean": 3 * mean, "running_var": 10 * variance**2}, strict=False)
        gain, shift = _line(bn)
        y, words = packed_conv2d_residual(x, weight, scale, shift, shortcut, gain=gain, low=-1.0, high=1.0, **options)
        with torch.no_grad():  # the modules one after the other, on images
            images = bn(sums.permute(0, 3, 1, 2).contiguous().float() * scale.view(-1, 1, 1))
            wanted = F.hardtanh(images + shortcut.permute(0, 3, 1, 2).contiguous())
        assert torch.equal(y, wanted.permute(0, 2, 3, 1))
        assert torch.equal(words, pack(y))


@pytest.mark.parametrize("with_shortcut", [True, False])
def test_residual_native_and_composite_agree(with_shortcut: bool) -> None:
    for index, (low, high) in enumerate([(-1.0, 1.0), (-math.inf, math.inf), (-0.25, 0.5)]):
        x, weight, options, sums = case(index, 0)
        generator = torch.Generator().manual_seed(index)
        scale, gain, shift = torch.randn(3, len(weight), generator=generator)
        shortcut = torch.randn(sums.shape, generator=generator) if with_shortcut else None
        gain[0], shift[0], scale[1], shift[2] = 0.0, -0.0, math.nan, math.inf
        args = (x, weight, scale, gain, shift, shortcut, low, high, *check_conv(x, weight, **options)[2])
        (y, words), (other, same) = residual_op(*args), residual_op.composite(*args)
        assert torch.equal(y.isnan(), other.isnan())
        assert torch.equal(y.nan_to_num(9.0), other.nan_to_num(9.0))
        assert torch.equal(words, same)


def test_residuals_do_not_depend_on_threads() -> None:
    x, weight = words_oracle(random_signs(3, 40, 33, 64)), words_oracle(random_signs(70, 576, seed=1))
    scale, gain, shift = torch.randn(3, 70)
    shortcut, before, results = torch.randn(3, 40, 33, 70), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            options: dict[str, Any] = {"channels": 64, "kernel_size": 3, "padding": 1}
            results.append(packed_conv2d_residual(x, weight, scale, shift, shortcut, gain=gain, low=-1.0, high=1.0, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_residuals_keep_nan_and_infinities() -> None:
    x, weight, options, sums = case(0, 0)
    shortcut = torch.zeros(sums.shape)
    special = torch.tensor([float("nan"), math.inf, -math.inf, 0.0, -0.0])
    shortcut.view(-1)[: len(special)] = special
    for low, high in ((-1.0, 1.0), (-math.inf, math.inf), (0.0, math.inf)):
        y, words = packed_conv2d_residual(x, weight, torch.zeros(8), torch.full((8,), -0.0), shortcut, low=low, high=high, **options)
        expected = (sums.float() * 0.0 - 0.0 + shortcut).clamp(low, high)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert torch.equal(words, pack(y))


def test_layouts_and_empty_batches() -> None:
    x, weight, options, sums = case(0, 0)
    threshold, flip = thresholds(8, 10)
    scale, shift, shortcut = torch.rand(16)[::2], torch.rand(16)[::2], torch.randn(sums.permute(3, 0, 1, 2).shape).permute(1, 2, 3, 0)
    dense = scale.contiguous(), shift.contiguous(), shortcut.contiguous()
    y, words = packed_conv2d_residual(x, weight, scale, shift, shortcut, gain=shift, **options)
    again, same = packed_conv2d_residual(x, weight, *dense, gain=dense[1], **options)
    assert torch.equal(y, again)
    assert torch.equal(words, same)
    every_other = torch.stack([threshold, threshold], 1)[:, 0], torch.stack([flip, flip], 1)[:, 0]
    assert torch.equal(packed_conv2d_threshold(x, weight, *every_other, **options), positive(sums, threshold, flip))
    assert packed_conv2d_threshold(x[:0], weight, threshold, flip, **options).shape == (0, 7, 6, 1)
    y, words = packed_conv2d_residual(x[:0], weight, scale, shift, shortcut[:0], **options)
    assert (y.shape, words.shape) == ((0, 7, 6, 8), (0, 7, 6, 1))
    empty = packed_matmul_threshold(x.flatten(0, 2)[:0], x.flatten(0, 2)[:5], 16, threshold[:5], flip[:5])
    assert empty.shape == (0, 1)


def test_errors_name_what_is_wrong() -> None:
    x, weight, options, sums = case(0, 0)
    threshold, flip = thresholds(8, 10)
    scale = torch.ones(8)
    shortcut = torch.zeros(sums.shape)
    for call, kind, message in [
        (lambda: packed_conv2d_threshold(x, weight, threshold[:7], flip, **options), ValueError, r"threshold: expected shape \(8,\)"),
        (lambda: packed_conv2d_threshold(x, weight, threshold.long(), flip, **options), TypeError, "threshold: expected int32, got int64"),
        (lambda: packed_conv2d_threshold(x, weight, threshold, flip.int(), **options), TypeError, "flip: expected bool"),
        (lambda: packed_conv2d_threshold(x, weight, threshold, flip.to("meta"), **options), ValueError, "flip: expected a tensor on cpu"),
        (lambda: packed_matmul_threshold(x[0, 0], weight[:, :1], 16, threshold, None), TypeError, "flip: expected a Tensor"),
        (lambda: packed_conv2d_residual(x, weight, scale.double(), scale, **options), TypeError, "scale: expected float32, got float64"),
        (lambda: packed_conv2d_residual(x, weight, None, scale, **options), TypeError, "scale: expected a Tensor"),
        (lambda: packed_conv2d_residual(x, weight, scale, scale, gain=scale[:3], **options), ValueError, r"gain: expected shape \(8,\)"),
        (lambda: packed_conv2d_residual(x, weight, scale, scale, gain=scale.double(), **options), TypeError, "gain: expected float32"),
        (lambda: packed_conv2d_residual(x, weight, scale, scale[:3], **options), ValueError, r"shift: expected shape \(8,\)"),
        (lambda: packed_conv2d_residual(x, weight, scale, scale, shortcut[:1], **options), ValueError, "shortcut: expected shape"),
        (lambda: packed_conv2d_residual(x, weight, scale, scale, shortcut.half(), **options), TypeError, "shortcut: expected float32"),
        (lambda: packed_conv2d_residual(x, weight, scale, scale, low=2.0, high=1.0, **options), ValueError, "low: expected a number of at"),
        (lambda: packed_conv2d_residual(x, weight, scale, scale, low=math.nan, **options), ValueError, "low"),
    ]:
        with pytest.raises(kind, match=message):
            call()


def test_any_argument_is_answered() -> None:
    x, weight, options, sums = case(0, 0)
    threshold, flip = thresholds(8, 10)
    answers(lambda *a: packed_conv2d_threshold(*a, **options), x, weight, threshold, flip)
    answers(lambda a, b, t, f: packed_matmul_threshold(a, b, 16, t, f), x[0], weight[:, :1], threshold, flip)
    answers(lambda *a: packed_conv2d_residual(*a, **options), x, weight, torch.ones(8), torch.ones(8), torch.zeros(sums.shape))
    answers(lambda g: packed_conv2d_residual(x, weight, torch.ones(8), torch.ones(8), gain=g, **options), torch.ones(8))


def test_ops_compile_and_export() -> None:
    from phyla.quantized.functional import epilogues

    x, weight, options, sums = case(0, 0)
    threshold, flip = thresholds(8, 10)
    scale, shift, shortcut = torch.rand(8), torch.rand(8), torch.randn(sums.shape)
    rows = words_oracle(random_signs(5, 70))

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, shortcut: Tensor) -> tuple[Tensor, ...]:
            words = packed_conv2d_threshold(x, weight, threshold, flip, **options)
            y, signs = packed_conv2d_residual(x, weight, scale, shift, shortcut, low=-1.0, high=1.0, **options)
            return words, y, signs, packed_matmul_threshold(signs[:, 0], weight[:, :1], 8, threshold, flip)

    geometry = check_conv(x, weight, **options)[2]
    torch.library.opcheck(epilogues._matmul_threshold_op.op, (rows, rows, 70, threshold[:5], flip[:5]))
    torch.library.opcheck(epilogues._conv2d_threshold_op.op, (x, weight, threshold, flip, *geometry))
    torch.library.opcheck(residual_op.op, (x, weight, scale, shift, shift, shortcut, -1.0, 1.0, *geometry))
    torch.library.opcheck(residual_op.op, (x, weight, scale, shift, shift, None, -1.0, 1.0, *geometry))
    torch._dynamo.reset()
    compiled = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Net(), (x, shortcut), dynamic_shapes=({0: batch}, {0: batch})).module()
    larger = torch.cat([x, x, x]), torch.cat([shortcut] * 3)
    for other, inputs in ((compiled, (x, shortcut)), (exported, (x, shortcut)), (exported, larger)):
        for a, b in zip(other(*inputs), Net()(*inputs), strict=True):
            assert torch.equal(a, b)

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_oracles import answers, conv_oracle, random_signs, words_oracle
from torch import Tensor

from phyla.quantized.functional import pack, packed_conv2d, packed_max_pool2d, unpack
from phyla.shared.testing import load_golden

GOLDEN = Path(__file__).parent / "golden"

# (N, H, W, C), O, kernel, stride, padding, dilation, groups
GEOMETRIES = [
    ((2, 7, 6, 16), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 9, 8, 64), 70, (3, 3), (2, 1), (1, 0), (1, 1), 1),
    ((2, 8, 9, 65), 5, (3, 2), (1, 2), (0, 2), (2, 1), 1),
    ((1, 12, 11, 128), 33, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    ((2, 5, 5, 96), 24, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    ((1, 6, 7, 130), 20, (3, 3), (2, 2), (1, 1), (1, 1), 2),
    ((2, 6, 6, 12), 12, (3, 3), (1, 1), (1, 1), (1, 1), 12),
    ((1, 6, 6, 20), 40, (5, 5), (1, 1), (2, 2), (1, 1), 4),
    ((3, 1, 17, 7), 9, (1, 5), (1, 2), (0, 3), (1, 2), 1),
    ((2, 10, 10, 256), 130, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((2, 9, 9, 100), 17, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((1, 3, 4, 64), 64, (1, 1), (1, 1), (1, 2), (1, 1), 1),
    ((1, 4, 4, 1), 1, (4, 4), (1, 1), (4, 4), (1, 1), 1),
    ((1, 2, 3, 192), 66, (2, 3), (3, 3), (3, 5), (1, 3), 1),
    ((1, 40, 41, 3), 10, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    ((1, 5, 6, 128), 6, (3, 3), (1, 1), (1, 1), (1, 2), 2),
    ((2, 4, 5, 192), 201, (3, 3), (1, 1), (1, 1), (1, 1), 3),
]


def case(index: int, padding_value: int) -> tuple[Tensor, Tensor, dict[str, Any], Tensor]:
    """Words of the images and of the filters, the options, the integers that come out."""
    sizes, out_channels, kernel, stride, padding, dilation, groups = GEOMETRIES[index]
    x = random_signs(*sizes, seed=index)
    weight = random_signs(out_channels, *kernel, sizes[3] // groups, seed=index + 1)
    options = {
        "channels": sizes[3],
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_value": padding_value,
    }
    expected = conv_oracle(x, weight, stride, padding, dilation, groups, padding_value)
    return words_oracle(x), words_oracle(weight.flatten(1)), options, expected


@pytest.mark.parametrize("name", [f"conv_{i}" for i in range(5)])
def test_golden_convolutions(name: str) -> None:
    golden = load_golden(GOLDEN / f"{name}.npz")
    options = {k: int(golden[k]) for k in ("channels", "stride", "padding", "dilation", "groups", "padding_value")}
    kernel_size = tuple(golden["kernel_size"].tolist())
    out = packed_conv2d(golden["x_words"], golden["w_words"], kernel_size=kernel_size, **options)
    assert torch.equal(out, golden["output"])


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("index", range(len(GEOMETRIES)))
def test_every_geometry_is_exact(index: int, padding_value: int) -> None:
    x, weight, options, expected = case(index, padding_value)
    assert torch.equal(packed_conv2d(x, weight, **options), expected)


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("index", range(len(GEOMETRIES)))
def test_the_composite_is_exact_and_works_in_blocks(index: int, padding_value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from phyla.quantized.functional import bits, packed_conv

    x, weight, options, expected = case(index, padding_value)
    monkeypatch.setattr(bits, "BLOCK", 1000)
    monkeypatch.setattr(packed_conv, "BLOCK", 1000)
    geometry = packed_conv.check_conv(x, weight, **options)[2]
    assert torch.equal(packed_conv._conv2d(x, weight, *geometry), expected)


def test_layouts_batches_and_threads() -> None:
    x, weight, options, expected = case(0, 0)
    moved = x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    assert torch.equal(packed_conv2d(moved, weight, **options), expected)
    assert packed_conv2d(x[:0], weight, **options).shape == (0, *expected.shape[1:])
    assert packed_conv2d(x, weight[:0], **options).shape == (*expected.shape[:-1], 0)
    many = x[:1].expand(64, *x.shape[1:])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(packed_conv2d(many, weight, **options), expected[:1].expand(64, *expected.shape[1:]))
    finally:
        torch.set_num_threads(before)


def test_an_int_stands_for_both_sides() -> None:
    x, weight, options, expected = case(0, 0)
    short = options | {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
    assert torch.equal(packed_conv2d(x, weight, **short), expected)


def test_errors_name_what_is_wrong() -> None:
    x, weight, options, _ = case(1, 0)
    for changes, kind, message in [
        ({"channels": 65}, ValueError, r"x: expected 2 words for 65 channels, got shape \(1, 9, 8, 1\)"),
        ({"channels": 0}, ValueError, "channels"),
        ({"kernel_size": (3, 4)}, ValueError, "weight: expected 12 words for 768 elements"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size: expected an int or two"),
        ({"kernel_size": "a"}, TypeError, "kernel_size"),
        ({"stride": 0}, ValueError, "stride"),
        ({"stride": 1.0}, TypeError, "stride"),
        ({"padding": -1}, ValueError, "padding"),
        ({"dilation": (1, 0)}, ValueError, "dilation"),
        ({"dilation": 9}, ValueError, "x: expected an image that the kernel fits in"),
        ({"groups": 3}, ValueError, "groups must divide channels"),
        ({"padding_value": 2}, ValueError, "padding_value"),
        ({"padding_value": True}, ValueError, "padding_value"),
        ({"x": x[0]}, ValueError, "x: expected 4 dimensions"),
        ({"x": x.int()}, TypeError, "x: expected int64 words"),
        ({"weight": weight.to("meta")}, ValueError, "weight: expected a tensor on cpu"),
        ({"weight": weight[:33, :5], "groups": 2}, ValueError, "weight: expected a number of output channels that groups=2 divides"),
    ]:
        with pytest.raises(kind, match=message):
            packed_conv2d(**{"x": x, "weight": weight, **options, **changes})


def test_any_argument_is_answered() -> None:
    x, weight, options, _ = case(0, 0)
    answers(lambda a, b: packed_conv2d(a, b, **options), x, weight)
    answers(lambda a, f: packed_max_pool2d(a, 2, flip=f), x, torch.zeros(16, dtype=torch.bool))


@pytest.mark.parametrize(("kernel", "stride"), [(2, None), ((3, 2), (1, 2)), (1, 2), ((2, 2), 3)])
@pytest.mark.parametrize("channels", [5, 64, 130])
def test_pooling_bits_is_thresholding_the_pooled_sums(channels: int, kernel, stride) -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-40, 41, (2, 7, 8, channels), generator=generator)
    threshold = torch.randint(-30, 31, (channels,), generator=generator)
    flip = torch.randint(0, 2, (channels,), generator=generator).bool()
    positive = (sums >= threshold) != flip
    pooled = torch.nn.functional.max_pool2d(sums.permute(0, 3, 1, 2).float(), kernel, stride).permute(0, 2, 3, 1)
    expected = (pooled >= threshold) != flip
    words = packed_max_pool2d(pack(positive.float() - 0.5), kernel, stride, flip=flip)
    assert torch.equal(words, pack(expected.float() - 0.5))
    plain = packed_max_pool2d(pack((sums >= threshold).float() - 0.5), kernel, stride)
    assert torch.equal(unpack(plain, channels) > 0, pooled >= threshold)


def test_pooling_layouts_and_errors() -> None:
    x = words_oracle(random_signs(2, 6, 7, 70))
    flip = torch.ones(70, dtype=torch.bool)
    expected = packed_max_pool2d(x, 2, flip=flip)
    assert torch.equal(packed_max_pool2d(x.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1), 2, flip=flip), expected)
    assert packed_max_pool2d(x[:0], 2).shape == (0, 3, 3, 2)
    for call, kind, message in [
        (lambda: packed_max_pool2d(x, 8), ValueError, "x: expected an image of at least 8 x 8"),
        (lambda: packed_max_pool2d(x, 0), ValueError, "kernel_size"),
        (lambda: packed_max_pool2d(x, 2, 0), ValueError, "stride"),
        (lambda: packed_max_pool2d(x.float(), 2), TypeError, "x: expected int64 words"),
        (lambda: packed_max_pool2d(x[0], 2), ValueError, "x: expected 4 dimensions"),
        (lambda: packed_max_pool2d(x, 2, flip=flip[:64]), ValueError, r"flip: expected shape \(C,\) with a C that 2 words hold"),
        (lambda: packed_max_pool2d(x, 2, flip=flip.int()), TypeError, "flip: expected a bool Tensor"),
    ]:
        with pytest.raises(kind, match=message):
            call()


def test_ops_compile_and_export() -> None:
    from phyla.quantized.functional import packed_conv

    x, weight, options, expected = case(4, 0)
    flip = torch.zeros(24, dtype=torch.bool)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            sums = packed_conv2d(x, weight, **options)
            return sums, packed_max_pool2d(pack(sums.float()), 2, flip=flip)

    geometry = packed_conv.check_conv(x, weight, **options)[2]
    torch.library.opcheck(packed_conv._conv2d_op.op, (x, weight, *geometry))
    torch.library.opcheck(packed_conv._max_pool2d_op.op, (x, [2, 2], [1, 1], None))
    torch._dynamo.reset()
    compiled = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Net(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    assert torch.equal(Net()(x)[0], expected)
    for other, images in ((compiled, x), (exported, x), (exported, torch.cat([x, x, x]))):
        for a, b in zip(other(images), Net()(images), strict=True):
            assert torch.equal(a, b)


def test_a_one_dimensional_convolution_is_one_row() -> None:
    x, weight = random_signs(2, 1, 30, 40), random_signs(6, 1, 5, 40, seed=1)
    out = packed_conv2d(words_oracle(x), words_oracle(weight.flatten(1)), channels=40, kernel_size=(1, 5), padding=(0, 2))
    signs = x.squeeze(1).permute(0, 2, 1).double(), weight.squeeze(1).permute(0, 2, 1).double()
    expected = torch.nn.functional.conv1d(*signs, padding=2).permute(0, 2, 1)
    assert torch.equal(out.squeeze(1).double(), expected)
    assert math.prod(out.shape) == 2 * 30 * 6

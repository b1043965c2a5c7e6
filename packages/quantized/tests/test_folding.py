"""Thresholds reproduce the float graph on every integer that a sum can be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phyla.quantized import FoldedThreshold, SignSTE, fold_threshold
from phyla.quantized.folding import fold_modules
from phyla.shared.testing import load_golden

GOLDEN = Path(__file__).parent / "golden"
TINY = 1e-42  # a denormal number of float32


def positive(folded: FoldedThreshold, sums: Tensor) -> Tensor:
    """(S, C)"""
    return (sums[:, None] >= folded.threshold) != folded.flip


def batch_norm(
    kind: type[nn.BatchNorm1d | nn.BatchNorm2d], weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-5
) -> nn.Module:
    bn = kind(len(weight), eps=eps, dtype=weight.dtype).eval()
    bn.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(1)})
    return bn


def graph(scale: Tensor, bias: Tensor | None, bn: nn.Module, sums: Tensor) -> Tensor:
    """Signs (S, C) of the float graph, computed as the network does: on images, or on samples."""
    images = isinstance(bn, nn.BatchNorm2d)
    x = sums.to(scale.dtype)[:, None].expand(-1, len(scale)).contiguous()
    if images:
        x = x.T.reshape(1, len(scale), -1, 1).contiguous()
    shape = (-1, 1, 1) if images else (-1,)
    x = x * scale.view(shape)
    if bias is not None:
        x = x + bias.view(shape)
    with torch.no_grad():
        y = SignSTE()(bn(x)) > 0
    return y[0, :, :, 0].T if images else y


def check(scale: Tensor, bias: Tensor | None, bn: nn.Module, length: int) -> FoldedThreshold:
    sums = torch.arange(-length, length + 1, dtype=torch.int32)
    folded = fold_threshold(scale, bias, bn, length=length)
    assert folded.threshold.dtype == torch.int32
    assert folded.flip.dtype == torch.bool
    assert folded.threshold.min() >= -length
    assert folded.threshold.max() <= length + 1
    wrong = positive(folded, sums) != graph(scale, bias, bn, sums)
    assert not wrong.any(), f"K = {length}: {int(wrong.sum())} signs are wrong, the first at {wrong.nonzero()[0].tolist()}"
    return folded


def test_the_golden_thresholds_hold_for_every_accumulator() -> None:
    g = load_golden(GOLDEN / "threshold_K27.npz")
    bn = nn.BatchNorm1d(12, eps=float(g["eps"])).eval()
    bn.load_state_dict(
        {name: g[f"bn_{name.removeprefix('running_')}"] for name in ("weight", "bias", "running_mean", "running_var")}, strict=False
    )
    folded = fold_threshold(g["scale"], g["bias"], bn, length=int(g["length"]))
    assert torch.equal(positive(folded, g["accumulators"]), g["positive"])
    assert folded.threshold[:2].tolist() == [-27, 28]
    assert folded.flip[:2].tolist() == [False, False]


def strange(channels: int, seed: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Statistics of which every kind occurs: ordinary, zero, negative, denormal, huge; means that make a sum hit zero exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*special: float) -> Tensor:
        values = torch.randn(channels, generator=generator, dtype=dtype)
        chosen = torch.randint(0, 2 * len(special), (channels,), generator=generator)
        return torch.where(chosen < len(special), torch.tensor(special, dtype=dtype)[chosen % len(special)], values)

    scale = draw(0.0, TINY, -TINY, 1.0, -0.25, 1e-20, 1e3)
    bias = draw(0.0, 1.0, TINY, -1e4)
    weight = draw(0.0, -0.0, 1.0, -1.0, TINY, -1e-30)
    shift = draw(0.0, -0.0, 1.0, TINY, -TINY, 1e6)
    tie = scale * torch.randint(-length, length + 1, (channels,), generator=generator) + bias
    mean = torch.where(torch.rand(channels, generator=generator) < 0.4, tie, draw(0.0, TINY, 100.0))
    var = draw(0.0, TINY, 1e-12, 1.0, 1e8).abs()
    return scale, bias, (weight, shift, mean, var)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 3, 9, 27, 64, 144, 577, 1152, 4608])
def test_folding_is_exact_for_every_sum(kind: type[nn.BatchNorm1d], length: int, dtype: torch.dtype) -> None:
    scale, bias, statistics = strange(400, length, length, dtype)
    bn = batch_norm(kind, *statistics)
    with_bias, without = check(scale, bias, bn, length), check(scale, None, bn, length)
    if length > 3:
        for folded in (with_bias, without):
            assert folded.flip.any(), "falling channels were drawn"
            assert (folded.threshold == -length).any(), "channels that are always positive were drawn"
            assert (folded.threshold == length + 1).any(), "channels that are never positive were drawn"


@given(
    length=st.integers(1, 300),
    values=st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=True), min_size=5, max_size=5),
    var=st.floats(0, 1e6, width=32, allow_subnormal=True),
    eps=st.sampled_from([1e-5, 1e-3, 1e-12]),
)
@settings(max_examples=200, deadline=None)
def test_folding_is_exact_for_any_statistics(length: int, values: list[float], var: float, eps: float) -> None:
    scale, bias, *statistics = (torch.tensor([value]) for value in values)
    weight, shift, mean = statistics
    check(scale, bias, batch_norm(nn.BatchNorm1d, weight, shift, mean, torch.tensor([var]), eps), length)


def test_long_sums_are_tried_in_blocks() -> None:
    scale, bias, statistics = strange(300, 5, 9000, torch.float32)
    check(scale, bias, batch_norm(nn.BatchNorm1d, *statistics), 9000)


def test_no_affine_parameters() -> None:
    bn = nn.BatchNorm2d(3, affine=False).eval()
    assert bn.running_mean is not None
    bn.running_mean.copy_(torch.tensor([-1.0, 0.5, 3.0]))
    folded = check(torch.tensor([0.5, -0.5, 1.0]), None, bn, 9)
    assert folded.threshold.tolist() == [-2, 0, 3]
    assert folded.flip.tolist() == [False, True, False]


def test_a_bn_in_training_mode_is_left_as_it_is() -> None:
    bn = nn.BatchNorm1d(4).train()
    before = {name: value.clone() for name, value in bn.state_dict().items()}
    folded = fold_threshold(torch.ones(4), None, bn, length=5)
    assert bn.training
    assert all(torch.equal(value, before[name]) for name, value in bn.state_dict().items())
    assert folded.threshold.tolist() == [0] * 4, "0 is positive"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_maximum_falls_where_the_sign_does(sign: float) -> None:
    """Max pooling acts on floats: a negative factor and a negative slope give a rising sign, but the pooled value must be the least sum."""
    scale, weight = torch.tensor([1.0, -1.0, 1.0, -1.0]) * sign, torch.tensor([1.0, 1.0, -1.0, -1.0])
    bn = batch_norm(nn.BatchNorm2d, weight, torch.full((4,), 0.3), torch.zeros(4), torch.ones(4))
    fold = fold_modules(scale, None, [], [bn], length=9, spatial=2)
    sums = torch.randint(-9, 10, (500, 4, 4), dtype=torch.int32)  # windows of 4 positions
    with torch.no_grad():
        wanted = bn((sums * scale).amax(1).reshape(500, 4, 1, 1)).flatten(1) >= 0
    bits = (sums >= fold.folded.threshold) != fold.folded.flip
    pooled = torch.where(fold.folded.flip ^ fold.falling, bits.all(1), bits.any(1))
    assert torch.equal(pooled, wanted)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: fold_threshold(torch.ones(3), None, nn.BatchNorm1d(4), length=5), ValueError, "scale: expected shape (4,)"),
        (lambda: fold_threshold(torch.ones(4), torch.ones(5), nn.BatchNorm1d(4), length=5), ValueError, "bias: expected shape (4,)"),
        (lambda: fold_threshold(torch.ones(4), None, nn.LayerNorm(4), length=5), TypeError, "bn: expected a BatchNorm1d or BatchNorm2d"),
        (lambda: fold_threshold(torch.ones(4).long(), None, nn.BatchNorm1d(4), length=5), TypeError, "scale: expected a float16"),
        (
            lambda: fold_threshold(torch.ones(4), None, nn.BatchNorm1d(4, track_running_stats=False), length=5),
            ValueError,
            "running statistics",
        ),
        (lambda: fold_threshold(torch.ones(4), None, nn.BatchNorm1d(4), length=0), ValueError, "length: expected a positive int"),
        (lambda: fold_threshold(torch.ones(4), None, nn.BatchNorm1d(4), length=1 << 24), ValueError, "length: expected less than 2**24"),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_a_sign_that_turns_twice_is_refused() -> None:
    """Infinite times zero is no number, and no number counts as +1."""
    bn = batch_norm(nn.BatchNorm1d, torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0]), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="channel 1: expected a sign that turns at most once"):
        fold_threshold(torch.tensor([1.0, 1e38]), None, bn, length=10)

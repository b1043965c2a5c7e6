"""Closed forms against integrals, and what reports say of weights that are known."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import integrate, optimize
from torch import Tensor, nn

from phyla.quantized import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    BiPer,
    IRNet,
    ReCU,
    SignSTE,
    SwishSign,
    analyze,
    biper_quantization_error,
    laplace_scale,
    quantization_error,
    recu_quantization_error,
    resnet18,
    summarize,
    vgg_small,
)
from phyla.shared.testing import load_golden

GOLDEN = Path(__file__).parent / "golden"


def test_golden_integrals() -> None:
    g = load_golden(GOLDEN / "quantization_error.npz")
    for form, rows in ((biper_quantization_error, g["biper"]), (recu_quantization_error, g["recu"])):
        for b, other, error, scale, second in rows.tolist():
            q = form(b, other)
            assert abs(q.error - error) < 1e-9
            assert abs(q.scale - scale) < 1e-9
            assert abs(q.second_moment - second) < 1e-9


@pytest.mark.parametrize("x", [1e-3, 0.05, 0.3, 0.954882, 2.0, 7.0])
def test_biper_against_an_integral(x: float) -> None:
    """Half a period at a time: the integrand has a kink at each zero of the sine."""

    def moment(f: Callable[[float], float]) -> float:
        pieces = (integrate.quad(lambda u: f(u) * math.exp(-u / x) / x, k * math.pi, (k + 1) * math.pi, epsabs=1e-14)[0] for k in range(80))
        return sum(pieces)

    q = biper_quantization_error(x / 20, 20.0)
    m1, m2 = moment(lambda u: abs(math.sin(u))), moment(lambda u: math.sin(u) ** 2)
    assert abs(q.scale - m1) < 1e-9
    assert abs(q.second_moment - m2) < 1e-9
    assert abs(q.error - (m2 - m1**2)) < 1e-9


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.85, 0.99])
def test_recu_against_an_integral(tau: float) -> None:
    b = 0.3
    q, clamp = recu_quantization_error(b, tau), -b * math.log(2 - 2 * tau)
    density = lambda w: math.exp(-w / b) / b  # noqa: E731
    tail = math.exp(-clamp / b)
    m1 = integrate.quad(lambda w: w * density(w), 0, clamp)[0] + clamp * tail
    m2 = integrate.quad(lambda w: w * w * density(w), 0, clamp)[0] + clamp**2 * tail
    assert abs(q.scale - m1) < 1e-9
    assert abs(q.second_moment - m2) < 1e-9


def test_the_shape_of_bipers_error() -> None:
    def error(x: float) -> float:
        return biper_quantization_error(1.0, x).error

    top = optimize.minimize_scalar(lambda x: -error(x), bounds=(0.5, 1.5), method="bounded", options={"xatol": 1e-9})
    assert abs(top.x - 0.954882) < 1e-6
    assert abs(error(top.x) - 0.102835) < 5e-7
    for x in (1e6, 1e150, 1e300):
        assert abs(error(x) - (0.5 - 4 / math.pi**2)) < 1e-6
    for x in (1e-6, 1e-5, 1e-4):
        assert abs(error(x) / x**2 - 1) < 1e-6, "it rises as x^2"


def test_closed_forms_are_limits_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    b = 0.04
    w = torch.empty(2_000_000, dtype=torch.float64).exponential_(1 / b, generator=generator)
    w *= torch.randint(0, 2, w.shape, generator=generator) * 2 - 1
    assert abs(laplace_scale(w) - b) < 1e-4
    sampled, form = quantization_error(torch.sin(20 * w)), biper_quantization_error(b, 20)
    assert abs(sampled.error - form.error) < 5e-4
    clamp = -b * math.log(0.3)
    sampled, form = quantization_error(w.clamp(-clamp, clamp)), recu_quantization_error(b, 0.85)
    assert abs(sampled.error / form.error - 1) < 0.01


def test_the_error_of_a_tensor_is_that_of_its_best_scaled_signs() -> None:
    v = torch.tensor([0.5, -1.0, 2.0, -0.1])
    q = quantization_error(v)
    assert q.scale == pytest.approx(0.9)
    assert q.second_moment == pytest.approx(5.26 / 4)
    best = optimize.minimize_scalar(lambda g: float((v - g * v.sign()).square().mean()))
    assert q.error == pytest.approx(best.fun)
    assert quantization_error(torch.full((1000,), 0.1)).error < 1e-15, "no cancellation"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: biper_quantization_error(0.0, 20.0), ValueError, "b: expected a number in (0.0"),
        (lambda: biper_quantization_error(1.0, -1.0), ValueError, "frequency: expected a number in (0.0"),
        (lambda: biper_quantization_error(1e200, 1e200), ValueError, "within the range of float64"),
        (lambda: biper_quantization_error(1.0, "a"), TypeError, "frequency: expected a number"),
        (lambda: recu_quantization_error(-1.0, 0.9), ValueError, "b: expected"),
        (lambda: recu_quantization_error(1.0, 1.0), ValueError, "tau: expected a number in [0.5, 1.0)"),
        (lambda: recu_quantization_error(1.0, 0.4), ValueError, "tau: expected"),
        (lambda: quantization_error(torch.ones(0)), ValueError, "latent: expected at least one value"),
        (lambda: quantization_error(torch.tensor([1.0, float("nan")])), ValueError, "latent: expected finite values"),
        (lambda: laplace_scale(torch.ones(3).long()), TypeError, "w: expected"),
    ],
)
def test_messages(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def layer(binarizer: Any, weight: Tensor) -> BinaryLinear:
    made = BinaryLinear(weight.shape[1], weight.shape[0], weight_binarizer=binarizer)
    made.weight.data.copy_(weight)
    return made


def test_reports_of_known_weights() -> None:
    weight = torch.tensor([[0.5, -2.0, 3.0, -0.25], [0.25, 0.75, -0.5, 1.5]])
    model = nn.Sequential(layer(SignSTE(), weight), nn.ReLU(), layer(BiPer(0.3), weight), nn.Sequential(layer(SignSTE(None), weight)))
    first, biper, unclipped = analyze(model)
    assert (first.name, biper.name, unclipped.name) == ("0", "2", "3.0")
    assert (first.binarizer, biper.binarizer) == ("SignSTE", "BiPer")
    assert first.laplace_scale == biper.laplace_scale == pytest.approx(8.75 / 8)
    assert first.sign_mean == pytest.approx(2 / 8)
    assert first.zero_gradient_fraction == 3 / 8, "three weights lie outside of the window"
    assert unclipped.zero_gradient_fraction == 0
    assert first.error == quantization_error(weight)
    assert biper.error == quantization_error(torch.sin(0.3 * weight))
    assert biper.zero_gradient_fraction == 0


def test_reports_of_recu_and_irnet() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.Laplace(0.1, 0.3).sample((8, 4000))
    (recu,) = analyze(layer(ReCU(0.9), weight))
    assert abs(recu.zero_gradient_fraction - 0.2) < 0.02, "a Laplace weight is beyond either quantile with probability 2 - 2 tau"
    assert abs(recu.error.error - recu_quantization_error(2.0, 0.9).error) < 0.1
    assert abs(recu.sign_mean) < 0.02, "weights are centred first"
    (early,) = analyze(layer(IRNet(t=0.1), weight))
    (late,) = analyze(layer(IRNet(t=100.0), weight))
    assert early.zero_gradient_fraction == 0
    assert late.zero_gradient_fraction > 0.5, "the surrogate has become a sign"
    (swish,) = analyze(layer(SwishSign(5.0), weight))
    assert swish.binarizer == "SwishSign"


def test_analyze_leaves_the_model_as_it_was() -> None:
    model = vgg_small(width=4)
    reports = analyze(model)
    assert [report.name for report in reports] == [f"conv{i}" for i in range(1, 6)]
    assert all(parameter.grad is None for parameter in model.parameters())


# summaries


def test_a_summary_counts_by_hand() -> None:
    model = nn.Sequential(
        BinaryConv2d(3, 8, 3, padding=1, groups=1, weight_binarizer=SignSTE()),
        nn.BatchNorm2d(8),
        BinaryConv2d(8, 16, 3, stride=2, groups=2, bias=True),
        nn.Flatten(),
        BinaryLinear(16 * 9, 10, input_binarizer=nn.Identity(), scale="none"),
        nn.Linear(10, 2),
    )
    model.train()
    summary = summarize(model, (2, 3, 8, 8))
    assert model.training
    assert model[1].num_batches_tracked == 0
    first, norm, second, linear, head = summary.rows
    assert (first.name, first.kind, first.output_shape) == ("0", "BinaryConv2d", (2, 8, 8, 8))
    assert (first.binary_parameters, first.float_parameters) == (216, 8)
    assert (first.binary_macs, first.float_macs) == (2 * 8 * 8 * 8 * 27, 0)
    assert (first.bytes_float, first.bytes_packed) == (4 * 224, 4 * 8 + 8 * 8)
    assert (norm.float_parameters, norm.binary_macs, norm.float_macs) == (16, 0, 0)
    assert second.binary_macs == 2 * 16 * 3 * 3 * 4 * 9
    assert second.bytes_packed == 4 * 32 + 16 * 8
    assert (linear.binary_macs, linear.float_macs) == (0, 2 * 10 * 144), "real inputs"
    assert linear.bytes_packed == 10 * 3 * 8
    assert (head.binary_parameters, head.float_macs) == (0, 40)
    assert summary.binary_parameters == sum(row.binary_parameters for row in summary.rows)
    assert summary.bytes_packed == sum(row.bytes_packed for row in summary.rows)
    lines = str(summary).splitlines()
    assert len(lines) == len(summary.rows) + 4
    assert len({len(line) for line in lines}) == 1
    assert "2 x 8 x 8 x 8" in lines[2]
    assert f"{summary.binary_macs:,}" in lines[-1]


def test_a_summary_of_resnet18() -> None:
    summary = summarize(resnet18(), (1, 3, 32, 32))
    binary = [row for row in summary.rows if row.binary_parameters]
    assert sum(4 * row.binary_parameters for row in binary) > 43.9e6, "44 MB"
    assert sum(row.bytes_packed - 4 * row.float_parameters for row in binary) < 1.4e6
    assert summary.binary_macs == sum(row.binary_parameters * row.output_shape[2] * row.output_shape[3] for row in binary)


def test_a_layer_that_is_called_twice_counts_twice_and_one_that_is_not_counts_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), BinaryConv1d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(self.a(x))
            return out

    a, b = summarize(Net(), (3, 4)).rows
    assert a.float_macs == 2 * 3 * 16
    assert (b.output_shape, b.binary_macs) == ((), 0)
    assert summarize(nn.ReLU(), (2,)).rows == ()


def test_a_summary_is_undone_when_the_model_fails() -> None:
    model = vgg_small(width=4).train()
    with pytest.raises(RuntimeError):
        summarize(model, (1, 3, 16, 16))
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="input_shape: expected a positive int"):
        summarize(model, (0, 3, 32, 32))


def test_a_summary_is_drawn() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summary = summarize(vgg_small(width=4), (1, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = summary.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == [row.name for row in summary.rows]
    assert [bar.get_width() for bar in ax.containers[1]] == [row.bytes_packed for row in summary.rows]
    own = pyplot.subplots()[1]
    assert summary.plot(own) is own
    pyplot.close("all")

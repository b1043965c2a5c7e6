import copy

import matplotlib
import pytest
import torch
from torch import Tensor, nn

from phyla.kan_family.bases import RBF, BSpline
from phyla.kan_family.fitting import FitResult, fit
from phyla.kan_family.linear import KANLinear
from phyla.kan_family.model import KAN


def _data(samples: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(samples, 2, dtype=torch.float64, generator=generator) - 1
    return x, torch.sin(3 * x[:, :1]) + x[:, 1:].square()


def _kan(seed: int = 0, basis: object = None) -> KAN:
    torch.manual_seed(seed)
    return KAN([2, 1], basis=basis or BSpline(6, 3), dtype=torch.float64)  # type: ignore[arg-type]


def test_lbfgs_learns_an_additive_function() -> None:
    x, y = _data(100)
    model = _kan()
    result = fit(model, x, y, steps=4)
    assert result.train_loss.shape == (4,)
    assert result.test_loss is None
    assert result.train_loss[-1] < 1e-5
    torch.testing.assert_close(result.train_loss[-1], nn.functional.mse_loss(model(x), y).detach())


@pytest.mark.parametrize("module", [nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))])
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_any_module(module: nn.Module, optimizer: str) -> None:
    x, y = _data()
    model = copy.deepcopy(module).double()
    result = fit(model, x, y, steps=5, optimizer=optimizer)  # type: ignore[arg-type]
    assert result.train_loss.isfinite().all()
    assert (result.regularization == 0).all()
    assert all(child.training for child in model.modules())


def test_modes_of_the_modules_are_kept() -> None:
    x, y = _data()
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    model[1].eval()
    fit(model, x, y, steps=2, optimizer="adam")
    assert [child.training for child in model] == [True, False, True]
    assert model[1].num_batches_tracked == 0


def test_test_loss_callback_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = _data()
    seen: list[tuple[int, float]] = []
    model = _kan()
    result = fit(
        model, x[:40], y[:40], steps=3, x_test=x[40:], y_test=y[40:], progress=True, callback=lambda step, loss: seen.append((step, loss))
    )
    assert result.test_loss is not None
    torch.testing.assert_close(result.test_loss[-1], nn.functional.mse_loss(model(x[40:]), y[40:]).detach())
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [loss for _, loss in seen] == result.train_loss.tolist()
    assert "3/3" in capsys.readouterr().err


def test_quiet_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    fit(_kan(), *_data(), steps=1)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_regularization_is_recorded_and_shrinks() -> None:
    x, y = _data()
    free, penalised = _kan(), _kan()
    fit(free, x, y, steps=2, grid_update_until=0)
    result = fit(penalised, x, y, steps=2, regularization=0.1, grid_update_until=0)
    torch.testing.assert_close(result.regularization[-1], penalised.regularization(x).detach())
    assert result.regularization[-1] < free.regularization(x)


@pytest.mark.parametrize(("every", "until", "expected"), [(2, 5, [0, 2, 4]), (5, 50, [0, 5]), (1, 0, []), (3, 4, [0, 3])])
def test_grid_update_schedule(monkeypatch: pytest.MonkeyPatch, every: int, until: int, expected: list[int]) -> None:
    x, y = _data()
    model = _kan()
    step, updates = [0], []
    original = model.update_grid
    monkeypatch.setattr(model, "update_grid", lambda samples: (updates.append(step[0]), original(samples)))
    fit(
        model, x, y, steps=7, optimizer="adam", grid_update_every=every, grid_update_until=until,
        callback=lambda done, _: step.__setitem__(0, done + 1),
    )  # fmt: skip
    assert updates == expected


def test_lbfgs_starts_anew_after_a_grid_update(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = torch.optim.LBFGS

    def build(*args: object, **options: object) -> torch.optim.LBFGS:
        built.append(options)
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim, "LBFGS", build)
    fit(_kan(), *_data(), steps=4, grid_update_every=2)
    assert len(built) == 3  # the first and one for each of the updates before steps 0 and 2
    assert built[0]["history_size"] == 10
    assert built[0]["max_iter"] == 20
    assert built[0]["line_search_fn"] == "strong_wolfe"
    assert built[0]["tolerance_grad"] == built[0]["tolerance_change"] == 1e-32
    assert built[0]["lr"] == 1.0


def test_grids_follow_the_data_of_a_single_layer_and_other_bases_have_none() -> None:
    x, y = _data()
    layer = KANLinear(2, 1, basis=BSpline(4, 3), dtype=torch.float64)
    fit(layer, 5 * x, y, steps=1)
    assert layer.coverage(5 * x).min() > 0.9
    assert fit(_kan(basis=RBF(6)), x, y, steps=2).train_loss.isfinite().all()


def test_batches_see_every_sample_and_follow_the_generator() -> None:
    x, y = _data(10)
    seen: list[Tensor] = []

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(target.flatten())
        return nn.functional.l1_loss(prediction, target)

    def run() -> Tensor:
        model = _kan()
        fit(model, x, y, steps=5, optimizer="adam", batch_size=2, loss=loss, generator=torch.Generator().manual_seed(3))
        return model(x).detach()

    assert torch.equal(run(), run())
    assert torch.equal(torch.cat(seen[:5]).sort().values, y.flatten().sort().values)
    assert not torch.equal(torch.cat(seen[:5]), y.flatten())
    seen.clear()
    fit(_kan(), x, y, steps=2, optimizer="adam", batch_size=99, loss=loss)
    assert all(len(target) == 10 for target in seen)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_non_finite_loss_restores_and_warns(optimizer: str) -> None:
    x, y = _data()
    model = _kan()
    states: list[dict[str, Tensor]] = []
    poison = [False]

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        value = nn.functional.mse_loss(prediction, target)
        return value * float("nan") if poison[0] else value

    def callback(step: int, _: float) -> None:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        poison[0] = step == 2

    with pytest.warns(RuntimeWarning, match="non-finite at step 3"):
        result = fit(model, x, y, steps=6, optimizer=optimizer, loss=loss, grid_update_every=3, callback=callback)  # type: ignore[arg-type]
    assert result.train_loss.shape == (3,)
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[-1][name]), name


def test_a_start_without_finite_loss_keeps_the_parameters() -> None:
    x, y = _data()
    model = _kan()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning, match="step 0"):
        result = fit(model, x, y, steps=2, loss=lambda prediction, _: prediction.sum() / 0.0)
    assert len(result.train_loss) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected a positive int, got 0"),
        ({"optimizer": "sgd"}, ValueError, "optimizer: expected one of 'lbfgs', 'adam', got 'sgd'"),
        ({"lr": 0.0}, ValueError, "lr: expected a number"),
        ({"regularization": -1.0}, ValueError, "regularization: expected a number"),
        ({"grid_update_every": 0}, ValueError, "grid_update_every: expected a positive int, got 0"),
        ({"grid_update_until": -1}, ValueError, "grid_update_until: expected a number"),
        ({"batch_size": 0}, ValueError, "batch_size: expected a positive int, got 0"),
        ({"x_test": torch.zeros(3, 2)}, TypeError, "y_test: expected a Tensor, got NoneType"),
        ({"y_test": torch.zeros(3, 1)}, TypeError, "x_test: expected a Tensor, got NoneType"),
        ({"y": torch.zeros(3, 1)}, ValueError, r"y: expected 60 samples like x, got shape \(3, 1\)"),
        (
            {"y": torch.zeros(60, dtype=torch.float64)},
            ValueError,
            r"y: expected shape \(60, 1\) like the model's output, got shape \(60,\)",
        ),
        ({"x": torch.zeros(0, 2)}, ValueError, "x: expected shape"),
        ({"model": nn.Identity()}, ValueError, "model: expected at least one parameter"),
        ({"model": nn.Linear(2, 1), "regularization": 0.5}, ValueError, r"regularization: expected 0 .*, got 0.5"),
    ],
)
def test_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    x, y = _data()
    arguments: dict[str, object] = {"model": _kan(), "x": x, "y": y} | options
    with pytest.raises(error, match=message):
        fit(**arguments)  # type: ignore[arg-type]


def test_the_result_draws_its_losses() -> None:
    matplotlib.use("Agg")
    result = FitResult(torch.tensor([1.0, 0.1]), torch.tensor([2.0, 0.2]), torch.zeros(2))
    lines = result.plot().get_lines()
    assert [line.get_label() for line in lines] == ["train", "test"]
    assert list(lines[1].get_ydata()) == pytest.approx([2.0, 0.2])
    assert result.plot(lines[0].axes) is lines[0].axes

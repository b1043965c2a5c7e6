import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phyla.shared import checks

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.complex128, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of any shape, dtype, stride and device, with NaN and infinities among the values."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    values = draw(st.lists(st.sampled_from([0.0, 1.0, 2.5, math.nan, math.inf, -math.inf]), min_size=1, max_size=4))
    if not (dtype.is_floating_point or dtype.is_complex):
        values = [value if math.isfinite(value) else 3.0 for value in values]
    tensor = torch.tensor(values).to(dtype).repeat(math.prod(shape))[: math.prod(shape)].reshape(shape)
    match draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded", "meta", "parameter", "sparse"])):
        case "transposed":
            return tensor.movedim(0, -1) if shape else tensor
        case "strided":
            return tensor[..., ::2] if shape else tensor
        case "expanded":
            return tensor.unsqueeze(0).expand(3, *shape)
        case "meta":
            return tensor.to("meta")
        case "parameter":
            return tensor.requires_grad_(dtype.is_floating_point or dtype.is_complex)
        case "sparse":
            return tensor.real.float().nan_to_num().to_sparse()
        case _:
            return tensor


anything = st.one_of(
    tensors(),
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 10**400, -(10**400)]),
    st.floats(),
    st.complex_numbers(),
    st.fractions(),
    st.decimals(),
    st.text(max_size=6),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.builds(np.int64, st.integers(-5, 5)),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.ones, st.integers(0, 3)),
)
sizes = st.lists(st.one_of(st.none(), st.integers(0, 4), st.sampled_from("KN")), max_size=4)
bounds = st.one_of(st.none(), st.floats(allow_nan=False), st.integers(-3, 3))


@given(anything)
def test_positive_int_gives_an_equal_int_or_raises(value: object) -> None:
    try:
        result = checks.positive_int("n", value)
    except TypeError as error:
        assert str(error).startswith("n: expected a positive int, got ")
        assert isinstance(value, bool) or not isinstance(value, int | np.integer)
    except ValueError as error:
        assert str(error) == f"n: expected a positive int, got {value}"
        assert isinstance(value, int | np.integer)
        assert value < 1
    else:
        assert type(result) is int
        assert result == value >= 1  # type: ignore[operator]


@given(anything, bounds, bounds, st.booleans(), st.booleans())
def test_in_range_gives_a_float_within_the_bounds_or_raises(
    value: object, low: float | None, high: float | None, low_open: bool, high_open: bool
) -> None:
    try:
        result = checks.in_range("x", value, low, high, low_open=low_open, high_open=high_open)
    except TypeError as error:
        assert str(error).startswith("x: expected a number, got ")
    except ValueError as error:
        assert str(error).startswith("x: expected a number in ")
    else:
        assert type(result) is float
        assert result == value or (isinstance(value, int | Fraction) and (math.isinf(result) or result == float(value)))
        assert low is None or low <= result
        assert high is None or result <= high
        assert low is not None or high is not None or math.isfinite(result)


@given(anything)
def test_choice_gives_an_option_or_raises(value: object) -> None:
    try:
        assert checks.choice("form", value, ("", "a", "b")) == value
    except TypeError as error:
        assert not isinstance(value, str)
        assert str(error).startswith("form: expected one of '', 'a', 'b', got ")
    except ValueError:
        assert value not in ("", "a", "b")


@given(anything, st.integers(0, 4), sizes, anything)
def test_tensor_checks_give_the_very_tensor_back_or_raise(
    value: object, size: int, expected: list[int | str | None], other: object
) -> None:
    battery: list[Callable[[], Tensor]] = [
        lambda: checks.floating("x", value),
        lambda: checks.last_dim("x", value, size),
        lambda: checks.shape("x", value, expected),
        lambda: checks.same("x", value, "x", other),
        lambda: checks.finite("x", value),
    ]
    for check in battery:
        try:
            assert check() is value
        except (TypeError, ValueError) as error:
            assert str(error).startswith("x: expected ")


@given(tensors())
def test_floating_finite_and_shape_agree_with_their_definitions(tensor: Tensor) -> None:
    assert passes(lambda: checks.floating("x", tensor)) == (tensor.dtype in DTYPES[:4])
    assert passes(lambda: checks.shape("x", tensor, [None] * tensor.dim()))
    assert passes(lambda: checks.shape("x", tensor, tensor.shape))
    assert not passes(lambda: checks.shape("x", tensor, [None] * (tensor.dim() + 1)))
    assert passes(lambda: checks.shape("x", tensor, ["K"] * tensor.dim())) == (len(set(tensor.shape)) <= 1)
    if tensor.layout == torch.strided and not tensor.is_meta:
        wide = tensor.detach().to(torch.complex128)
        assert passes(lambda: checks.finite("x", tensor)) == bool(torch.isfinite(wide).all())


def passes(check: Callable[[], Tensor]) -> bool:
    try:
        check()
    except (TypeError, ValueError):
        return False
    return True


x = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("check", "kind", "message"),
    [
        (lambda: checks.positive_int("in_features", 0), ValueError, "in_features: expected a positive int, got 0"),
        (lambda: checks.positive_int("grid", True), TypeError, "grid: expected a positive int, got bool True"),
        (lambda: checks.positive_int("grid", 2.0), TypeError, "grid: expected a positive int, got float 2.0"),
        (lambda: checks.in_range("eps", 0, 0, low_open=True), ValueError, "eps: expected a number in (0, inf), got 0"),
        (lambda: checks.in_range("p", math.nan, 0, 1), ValueError, "p: expected a number in [0, 1], got nan"),
        (lambda: checks.in_range("p", math.inf, 0), ValueError, "p: expected a number in [0, inf), got inf"),
        (lambda: checks.in_range("p", "1"), TypeError, "p: expected a number, got str '1'"),
        (lambda: checks.choice("form", "c", ("a", "b")), ValueError, "form: expected one of 'a', 'b', got 'c'"),
        (
            lambda: checks.choice("form", "sum-abs", ("sum_abs", "abs_sum")),
            ValueError,
            "form: expected one of 'sum_abs', 'abs_sum', got 'sum-abs' (did you mean 'sum_abs'?)",
        ),
        (lambda: checks.choice("form", 1, ("a",)), TypeError, "form: expected one of 'a', got int 1"),
        (lambda: checks.last_dim("x", x, 4), ValueError, "x: expected last dimension 4, got shape (2, 5)"),
        (lambda: checks.last_dim("x", torch.tensor(1.0), 1), ValueError, "x: expected last dimension 1, got shape ()"),
        (lambda: checks.last_dim("x", [1.0], 1), TypeError, "x: expected a Tensor, got list"),
        (lambda: checks.shape("x", x, (None, 3)), ValueError, "x: expected shape (*, 3), got shape (2, 5)"),
        (lambda: checks.shape("x", x, ("K", "K")), ValueError, "x: expected shape (K, K), got shape (2, 5)"),
        (lambda: checks.shape("x", x, (10,)), ValueError, "x: expected shape (10,), got shape (2, 5)"),
        (
            lambda: checks.floating("x", x.long()),
            TypeError,
            "x: expected a float16, bfloat16, float32 or float64 tensor, got int64 on cpu",
        ),
        (lambda: checks.same("x", x.double(), "w", x), ValueError, "x: expected float32 on cpu like w, got float64 on cpu"),
        (lambda: checks.same("x", x.to("meta"), "w", x), ValueError, "x: expected float32 on cpu like w, got float32 on meta"),
        (lambda: checks.same("x", x, "w", None), TypeError, "w: expected a Tensor, got NoneType"),
        (lambda: checks.finite("x", x / 0), ValueError, "x: expected finite values, got 10 that are not, of 10"),
        (lambda: checks.finite("x", x.to_sparse()), TypeError, "x: expected a dense Tensor, got layout torch.sparse_coo"),
    ],
)
def test_messages(check: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        check()
    assert str(caught.value) == message


def checked_product(x: Tensor, weight: Tensor, scale: float, form: str) -> Tensor:
    checks.last_dim("x", checks.floating("x", x), 5)
    checks.shape("weight", checks.same("weight", weight, "x", x), ("K", "K"))
    checks.choice("form", form, ("plain", "scaled"))
    return x @ weight * checks.in_range("scale", scale, 0, 2) / checks.positive_int("rank", 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_checks_trace_without_a_graph_break(dynamic: bool) -> None:
    weight = torch.eye(5)
    compiled = torch.compile(checked_product, fullgraph=True, dynamic=dynamic, backend="eager")
    for rows in (2, 3):
        x = torch.randn(rows, 5)
        assert torch.equal(compiled(x, weight, 1.0, "plain"), x @ weight / 2)


def test_checks_export_with_a_dynamic_batch() -> None:
    class Product(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return checked_product(x, weight, 1.0, "plain")

    exported = torch.export.export(Product(), (torch.randn(4, 5), torch.eye(5)), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    assert torch.allclose(exported.module()(torch.ones(7, 5), torch.eye(5)), torch.full((7, 5), 0.5))

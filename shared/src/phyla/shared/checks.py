"""Argument checks with one voice: `name: expected what, got what`.

Each check returns the value that it was given, so that it can stand where the value is used. TypeError means the wrong kind of
thing, ValueError the right kind with a wrong value. All but `finite` look at metadata only, so they are free under `torch.compile`.
"""

import difflib
import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

__all__ = ["choice", "finite", "floating", "in_range", "last_dim", "positive_int", "same", "shape"]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    return value


def _where(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an int or a fraction beyond the largest float
        return -math.inf if value < 0 else math.inf


def positive_int(name: str, value: object) -> int:
    """A whole number of at least 1. Raises: TypeError if it is no int (a bool is none), ValueError if it is below 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a positive int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
    return int(value)


def in_range(
    name: str, value: object, low: float | None = None, high: float | None = None, *, low_open: bool = False, high_open: bool = False
) -> float:
    """A number between `low` and `high`; a bound that is None admits every finite number.

    Raises: TypeError if it is no real number (a bool is none), ValueError if it is NaN or outside.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    left, right = -math.inf if low is None else low, math.inf if high is None else high
    below, above = low is None or low_open, high is None or high_open
    number = _as_float(value)
    if not ((left < number if below else left <= number) and (number < right if above else number <= right)):
        raise ValueError(f"{name}: expected a number in {'(' if below else '['}{left}, {right}{')' if above else ']'}, got {value}")
    return number


def choice(name: str, value: object, options: Collection[str]) -> str:
    """One of `options`. Raises: TypeError if it is no str, ValueError, with the nearest option named, if it is another one."""
    if isinstance(value, str) and value in options:
        return value
    expected = "expected one of " + ", ".join(repr(option) for option in options)
    if not isinstance(value, str):
        raise TypeError(f"{name}: {expected}, got {type(value).__name__} {value!r}")
    near = difflib.get_close_matches(value, options, n=1)
    raise ValueError(f"{name}: {expected}, got {value!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))


def floating(name: str, tensor: object) -> Tensor:
    """A tensor of float16, bfloat16, float32 or float64. Raises: TypeError."""
    checked = _tensor(name, tensor)
    if checked.dtype not in _FLOATING:
        raise TypeError(f"{name}: expected a float16, bfloat16, float32 or float64 tensor, got {_where(checked)}")
    return checked


def last_dim(name: str, tensor: object, size: int) -> Tensor:
    """A tensor of shape (..., size). Raises: TypeError if it is no Tensor, ValueError if its last dimension is another."""
    checked = _tensor(name, tensor)
    if checked.dim() == 0 or checked.shape[-1] != size:
        raise ValueError(f"{name}: expected last dimension {size}, got shape {tuple(checked.shape)}")
    return checked


def shape(name: str, tensor: object, expected: Sequence[int | str | None]) -> Tensor:
    """A tensor of the expected shape: None is any size, a str any size that is the same wherever the str stands.

    Raises: TypeError if it is no Tensor, ValueError if its shape is another.
    """
    checked = _tensor(name, tensor)
    sizes: dict[str, int] = {}
    fits = checked.dim() == len(expected) and all(
        want is None or size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
        for want, size in zip(expected, checked.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name}: expected shape ({wanted}), got shape {tuple(checked.shape)}")
    return checked


def same(name: str, tensor: object, other_name: str, other: object) -> Tensor:
    """A tensor with the dtype and the device of `other`. Raises: TypeError if one is no Tensor, ValueError if they differ."""
    checked, peer = _tensor(name, tensor), _tensor(other_name, other)
    if checked.dtype != peer.dtype or checked.device != peer.device:
        raise ValueError(f"{name}: expected {_where(peer)} like {other_name}, got {_where(checked)}")
    return checked


def finite(name: str, tensor: object) -> Tensor:
    """A dense tensor without NaN and infinities; a meta tensor has no values and passes. Reads the data, so it breaks a compiled graph.

    Raises: TypeError if it is no dense Tensor, ValueError if a value is not finite.
    """
    checked = _tensor(name, tensor)
    if checked.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense Tensor, got layout {checked.layout}")
    if (checked.is_floating_point() or checked.is_complex()) and not checked.is_meta:
        bad = int((~torch.isfinite(checked.detach())).sum())
        if bad:
            raise ValueError(f"{name}: expected finite values, got {bad} that are not, of {checked.numel()}")
    return checked

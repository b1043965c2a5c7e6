"""Signs as bits: packing, unpacking and the exact integer product of packed matrices.

Bit 1 means -1, bit 0 means +1 (zero, minus zero and NaN are +1); element i of the packed dimension is bit ``i % 64``, least significant
first, of the int64 word ``i // 64``. Bits behind the last element are 0, as ``pack`` leaves them: every op here counts on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phyla.shared import checks
from phyla.shared.kernels import Op

BLOCK = 1 << 23
"""Elements of a composite's largest temporary: 64 MiB in int64, 32 MiB in float32."""
EXACT = 1 << 24
"""float32 holds every integer below this."""


def words_of(length: int) -> int:
    """Words that hold ``length`` bits."""
    return -(-length // 64)


def check_length(name: str, length: object) -> int:
    """A count of elements whose dot product fits int32; 0 is one. Raises: TypeError, ValueError."""
    count = length if type(length) is int and length >= 0 else checks.positive_int(name, length)
    if count >= 1 << 31:
        raise ValueError(f"{name}: expected less than 2**31 elements, whose product fits int32, got {length}")
    return count


def check_words(name: str, words: object, length: int, dims: int | None = None, *, of: str = "elements") -> Tensor:
    """int64 words (..., ceil(length/64)), of ``dims`` dimensions where given. Raises: TypeError, ValueError."""
    if not isinstance(words, Tensor):
        raise TypeError(f"{name}: expected a Tensor of int64 words, got {type(words).__name__}")
    if words.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 words, got {str(words.dtype).removeprefix('torch.')}")
    if words.dim() < 1 or (dims is not None and words.dim() != dims):
        raise ValueError(f"{name}: expected {'at least 1' if dims is None else dims} dimensions, got shape {tuple(words.shape)}")
    width = words_of(length)
    if words.shape[-1] != width:
        raise ValueError(f"{name}: expected {width} words for {length} {of}, got shape {tuple(words.shape)}")
    return words


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _pack(x: Tensor) -> Tensor:
    n = x.shape[-1]
    width, rows = words_of(n), _rows(x)
    words = torch.zeros(len(rows), width, dtype=torch.int64, device=x.device)
    octets = words.view(torch.uint8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=x.device)
    step = max(1, BLOCK // max(n, 1))
    for start in range(0, len(rows), step):
        negative = torch.nn.functional.pad((rows[start : start + step] < 0).to(torch.uint8), (0, 64 * width - n))
        octets[start : start + step] = (negative.view(len(negative), 8 * width, 8) * weights).sum(-1, dtype=torch.uint8)
    return words.reshape(*x.shape[:-1], width)


def _unpack(words: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    rows = _rows(words)
    out = torch.empty(len(rows), length, dtype=dtype, device=words.device)
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    step = max(1, BLOCK // max(length, 1))
    for start in range(0, len(rows), step):
        octets = rows[start : start + step].contiguous().view(torch.uint8)
        bits = ((octets.unsqueeze(-1) >> places) & 1).flatten(1)[:, :length]
        out[start : start + step] = 1 - 2 * bits.to(torch.int8)
    return out.reshape(*words.shape[:-1], length)


def _popcount(words: Tensor) -> Tensor:
    """Ones in each word, in place; the shifts are arithmetic, and every mask clears what they drag in."""
    words -= (words >> 1) & 0x5555555555555555
    words = (words & 0x3333333333333333).add_((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return words.mul_(0x0101010101010101).bitwise_right_shift_(56)


def _few_rows(a: Tensor, b: Tensor, length: int) -> Tensor:
    """(M, N) products by population count, for an operand of a few rows: nothing but the words is read."""
    out = torch.empty(len(a), len(b), dtype=torch.int32, device=a.device)
    step = max(1, BLOCK // max(1, 2 * a.numel()))
    for start in range(0, len(b), step):
        different = _popcount(a.unsqueeze(1) ^ b[start : start + step]).sum(-1)
        out[:, start : start + step] = length - 2 * different
    return out


def _many_rows(a: Tensor, b: Tensor, length: int) -> Tensor:
    """(M, N) products by float32 matrix products of blocks of at most 2^18 signs a row, each exact."""
    out = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    chunk = 1 << 12
    for first in range(0, a.shape[1], chunk):
        size = min(length - 64 * first, 64 * chunk)
        step = max(1, BLOCK // size)
        for i in range(0, len(a), step):
            left = _unpack(a[i : i + step, first : first + chunk], size, torch.float32)
            for j in range(0, len(b), step):
                right = _unpack(b[j : j + step, first : first + chunk], size, torch.float32)
                out[i : i + step, j : j + step] += (left @ right.T).to(torch.int32)
    return out


def _matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    rows = _rows(a)
    product = _few_rows if min(len(rows), len(b)) <= 4 else _many_rows
    return product(rows, b, length).reshape(*a.shape[:-1], len(b))


_pack_op = Op(
    "phyla_quantized::pack(Tensor x) -> Tensor",
    _pack,
    fake=lambda x: x.new_empty(*x.shape[:-1], words_of(x.shape[-1]), dtype=torch.int64),
)
_unpack_op = Op(
    "phyla_quantized::unpack(Tensor words, int length, ScalarType dtype) -> Tensor",
    _unpack,
    fake=lambda words, length, dtype: words.new_empty(*words.shape[:-1], length, dtype=dtype),
)
_matmul_op = Op(
    "phyla_quantized::packed_matmul(Tensor a, Tensor b, int length) -> Tensor",
    _matmul,
    fake=lambda a, b, length: a.new_empty(*a.shape[:-1], b.shape[0], dtype=torch.int32),
)


def pack(x: Tensor) -> Tensor:
    """Signs of ``x`` along its last dimension as bits: 1 where ``x < 0``, so 0, -0.0 and NaN count as +1.

    Args:
        x: (..., n) of float16, bfloat16, float32 or float64.

    Returns:
        int64 words (..., ceil(n/64)).

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` has no dimension.

    Source: "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", section 3.
    """
    if checks.floating("x", x).dim() < 1:
        raise ValueError(f"x: expected at least 1 dimension, got shape {tuple(x.shape)}")
    packed: Tensor = _pack_op(x.detach() if x.requires_grad else x)
    return packed


def unpack(words: Tensor, length: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The signs behind packed words.

    Args:
        words: int64 (..., ceil(length/64)).
        length: number of elements of the packed dimension.
        dtype: float16, bfloat16, float32 or float64.

    Returns:
        (..., length) of +1 and -1.

    Raises:
        TypeError: words that are not int64, or a ``dtype`` that is not floating-point.
        ValueError: words of another width than ``length`` needs.

    Source: the inverse of ``pack``.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
    count = check_length("length", length)
    signs: Tensor = _unpack_op(check_words("words", words, count), count, dtype)
    return signs


def flip_words(flip: object, width: int) -> Tensor:
    """The words (width,) whose bits are the channels of a bool mask (C,). Raises: TypeError, ValueError."""
    if not isinstance(flip, Tensor) or flip.dtype != torch.bool:
        raise TypeError(f"flip: expected a bool Tensor, got {flip.dtype if isinstance(flip, Tensor) else type(flip).__name__}")
    if flip.dim() != 1 or words_of(flip.shape[0]) != width:
        raise ValueError(f"flip: expected shape (C,) with a C that {width} words hold, got shape {tuple(flip.shape)}")
    words: Tensor = _pack_op(-flip.float())
    return words


def check_product(a: object, b: object, length: object) -> tuple[Tensor, Tensor, int]:
    """The operands of a packed product. Raises: TypeError, ValueError."""
    count = check_length("length", length)
    left, right = check_words("a", a, count), check_words("b", b, count, 2)
    if left.dim() < 2:
        raise ValueError(f"a: expected at least 2 dimensions, got shape {tuple(left.shape)}")
    return left, right, count


def packed_matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    """Exact products of packed ±1 rows: ``length - 2 popcount(a_m xor b_n)``.

    Args:
        a: int64 words (..., M, W) with W = ceil(length/64).
        b: int64 words (N, W).
        length: number of elements of a row, under 2^31.

    Returns:
        int32 (..., M, N).

    Raises:
        TypeError: operands that are not int64 words.
        ValueError: words of another width than ``length`` needs, or wrong dimensions.

    Source: "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", section 3.
    """
    product: Tensor = _matmul_op(*check_product(a, b, length))
    return product

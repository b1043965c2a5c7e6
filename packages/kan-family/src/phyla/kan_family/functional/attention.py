"""Learnable (Kolmogorov-Arnold) attention: a KAN layer in the place of softmax, without the tensors that would make it large.

Legend: B batch, h heads, n queries, N keys, d head width, r rank, K basis functions. A row of scores `A_n` becomes `Phi_n (r,)`, the hidden
units of a KAN layer, then weights `W Phi_n (N,)` with `W = proj`. Nothing normalises the row, so the output is `Phi (W^T V)`: neither the
weights nor the `(B, h, n, N, K)` basis values are ever formed.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from phyla.shared import checks
from phyla.shared.kernels import Kernel

Projection = Literal["none", "hidden", "output"]

_ROWS = 32  # query rows per tile: a tile of basis values has 32 / n of the size of all of them
_BASES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "identity": lambda x: x}


def simplex_projection(y: Tensor, dim: int = -1) -> Tensor:
    """Project every vector along `dim` onto the probability simplex `{x >= 0, sum x = 1}`, in the Euclidean norm.

    `x = relu(y - lambda)`; on the support the derivative is `dx = dy - mean(dy)`, elsewhere 0. An entry of `-inf` gets weight 0.

    Args:
        y: Any shape.
        dim: The dimension of the vectors; it must not be empty.

    Returns:
        Tensor of the shape of `y`.

    Raises:
        TypeError: If `y` is no floating tensor.
        ValueError: If `dim` is no dimension of `y`, or is empty.

    Source: "Kolmogorov-Arnold Attention", Algorithm 1 (the sort form of the projection onto the simplex).
    """
    checks.floating("y", y)
    if not -y.ndim <= dim < y.ndim or y.shape[dim] == 0:
        raise ValueError(f"dim: expected a dimension of y that is not empty, got {dim} for shape {tuple(y.shape)}")
    y = y.movedim(dim, -1)
    descending = y.detach().sort(dim=-1, descending=True).values
    excess = descending.cumsum(-1) - 1
    place = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    size = (place * descending > excess).sum(-1, keepdim=True).clamp_min(1)
    support = y.detach() > excess.gather(-1, size - 1) / size
    threshold = (torch.where(support, y, 0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return (y - threshold).relu().movedim(-1, dim)


def learned_attention_weights(
    scores: Tensor,
    coef: Tensor,
    proj: Tensor,
    *,
    basis: Callable[[Tensor], Tensor],
    base: str | None = None,
    projection: Projection = "none",
) -> Tensor:
    """Attention weights of a learnable operator, from scores; for inspection, since `learned_attention` never forms them.

    `Phi_np = sum_q [b(A_nq) + sum_k coef_pqk B_k(A_nq)]`, then the weights of row `n` are `proj Phi_n`. They may be negative and do not
    sum to one unless `projection="output"`.

    Args:
        scores: `(B, h, n, N)`.
        coef: `(h, r, N, K)`.
        proj: `(h, N, r)`.
        basis: Elementwise function `(..., N) -> (..., N, K)`, such as a built `BasisFunction`.
        base: The term `b`: "silu", "gelu", "identity" or None.
        projection: Where to project onto the simplex: "hidden" projects `Phi_n`, "output" the weights of a row.

    Returns:
        Tensor `(B, h, n, N)`.

    Raises:
        TypeError: If a tensor is not floating.
        ValueError: If shapes disagree, or an option is unknown.

    Source: "Kolmogorov-Arnold Attention", section 3 and Algorithm 2.
    """
    _check_options(base, projection)
    checks.floating("scores", scores)
    if scores.ndim != 4:
        raise ValueError(f"scores: expected shape (B, heads, queries, keys), got {tuple(scores.shape)}")
    _check_operator(coef, proj, scores.shape[1], scores.shape[3])

    def tile(rows: Tensor) -> Tensor:
        hidden = _contract(rows, coef, None, basis, base).to(scores.dtype)
        return _weights(simplex_projection(hidden) if projection == "hidden" else hidden, proj, None, projection)

    return _over_rows(tile, scores)


def learned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coef: Tensor,
    proj: Tensor,
    *,
    basis: Callable[[Tensor], Tensor],
    base: str | None = None,
    projection: Projection = "none",
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention whose rows of weights are `proj Phi(q k^T scale)` instead of a softmax; see `learned_attention_weights`.

    Works through tiles of the score matrix that backward computes again: memory grows with `N`, not with `N^2 K`. A built Fourier basis
    runs on a native CPU kernel. `projection="output"` and dropout need the weights themselves, one tile of rows at a time.

    Args:
        q: `(B, h, n, d)`.
        k: `(B, h, N, d)`.
        v: `(B, h, N, width)`.
        coef: `(h, r, N, K)`.
        proj: `(h, N, r)`.
        basis: Elementwise function `(..., N) -> (..., N, K)`, such as a built `BasisFunction`.
        base: The term `b` of every hidden unit: "silu", "gelu", "identity" or None.
        projection: "none", or where to project onto the simplex: "hidden" or "output".
        scale: Factor of the scores, `1 / sqrt(d)` by default.
        key_padding_mask: `(B, N)`, True for keys to leave out: they add nothing to the hidden units and their values count as zero.
        dropout: Probability of dropping a weight.

    Returns:
        Tensor `(B, h, n, width)`.

    Raises:
        TypeError: If a tensor is not floating, or the mask not bool.
        ValueError: If shapes disagree, or an option is unknown.

    Source: "Kolmogorov-Arnold Attention", section 3. `sigma(A) V = Phi (W^T V)` is not in the paper: it is what makes this cheap.
    """
    _check_options(base, projection)
    checks.in_range("dropout", dropout, 0.0, 1.0)
    checks.floating("q", q)
    if q.ndim != 4:
        raise ValueError(f"q: expected shape (B, heads, queries, width), got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    tokens = _check_operator(coef, proj, heads, None)
    for name, t, last in (("k", k, width), ("v", v, None)):
        checks.shape(name, checks.floating(name, t), (batch, heads, tokens, last))
    if scale is None:
        scale = 1 / math.sqrt(width)
    if key_padding_mask is not None:
        if checks.shape("key_padding_mask", key_padding_mask, (batch, tokens)).dtype != torch.bool:
            raise TypeError(f"key_padding_mask: expected a bool tensor, True for padding, got {key_padding_mask.dtype}")
        padding = key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)  # whatever stands there, NaN included, has no influence

    hidden = _hidden(q, k, coef, key_padding_mask, basis, base, scale)
    if projection == "hidden":
        hidden = simplex_projection(hidden)
    if projection != "output" and dropout == 0:
        return hidden @ (proj.mT @ v)

    def tile(rows: Tensor) -> Tensor:
        return F.dropout(_weights(rows, proj, key_padding_mask, projection), dropout) @ v

    return _over_rows(tile, hidden, random=dropout > 0)


def _hidden(
    q: Tensor, k: Tensor, coef: Tensor, padding: Tensor | None, basis: Callable[[Tensor], Tensor], base: str | None, scale: float
) -> Tensor:
    """The hidden units `Phi` of every query, `(B, h, n, r)`, without the basis values of more than one tile of rows."""
    from phyla.kan_family.bases import BasisFunction, Fourier  # bases are made of functions of this folder

    if isinstance(basis, BasisFunction):
        checks.shape("coef", coef, (None, None, basis.in_features, basis.num_basis))
    if isinstance(basis, BasisFunction) and isinstance(basis.spec, Fourier):
        out: Tensor = _fourier_hidden(q, k, coef, padding, base or "none", scale)
        return out

    def tile(rows: Tensor) -> Tensor:
        scores = rows @ k.mT * scale
        if isinstance(basis, BasisFunction) and padding is None:  # the native contraction of the linear layers
            hidden = torch.stack([basis.linear(a, c) for a, c in zip(scores.unbind(1), coef.unbind(0), strict=True)], dim=1)
            return hidden if base is None else hidden + _base_sum(scores, padding, base)
        return _contract(scores, coef, padding, basis, base).to(q.dtype)

    return _over_rows(tile, q)


def _contract(scores: Tensor, coef: Tensor, padding: Tensor | None, basis: Callable[[Tensor], Tensor], base: str | None) -> Tensor:
    """`Phi` of a tile of scores by any basis: its values `(B, h, rows, N * K)` times the coefficients; computed in float32 at least."""
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores, coef = scores.float(), coef.float()
    values = basis(scores)
    if values.shape[-1] != coef.shape[-1]:
        raise ValueError(f"coef: expected {values.shape[-1]} basis functions, as basis gives, got {coef.shape[-1]}")
    if padding is not None:
        values = values.masked_fill(padding[:, None, None, :, None], 0)
    hidden = values.flatten(-2) @ coef.flatten(-2).mT
    return hidden if base is None else hidden + _base_sum(scores, padding, base)


def _base_sum(scores: Tensor, padding: Tensor | None, base: str) -> Tensor:
    """The base term of every row, `(B, h, rows, 1)`: the same for all hidden units."""
    values = _BASES[base](scores)
    if padding is not None:
        values = values.masked_fill(padding[:, None, None, :], 0)
    return values.sum(-1, keepdim=True)


def _fourier_composite(q: Tensor, k: Tensor, coef: Tensor, padding: Tensor | None, base: str, scale: float) -> Tensor:
    """`Phi` for the basis `cos A .. cos GA, sin A .. sin GA`, one frequency after the other by the rotation by `A`."""
    scores = q @ k.mT * scale
    cos_1, sin_1 = scores.cos(), scores.sin()
    if padding is not None:  # (0, 0) stays (0, 0) under rotation: the padded keys drop out of every frequency
        cos_1, sin_1 = (t.masked_fill(padding[:, None, None, :], 0) for t in (cos_1, sin_1))
    a_hNr, b_hNr = (c.mT.unbind(-3) for c in coef.movedim(-1, -3).chunk(2, dim=-3))
    cos_m, sin_m = cos_1, sin_1
    hidden = cos_m @ a_hNr[0] + sin_m @ b_hNr[0]
    for a, b in zip(a_hNr[1:], b_hNr[1:], strict=True):
        cos_m, sin_m = cos_m * cos_1 - sin_m * sin_1, sin_m * cos_1 + cos_m * sin_1
        hidden = hidden + cos_m @ a + sin_m @ b
    return hidden if base == "none" else hidden + _base_sum(scores, padding, base)


_fourier_hidden = Kernel(
    "phyla_kan_family::attention_fourier(Tensor q, Tensor k, Tensor coef, Tensor? padding, str base, float scale) -> Tensor",
    _fourier_composite,
    differentiable=("q", "k", "coef"),
    fake=lambda q, k, coef, padding, base, scale: q.new_empty((*q.shape[:3], coef.shape[1])),
    autocast=("q", "k"),
)


def _weights(hidden: Tensor, proj: Tensor, padding: Tensor | None, projection: Projection) -> Tensor:
    """Rows of weights `(B, h, rows, N)`; projected ones leave nothing on padded keys."""
    weights = hidden @ proj.mT
    if projection != "output":
        return weights
    if padding is not None:
        weights = weights.masked_fill(padding[:, None, None, :], -math.inf)
    return simplex_projection(weights)


def _over_rows(function: Callable[[Tensor], Tensor], rows: Tensor, *, random: bool = False) -> Tensor:
    """`function` of one tile of rows after the other; backward computes each tile again, so that none is kept."""
    recompute = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()  # which torch.func refuses

    def run(tile: Tensor) -> Tensor:
        out: Tensor = checkpoint(function, tile, use_reentrant=False, preserve_rng_state=random) if recompute else function(tile)
        return out

    return torch.cat([run(tile) for tile in torch.split(rows, _ROWS, dim=-2)], dim=-2)


def _check_options(base: str | None, projection: str) -> None:
    if base is not None:
        checks.choice("base", base, _BASES)
    checks.choice("projection", projection, ("none", "hidden", "output"))


def _check_operator(coef: Tensor, proj: Tensor, heads: int, tokens: int | None) -> int:
    """Check the parameters of an operator on `heads` heads; the number of tokens that they serve."""
    checks.shape("coef", checks.floating("coef", coef), (heads, None, tokens, None))
    checks.shape("proj", checks.floating("proj", proj), (heads, coef.shape[2], coef.shape[1]))
    return coef.shape[2]

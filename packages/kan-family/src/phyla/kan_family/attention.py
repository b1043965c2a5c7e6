"""Kolmogorov-Arnold attention (KArAt): rows of scores go through a learnable KAN layer instead of a softmax.

The full operator would hold `N^2` functions a head; it is factored into a KAN layer from `N` scores to `rank` hidden units and a linear map
back to `N` weights. Used in every block with its own parameters it is the papers' blockwise mode; one `AttentionOperator` given to several
`KANAttention` layers is the universal mode.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyla.kan_family.bases import Basis, Fourier
from phyla.kan_family.functional.attention import Projection, learned_attention, learned_attention_weights
from phyla.shared import checks

_DEFAULT = Fourier(3)


class AttentionOperator(nn.Module):
    """A learnable map from rows of `num_tokens` scores to rows of attention weights, one for each head.

    The start keeps the variance of the values: `coef ~ N(0, 1 / (N m2))` with `m2` the second moment of the basis on a standard normal
    score, `proj ~ N(0, 1 / (N rank))`. Padded keys let it serve shorter sequences.

    Args:
        num_heads: Heads, each with its own functions.
        num_tokens: Length `N` of a row of scores.
        rank: Hidden units `r` between scores and weights.
        basis: Functions of one score, a `Basis` or its name. Bases with parameters for each input have one row for each key position.
        base: Fixed function added to every hidden unit for every key: "silu", "gelu", "identity" or None.
        projection: "none"; "hidden" or "output" project hidden units or weights onto the probability simplex.

    Attributes:
        coef: `(num_heads, rank, num_tokens, K)`.
        proj: `(num_heads, num_tokens, rank)`.
        basis: The built basis.

    Raises:
        TypeError: If a size is no int, or the basis none.
        ValueError: If a size is not positive, or an option unknown.

    Source: "Kolmogorov-Arnold Attention", section 3 (Fourier-KArAt; defaults of its tables). The two further scale matrices of the paper's
    parameter counts are left out: `coef` and `proj` absorb them.
    """

    def __init__(
        self,
        num_heads: int,
        num_tokens: int,
        *,
        rank: int = 12,
        basis: Basis | str = _DEFAULT,
        base: str | None = None,
        projection: Projection = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = checks.positive_int("num_heads", num_heads)
        self.num_tokens = checks.positive_int("num_tokens", num_tokens)
        self.rank = checks.positive_int("rank", rank)
        self.base = None if base is None else checks.choice("base", base, ("silu", "gelu", "identity"))
        checks.choice("projection", projection, ("none", "hidden", "output"))
        self.projection = projection
        self.basis = Basis.parse(basis).build(num_tokens, device=device, dtype=dtype)
        self.coef = nn.Parameter(torch.empty(num_heads, rank, num_tokens, self.basis.num_basis, device=device, dtype=dtype))
        self.proj = nn.Parameter(torch.empty(num_heads, num_tokens, rank, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `coef`, then `proj`, so that the output of a head starts with the variance of its values."""
        nn.init.normal_(self.coef, std=(self.num_tokens * self.basis.spec.mean_square()) ** -0.5)
        nn.init.normal_(self.proj, std=(self.num_tokens * self.rank) ** -0.5)

    def forward(self, scores: Tensor) -> Tensor:
        """The attention weights of scores, both `(B, num_heads, n, num_tokens)`; for inspection."""
        if scores.ndim == 4:
            self._check_tokens("scores", scores.shape[-1])
        return learned_attention_weights(scores, self.coef, self.proj, basis=self.basis, base=self.base, projection=self.projection)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, key_padding_mask: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Attention output for queries, keys and values; the weights are not formed unless `projection="output"` or dropout need them.

        Args:
            q: `(B, num_heads, n, d)`.
            k: `(B, num_heads, num_tokens, d)`.
            v: `(B, num_heads, num_tokens, width)`.
            scale: Factor of the scores, `1 / sqrt(d)` by default.
            key_padding_mask: `(B, num_tokens)`, True for keys to leave out.
            dropout: Probability of dropping a weight; applied in training and evaluation alike, as `scaled_dot_product_attention` does.

        Returns:
            Tensor `(B, num_heads, n, width)`.

        Raises:
            ValueError: If shapes disagree, with the number of tokens expected and given.
        """
        if k.ndim == 4:
            self._check_tokens("k", k.shape[-2])
        return learned_attention(
            q,
            k,
            v,
            self.coef,
            self.proj,
            basis=self.basis,
            base=self.base,
            projection=self.projection,
            scale=scale,
            key_padding_mask=key_padding_mask,
            dropout=dropout,
        )

    def _check_tokens(self, name: str, given: int) -> None:
        if given != self.num_tokens:
            raise ValueError(f"{name}: expected {self.num_tokens} tokens, got {given} (pad shorter sequences and pass key_padding_mask)")

    def extra_repr(self) -> str:
        """Sizes and options."""
        sizes = f"num_heads={self.num_heads}, num_tokens={self.num_tokens}, rank={self.rank}"
        return f"{sizes}, base={self.base!r}, projection={self.projection!r}"


class KANAttention(nn.Module):
    """Multi-head self-attention with learnable weights; takes the place of a vision transformer's softmax attention.

    Args:
        dim: Width of a token.
        num_heads: Heads; must divide `dim`.
        num_tokens: Sequence length; needed unless `operator` is given.
        rank: As in `AttentionOperator`, like `basis`, `base` and `projection`; not used if `operator` is given.
        basis: Functions of one score.
        base: Fixed function of a score.
        projection: Where to project onto the simplex.
        operator: An operator on `num_heads - softmax_heads` heads to use, for instance one shared by all layers (universal mode).
        softmax_heads: So many of the first heads keep softmax attention (the hybrid of the paper).
        qkv_bias: Whether the map to queries, keys and values has a bias.
        attn_dropout: Dropout of attention weights in training.
        proj_dropout: Dropout of the output in training.

    Attributes:
        qkv: Linear map to queries, keys and values, in that order, heads inside.
        proj: Linear map of the heads' outputs.
        operator: The learnable attention.

    Raises:
        TypeError: If a size is no int, or `operator` no `AttentionOperator`.
        ValueError: If sizes disagree.

    Source: "Kolmogorov-Arnold Attention", sections 3 and 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int | None = None,
        *,
        rank: int = 12,
        basis: Basis | str = _DEFAULT,
        base: str | None = None,
        projection: Projection = "none",
        operator: AttentionOperator | None = None,
        softmax_heads: int = 0,
        qkv_bias: bool = True,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = checks.positive_int("dim", dim)
        self.num_heads = checks.positive_int("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim, got num_heads={num_heads}, dim={dim}")
        if softmax_heads not in range(num_heads):
            raise ValueError(f"softmax_heads: expected an int from 0 to {num_heads - 1}, got {softmax_heads!r}")
        self.softmax_heads = softmax_heads
        self.attn_dropout = checks.in_range("attn_dropout", attn_dropout, 0.0, 1.0)
        learned = num_heads - softmax_heads
        if operator is None:
            if num_tokens is None:
                raise ValueError("num_tokens: expected a positive int where no operator is given, got None")
            operator = AttentionOperator(
                learned, num_tokens, rank=rank, basis=basis, base=base, projection=projection, device=device, dtype=dtype
            )
        elif not isinstance(operator, AttentionOperator):
            raise TypeError(f"operator: expected an AttentionOperator, got {type(operator).__name__}")
        elif operator.num_heads != learned or num_tokens not in (None, operator.num_tokens):
            tokens = operator.num_tokens if num_tokens is None else num_tokens
            raise ValueError(
                f"operator: expected {learned} heads and {tokens} tokens, got {operator.num_heads} heads and {operator.num_tokens} tokens"
            )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.operator = operator
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the two linear maps: Xavier-uniform for each of the maps to q, k, v and for `proj`. The operator is left as it is."""
        bound = (3 / self.dim) ** 0.5
        nn.init.uniform_(self.qkv.weight, -bound, bound)
        nn.init.xavier_uniform_(self.proj.weight)
        for layer in (self.qkv, self.proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            x: `(B, N, dim)`.
            key_padding_mask: `(B, N)`, True for tokens that no other token shall see.

        Returns:
            Tensor `(B, N, dim)`.

        Raises:
            ValueError: If the width or the number of tokens is another.
        """
        q, k, v = self._heads(x)
        s = self.softmax_heads
        dropout = self.attn_dropout if self.training else 0.0
        out = self.operator.attend(q[:, s:], k[:, s:], v[:, s:], key_padding_mask=key_padding_mask, dropout=dropout)
        if s:
            seen = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
            out = torch.cat([F.scaled_dot_product_attention(q[:, :s], k[:, :s], v[:, :s], attn_mask=seen, dropout_p=dropout), out], dim=1)
        result: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return result

    def attention_weights(self, x: Tensor) -> Tensor:
        """The weights of all heads, `(B, num_heads, N, N)`, for plots; those of learnable heads may be negative."""
        q, k, _ = self._heads(x)
        scores = q @ k.mT * (self.dim // self.num_heads) ** -0.5
        s = self.softmax_heads
        return torch.cat([scores[:, :s].softmax(-1), self.operator(scores[:, s:])], dim=1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens, each `(B, num_heads, N, dim / num_heads)`."""
        checks.shape("x", x, (None, self.operator.num_tokens, self.dim))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"dim={self.dim}, num_heads={self.num_heads}, softmax_heads={self.softmax_heads}, attn_dropout={self.attn_dropout}"

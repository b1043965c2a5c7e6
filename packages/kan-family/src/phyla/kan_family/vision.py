"""Vision transformers with group-rational KAN layers in place of MLPs (KAT) and, if wanted, learnable attention (KArAt).

Names and layout of parameters are those of timm's vision transformer, so that pretrained weights can be converted (`convert`).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyla.kan_family.attention import AttentionOperator, KANAttention
from phyla.kan_family.bases import Basis, BasisFunction, Fourier
from phyla.kan_family.functional.attention import Projection
from phyla.kan_family.rational import GRKAN, Function, GroupRational
from phyla.shared import checks

_DEFAULT_BASIS = Fourier(3)


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention, `(B, N, dim)` to `(B, N, dim)`; `qkv` packs queries, keys and values in that order, heads inside.

    torch's fused attention has neither forward-mode nor second derivatives on the CPU; for these, call it within
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("dim", dim)
        self.num_heads = checks.positive_int("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"num_heads: must divide dim, got num_heads={num_heads}, dim={dim}")
        self.attn_dropout = checks.in_range("attn_dropout", attn_dropout, 0.0, 1.0)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(checks.in_range("proj_dropout", proj_dropout, 0.0, 1.0))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform start of the separate q, k, v maps and of `proj`; zero biases."""
        for part in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.xavier_uniform_(self.proj.weight)
        _zero_biases(self.qkv, self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens of `x (B, N, dim)`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_dropout if self.training else 0.0)
        out: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return out


class MLP(nn.Module):
    """The transformer's usual two-layer perceptron with GELU, the baseline that GR-KAN replaces."""

    def __init__(
        self, dim: int, hidden: int, *, dropout: float = 0.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(checks.in_range("dropout", dropout, 0.0, 1.0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.xavier_uniform_(self.fc2.weight)
        _zero_biases(self.fc1, self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to `(..., dim)`."""
        y: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return y


class DropPath(nn.Module):
    """Drop a residual branch of whole samples with probability `p` in training, scaling the others by `1 / (1 - p)`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = checks.in_range("drop_path", p, 0.0, 1.0, high_open=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, some samples of it zero."""
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(1.0 - self.p)
        return x * keep / (1.0 - self.p)

    def extra_repr(self) -> str:
        """The probability, for printing."""
        return f"p={self.p}"


class KATBlock(nn.Module):
    """Transformer block `x + attn(norm1(x))`, then `x + mlp(norm2(x))`, with a group-rational KAN as the `mlp`.

    Args:
        dim: Channels of a token.
        num_heads: Attention heads.
        mlp_ratio: Hidden size over `dim`.
        qkv_bias: Whether the query, key and value maps have a bias.
        mlp: `"grkan"`, or `"mlp"` for the usual perceptron.
        attention: Module from `(B, N, dim)` to `(B, N, dim)`; softmax attention if None. The options `qkv_bias` and `attn_dropout` belong
            to the softmax attention.
        num_groups: Groups of the rational activations.
        init: Activation that the second rational starts as.
        dropout: Dropout in the MLP and after the attention's projection.
        attn_dropout: Dropout of attention weights.
        drop_path: Probability of dropping a residual branch of a sample.

    Source: "Kolmogorov-Arnold Transformer", section 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mlp: Literal["grkan", "mlp"] = "grkan",
        attention: nn.Module | None = None,
        num_groups: int = 8,
        init: str | Function = "silu",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("dim", dim)
        hidden = int(dim * checks.in_range("mlp_ratio", mlp_ratio, 0.0, low_open=True))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.attn = attention or SoftmaxAttention(
            dim, num_heads, qkv_bias=qkv_bias, attn_dropout=attn_dropout, proj_dropout=dropout, device=device, dtype=dtype
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.mlp: nn.Module
        if checks.choice("mlp", mlp, ("grkan", "mlp")) == "grkan":
            self.mlp = GRKAN(dim, hidden, num_groups=num_groups, init=init, dropout=dropout, device=device, dtype=dtype)
        else:
            self.mlp = MLP(dim, hidden, dropout=dropout, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `(B, N, dim)` to `(B, N, dim)`."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


class PatchEmbed(nn.Module):
    """Cut an image into square patches and map each linearly: `(B, C, H, W)` to `(B, N, D)`, rows of patches first."""

    def __init__(
        self,
        patch_size: int,
        in_channels: int,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches of `x (B, C, H, W)`."""
        y: Tensor = self.proj(x)
        return y.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Vision transformer whose MLPs and attention may be Kolmogorov-Arnold layers: KAT (`mlp="grkan"`), KArAt (`attention="kan-..."`).

    Args:
        img_size: Side of the square image in pixels.
        patch_size: Side of a patch; must divide `img_size`.
        in_channels: Channels of the image.
        num_classes: Number of logits.
        embed_dim: Channels of a token.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden size of the MLP over `embed_dim`.
        qkv_bias: Whether the query, key and value maps have a bias.
        mlp: `"grkan"` or `"mlp"`.
        attention: `"softmax"`, `"kan-blockwise"` (a learnable operator for each block) or `"kan-universal"` (one operator for all).
        num_groups: Groups of the rational activations.
        init: Activation that the second rational of a GR-KAN starts as.
        basis: Basis of the learnable attention, like `base`, `rank` and `projection` an option of `KANAttention`.
        base: See `basis`.
        rank: See `basis`.
        projection: See `basis`.
        weight_init: `"xavier"`, or `"mimetic"` for attention maps with the structure of trained ones.
        pool: Logits from the class token (`"token"`) or from the mean of the patch tokens (`"avg"`).
        dropout: Dropout after the position embedding, in the MLPs and after attention projections.
        attn_dropout: Dropout of attention weights.
        drop_path: Drop-path probability of the last block; it grows linearly from zero at the first.

    Shape:
        `(B, in_channels, img_size, img_size)` to `(B, num_classes)`.

    Source: "Kolmogorov-Arnold Transformer", section 5; "Kolmogorov-Arnold Attention", section 3.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mlp: Literal["grkan", "mlp"] = "grkan",
        attention: Literal["softmax", "kan-blockwise", "kan-universal"] = "softmax",
        num_groups: int = 8,
        init: str | Function = "silu",
        basis: Basis | str = _DEFAULT_BASIS,
        base: str | None = None,
        rank: int = 12,
        projection: Projection = "none",
        weight_init: Literal["xavier", "mimetic"] = "xavier",
        pool: Literal["token", "avg"] = "token",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
        }
        for name, value in sizes.items():
            checks.positive_int(name, value)
        if img_size % patch_size:
            raise ValueError(f"patch_size: must divide img_size, got patch_size={patch_size}, img_size={img_size}")
        checks.choice("attention", attention, ("softmax", "kan-blockwise", "kan-universal"))
        checks.choice("weight_init", weight_init, ("xavier", "mimetic"))
        checks.choice("pool", pool, ("token", "avg"))
        self.image_shape = (in_channels, img_size, img_size)
        self.pool, self.weight_init = pool, weight_init
        num_tokens = (img_size // patch_size) ** 2 + 1
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim, **factory)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim, **factory))
        self.pos_drop = nn.Dropout(checks.in_range("dropout", dropout, 0.0, 1.0))
        operator_options: dict[str, Any] = {"rank": rank, "basis": basis, "base": base, "projection": projection, **factory}
        shared = AttentionOperator(num_heads, num_tokens, **operator_options) if attention == "kan-universal" else None

        def attend() -> nn.Module | None:
            if attention == "softmax":
                return None
            options: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_dropout": attn_dropout, "proj_dropout": dropout}
            return KANAttention(embed_dim, num_heads, num_tokens, operator=shared, **options, **operator_options)

        self.blocks = nn.ModuleList(
            KATBlock(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                mlp=mlp,
                attention=attend(),
                num_groups=num_groups,
                init=init,
                dropout=dropout,
                attn_dropout=attn_dropout,
                drop_path=drop_path * i / max(depth - 1, 1),
                **factory,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **factory)
        self.head = nn.Linear(embed_dim, num_classes, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start of the embeddings and the head, and of all attention maps if `weight_init="mimetic"`; blocks start themselves."""
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        _zero_biases(self.head, self.patch_embed.proj)
        if self.weight_init == "mimetic":
            for module in self.modules():
                if isinstance(module, SoftmaxAttention | KANAttention):
                    mimetic_(module.qkv.weight, module.proj.weight, module.num_heads)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens `(B, N + 1, D)` of an image `(B, C, H, W)`, the class token first."""
        checks.shape("x", x, (None, *self.image_shape))
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], dim=1)
        tokens = self.pos_drop(tokens + self.pos_embed)
        for block in self.blocks:
            tokens = block(tokens)
        y: Tensor = self.norm(tokens)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, C, H, W)`."""
        tokens = self.forward_features(x)
        logits: Tensor = self.head(tokens[:, 0] if self.pool == "token" else tokens[:, 1:].mean(dim=1))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should skip.

        They are the embeddings, biases, norms, and the coefficients of learned functions: rational numerators and denominators
        (two-dimensional, so that rules by shape would decay them) and the parameters of bases.
        """
        names = {"cls_token", "pos_embed"}
        for prefix, module in self.named_modules(remove_duplicate=False):
            whole = isinstance(module, GroupRational | BasisFunction | nn.LayerNorm)
            for name, _ in module.named_parameters(recurse=False):
                if whole or name == "bias":
                    names.add(f"{prefix}.{name}" if prefix else name)
        return names


@torch.no_grad()
def mimetic_(qkv: Tensor, proj: Tensor, num_heads: int) -> None:
    """Overwrite attention weights by factors of `0.7 Z + 0.7 I` (queries and keys, each head) and `0.4 Z - 0.4 I` (values and projection).

    Args:
        qkv: `(3 D, D)`, rows of queries, keys, values.
        proj: `(D, D)`.
        num_heads: Number of heads.

    Source: "Mimetic initialization of self-attention layers", Trockman and Kolter 2023, section 4.
    """
    D = proj.shape[0]
    q, k, v = qkv.chunk(3)
    width = D // num_heads
    for head in range(num_heads):
        left, right = _factors(0.7, 0.7, proj)
        q[head * width : (head + 1) * width] = left[:, :width].T
        k[head * width : (head + 1) * width] = right[:width]
    left, right = _factors(0.4, -0.4, proj)
    v.copy_(left.T)  # rows of tokens go through v.T, then proj.T: their product is left @ right
    proj.copy_(right.T)


def _factors(noise: float, diagonal: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """`L = U sqrt(S)` and `R = sqrt(S) V` of the singular value decomposition of `noise Z + diagonal I`."""
    D = like.shape[0]
    z = torch.empty_like(like).uniform_(-((3.0 / D) ** 0.5), (3.0 / D) ** 0.5)
    u, s, vh = torch.linalg.svd(noise * z + diagonal * torch.eye(D, device=like.device, dtype=like.dtype))
    return u * s.sqrt(), s.sqrt()[:, None] * vh


def _zero_biases(*layers: nn.Linear | nn.Conv2d) -> None:
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def kat_tiny(**options: Any) -> VisionTransformer:
    """KAT-Tiny: 192 channels, 12 blocks, 3 heads; 5,718,328 parameters. `options` are those of `VisionTransformer`."""
    return VisionTransformer(**{"embed_dim": 192, "depth": 12, "num_heads": 3, **options})


def kat_small(**options: Any) -> VisionTransformer:
    """KAT-Small: 384 channels, 12 blocks, 6 heads. `options` are those of `VisionTransformer`."""
    return VisionTransformer(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **options})


def kat_base(**options: Any) -> VisionTransformer:
    """KAT-Base: 768 channels, 12 blocks, 12 heads. `options` are those of `VisionTransformer`."""
    return VisionTransformer(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **options})

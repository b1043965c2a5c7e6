"""AF-KAN: activation pairs on shared intervals, reduced to one number per input before an ordinary weight matrix."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyla.kan_family.bases import ActivationPair
from phyla.kan_family.functional.afkan import afkan_global, afkan_multistep, afkan_spatial, afkan_sums
from phyla.kan_family.functional.basis import activate
from phyla.shared import checks

__all__ = ["AFKAN", "AFKANLinear"]

_PUBLISHED_BEST = ActivationPair(grid_size=3, order=3, activation="silu", combine="quad1")

Reduction = Literal["global", "spatial", "multistep"]


class AFKANLinear(nn.Module):
    """``y = W s(norm(z))`` where ``z_i`` reduces the activation-pair features of input ``i`` to one number.

    The features ``f (..., I, M)`` of all inputs share their M intervals; they are normalised by the minimum and maximum over the whole
    batch. In evaluation running values take their place (of the authors' layer the prediction for a sample depends on its batch), so
    that a sample predicts the same alone and in a batch. Before the first training step the running values are 0 and 1.

    Args:
        in_features: I.
        out_features: O.
        basis: the intervals, the activation ``s`` and how the two halves of a feature combine.
        reduction: "global" attends over the inputs, "spatial" over the features of an input with a 3-tap filter along the inputs,
            "multistep" is a linear map of the features.
        norm: acts on ``z``; "batch" flattens all leading dimensions and needs, in training, more than one row.
        feature_norm: "running" as said, "batch" takes the minimum and maximum of the batch in evaluation too, None leaves the features.
        momentum: weight of a new batch in the running values; the first batch is copied.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        basis: with ``low`` and ``high (M,)``.
        weight: (O, I).
        score: ``nn.Linear(M, 1)``, for "spatial" a depth-wise ``nn.Conv1d`` of M channels.
        temperature: (), divides the scores, clamped below at 1; None for "multistep". FSDP2 shards no 0-d parameter: name it in
            ``ignored_params``.
        norm: LayerNorm, BatchNorm1d or None.
        running_low: (), buffer, the features' running minimum.
        running_high: (), buffer, their running maximum.
        num_batches: (), buffer, how many batches the running values have seen.

    Shape: (..., I) to (..., O), any leading dimensions, none and empty ones too.

    Raises:
        TypeError, ValueError: if an argument is not one of those above, or the last dimension of an input is not I.

    Source: "AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks", section 3.
    """

    temperature: nn.Parameter | None
    norm: nn.LayerNorm | nn.BatchNorm1d | None
    running_low: Tensor
    running_high: Tensor
    num_batches: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        basis: ActivationPair = _PUBLISHED_BEST,
        reduction: Reduction = "global",
        norm: Literal["layer", "batch"] | None = "layer",
        feature_norm: Literal["running", "batch"] | None = "running",
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(basis, ActivationPair):
            raise TypeError(f"basis: expected an ActivationPair, got {basis!r}")
        self.in_features = checks.positive_int("in_features", in_features)
        self.out_features = checks.positive_int("out_features", out_features)
        self.reduction = checks.choice("reduction", reduction, ("global", "spatial", "multistep"))
        self.feature_norm = feature_norm if feature_norm is None else checks.choice("feature_norm", feature_norm, ("running", "batch"))
        self.momentum = checks.in_range("momentum", momentum, 0.0, 1.0)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        size = basis.num_basis
        self.spec = basis
        self.basis = basis.build(self.in_features, **factory)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **factory))
        self.score: nn.Linear | nn.Conv1d
        if reduction == "spatial":
            self.score = nn.Conv1d(size, size, 3, padding=1, groups=size, **factory)
        else:
            self.score = nn.Linear(size, 1, **factory)
        self.register_parameter("temperature", None if reduction == "multistep" else nn.Parameter(torch.empty((), **factory)))
        if norm is None:
            self.norm = None
        elif checks.choice("norm", norm, ("layer", "batch")) == "layer":
            self.norm = nn.LayerNorm(self.in_features, **factory)
        else:
            self.norm = nn.BatchNorm1d(self.in_features, **factory)
        if feature_norm == "running":
            self.register_buffer("running_low", torch.empty((), **factory))
            self.register_buffer("running_high", torch.empty((), **factory))
            self.register_buffer("num_batches", torch.empty((), device=device, dtype=torch.long))
        self._reset_own()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, start the running values again."""
        for module in (self.basis, self.score, self.norm):
            if module is not None:
                module.reset_parameters()
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.temperature is not None:
            nn.init.constant_(self.temperature, math.sqrt(self.in_features))
        if self.feature_norm == "running":
            self.running_low.zero_()
            self.running_high.fill_(1.0)
            self.num_batches.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        checks.last_dim("x", checks.floating("x", x), self.in_features)
        z = self._reduce(x).to(x.dtype)
        if self.norm is not None:
            z = self.norm(z.reshape(-1, self.in_features)).reshape(x.shape)
        return F.linear(activate(z, self.spec.activation), self.weight)

    def _reduce(self, x: Tensor) -> Tensor:
        """``z (..., I)``, in float32 or float64: the extremes of low-precision features would blur the normalisation."""
        work = torch.promote_types(x.dtype, torch.float32)
        x = x.to(work)
        low, high, weight, bias = (t.to(work) for t in (*self.basis.tensors(), *self.score.parameters()))
        if self.reduction != "spatial":
            weight = weight.flatten()
            sums = afkan_sums(x, low, high, weight, activation=self.spec.activation, combine=self.spec.combine)
            bounds = self._bounds(x, sums.smallest, sums.largest)
            if self.temperature is None:
                return afkan_multistep(sums, weight, bias, *bounds)
            return afkan_global(sums, weight, bias, self.temperature.to(work), *bounds)
        if self.feature_norm == "batch" or (self.feature_norm == "running" and self.training):
            sums = afkan_sums(x, low, high, torch.zeros_like(low), activation=self.spec.activation, combine=self.spec.combine)
            bounds = self._bounds(x, sums.smallest, sums.largest)
        else:
            bounds = self._bounds(x, x, x)
        assert self.temperature is not None
        temperature = self.temperature.to(work)
        return afkan_spatial(x, low, high, weight, bias, temperature, *bounds, activation=self.spec.activation, combine=self.spec.combine)

    def _bounds(self, x: Tensor, smallest: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """The features that normalise to 0 and to 1."""
        if self.feature_norm is None:
            return x.new_zeros(()), x.new_ones(())
        if self.feature_norm == "running":
            if not self.training:
                return self.running_low.to(x.dtype), self.running_high.to(x.dtype)
            if x.numel() > 0:
                self._track(smallest.detach(), largest.detach())
        return smallest, largest

    def _track(self, smallest: Tensor, largest: Tensor) -> None:
        share = torch.where(self.num_batches == 0, 1.0, self.momentum).to(self.running_low.dtype)
        self.running_low.lerp_(smallest.to(share.dtype), share)
        self.running_high.lerp_(largest.to(share.dtype), share)
        self.num_batches.add_(1)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, reduction={self.reduction!r},"
            f" feature_norm={self.feature_norm!r}, momentum={self.momentum}"
        )


class AFKAN(nn.Module):
    """A stack of :class:`AFKANLinear`, every layer with the same options.

    Args:
        widths: the sizes, from inputs to outputs: at least two.
        **layer_options: those of :class:`AFKANLinear`.

    Attributes:
        layers: ModuleList.

    Raises:
        ValueError: if there are fewer than two widths.

    Source: "AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks".
    """

    def __init__(self, widths: Sequence[int], **layer_options: Any) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected at least two sizes, got {tuple(widths)}")
        self.layers = nn.ModuleList(AFKANLinear(i, o, **layer_options) for i, o in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., widths[0]) to (..., widths[-1])."""
        for layer in self.layers:
            x = layer(x)
        return x

"""S-KAN: every node has a pool of Kolmogorov-Arnold branches with different bases, and learns which one it uses.

Legend: P bases in the pool, O nodes (output features or channels), u_p the output of branch p.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyla.kan_family.bases import RBF, Basis, BSpline, Chebyshev, Device, Fourier, Wavelet
from phyla.kan_family.conv import KANConv2d, Size
from phyla.kan_family.linear import Base, KANLinear, Norm
from phyla.shared import checks

__all__ = ["SelectKAN", "SelectKANConv2d", "SelectKANLinear"]

_POOL = (BSpline(), RBF(), Chebyshev(), Fourier(), Wavelet())


class _Select(nn.Module):
    """What the two forms share: the pool, the mixing of its outputs, the stages."""

    trailing: ClassVar[int]  # dimensions of an output after that of the nodes
    select_logits: nn.Parameter | None
    pruned_selection: Tensor | None
    order: Tensor

    def __init__(self, nodes: int, groups: int, bases: Sequence[Basis | str], device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        if isinstance(bases, str | Basis) or len(bases) == 0:
            raise ValueError(f"bases: expected a sequence of at least one basis, got {bases!r}")
        self.bases = tuple(Basis.parse(basis) for basis in bases)
        self.nodes, self.groups = nodes, groups
        self.temperature = 1.0
        self.stage = "full"
        self.branches = nn.ModuleList()
        self.select_logits = nn.Parameter(torch.zeros(nodes, len(self.bases), device=device, dtype=dtype))
        self.register_buffer("pruned_selection", None)

    def reset_parameters(self) -> None:
        """Draw the branches anew and set the logits to zero; the stage stays."""
        for branch in self.branches:
            branch.reset_parameters()  # type: ignore[operator]
        if self.select_logits is not None:
            nn.init.zeros_(self.select_logits)

    @property
    def selection(self) -> Tensor:
        """The index in the pool of the basis that a node chooses, (O,)."""
        if self.pruned_selection is not None:
            return self.pruned_selection
        assert self.select_logits is not None
        return self.select_logits.argmax(1)

    def mixing_weights(self) -> Tensor:
        """The weights of the branches, (O, P).

        ``softmax(logits / temperature)``; in the stage "select" the choice with the gradient of the softmax; after pruning the choice.
        """
        chosen = F.one_hot(self.selection, len(self.bases))
        if self.select_logits is None:
            return chosen.to(next(self.parameters()).dtype)
        soft = torch.softmax(self.select_logits / self.temperature, 1)
        return soft if self.stage == "full" else chosen + (soft - soft.detach())

    def set_stage(self, stage: Literal["full", "select"]) -> None:
        """Mix all branches ("full"), or use the chosen branch of every node ("select").

        Raises:
            ValueError: if the layer is pruned.
        """
        if self.pruned_selection is not None:
            raise ValueError("stage: layer is pruned")
        self.stage = checks.choice("stage", stage, ("full", "select"))

    @torch.no_grad()
    def prune_bases(self) -> None:
        """Keep the chosen branch of every node alone, in place; a second time does nothing.

        Parameters are replaced: build optimizers anew. ``branches`` then holds the used bases in the order of the pool, each with its own
        nodes alone (with groups, each group of a branch keeps as many as the fullest).
        """
        if self.pruned_selection is None:
            self._prune(self.selection)

    def _prune(self, selection: Tensor) -> None:
        choice: list[int] = selection.tolist()
        places: dict[int, int] = {}
        kept = nn.ModuleList()
        stored = 0
        for index in sorted(set(choice)):
            rows = self._rows([node for node, chosen in enumerate(choice) if chosen == index])
            places.update((node, stored + row) for row, node in enumerate(rows) if choice[node] == index)
            stored += len(rows)
            _keep(self.branches[index], rows)
            kept.append(self.branches[index])
        device = selection.device
        self.branches = kept
        self.select_logits = None
        self.pruned_selection = selection.detach().clone()
        self.register_buffer("order", torch.tensor([places[node] for node in range(self.nodes)], device=device), persistent=False)
        self.stage = "pruned"

    def _rows(self, nodes: list[int]) -> list[int]:
        """``nodes``, filled up with others so that all groups have equally many."""
        size = self.nodes // self.groups
        by_group = [[node for node in nodes if node // size == group] for group in range(self.groups)]
        most = max(len(members) for members in by_group)
        for group, members in enumerate(by_group):
            others = (node for node in range(group * size, (group + 1) * size) if node not in nodes)
            members.extend(itertools.islice(others, most - len(members)))
        return [node for members in by_group for node in members]

    def forward(self, x: Tensor) -> Tensor:
        """The mixed or chosen outputs of the branches."""
        if self.pruned_selection is not None:
            outputs: list[Tensor] = [branch(x) for branch in self.branches]
            return torch.cat(outputs, -1 - self.trailing).index_select(-1 - self.trailing, self.order)
        assert self.select_logits is not None
        learning = torch.is_grad_enabled() and self.select_logits.requires_grad
        if self.stage == "full" or learning or torch.compiler.is_compiling():
            # In "select" the unused branches have weight 0, but the gradient of their logits is their output.
            weights = self.mixing_weights().reshape(self.nodes, len(self.bases), *[1] * self.trailing)
            pairs = zip(weights.unbind(1), (branch(x) for branch in self.branches), strict=True)
            terms = (weight.to(u.dtype) * u for weight, u in pairs)
            mixed: Tensor = functools.reduce(torch.add, terms)
            return mixed
        selection = self.selection
        used = sorted(set(selection.tolist()))
        y: Tensor = self.branches[used[0]](x)
        for index in used[1:]:
            y = torch.where((selection == index).reshape(-1, *[1] * self.trailing), self.branches[index](x), y)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}pruned_selection")
        if given is None and self.pruned_selection is not None and f"{prefix}select_logits" in state_dict:
            raise ValueError(f"state_dict: expected that of a pruned layer at {prefix!r}, got one with all branches")
        if given is not None:
            checks.shape(f"{prefix}pruned_selection", given, (self.nodes,))
            if given.dtype != torch.long or not 0 <= int(given.min()) <= int(given.max()) < len(self.bases):
                raise ValueError(f"{prefix}pruned_selection: expected indices below {len(self.bases)}, got {given}")
            if self.pruned_selection is None:
                assert self.select_logits is not None
                self._prune(given.to(self.select_logits.device))
            elif given.tolist() != self.pruned_selection.tolist():
                raise ValueError(
                    f"{prefix}pruned_selection: expected that of this layer, {self.pruned_selection.tolist()}, got {given.tolist()}"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The stage."""
        return f"nodes={self.nodes}, stage={self.stage!r}, temperature={self.temperature}"


@torch.no_grad()
def _keep(branch: nn.Module, rows: list[int]) -> None:
    """Cut a KANLinear or KANConv2d down to some of its outputs."""
    for name in ("coef", "base_weight", "bias"):
        weight = getattr(branch, name)
        if weight is not None:
            setattr(branch, name, nn.Parameter(weight[rows].clone(), requires_grad=weight.requires_grad))
    if isinstance(branch, KANLinear):
        branch.out_features = len(rows)
        branch.edge_mask = None if branch.edge_mask is None else branch.edge_mask[rows]
    elif isinstance(branch, KANConv2d):
        branch.out_channels = len(rows)


class SelectKANLinear(_Select):
    """A linear layer whose nodes choose among Kolmogorov-Arnold branches with different bases.

    With ``pi_o = softmax(logits_o / temperature)`` the stages are: "full", ``y_o = sum_p pi_op u_po``; "select", the branch of the largest
    logit, the logits still learning by the straight-through gradient; and, after :meth:`prune_bases`, that branch alone, at the cost of one
    KANLinear. A schedule of 50 % / 30 % / 20 % of the steps works well.

    In the stage "select" a pass that needs no gradient of the logits computes the used branches only; with it all of them, since their
    outputs are that gradient.

    Args:
        in_features: I.
        out_features: O.
        bases: the pool of P bases, each a Basis or its name.
        base: the base branch of every KANLinear.
        bias: whether every KANLinear has a bias.
        norm: the normalisation of every KANLinear.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        branches: the P KANLinear; after pruning those of the used bases, with their own nodes.
        select_logits: (O, P), zero at the start; None after pruning.
        selection: (O,), the chosen index in the pool; valid in every stage.
        temperature: divides the logits; 1.0, may be set.
        stage: "full", "select" or "pruned".

    Shape: (..., I) to (..., O).

    A state dict of a pruned layer loads into a layer pruned alike, and prunes a layer that is not.

    Raises:
        TypeError, ValueError: if an argument is not one of those above.

    Source: "Activation Space Selectable Kolmogorov-Arnold Networks", abstract: full training, selective training, pruning.
    """

    trailing = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bases: Sequence[Basis | str] = _POOL,
        base: Base = "silu",
        bias: bool = True,
        norm: Norm = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(checks.positive_int("out_features", out_features), 1, bases, device, dtype)
        self.in_features, self.out_features = checks.positive_int("in_features", in_features), out_features
        options: dict[str, Any] = {"base": base, "bias": bias, "norm": norm, "device": device, "dtype": dtype}
        self.branches.extend(KANLinear(in_features, out_features, basis=basis, **options) for basis in self.bases)


class SelectKANConv2d(_Select):
    """A convolution whose output channels choose among Kolmogorov-Arnold convolutions with different bases.

    The stages are those of :class:`SelectKANLinear`, a node is an output channel.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: of the kernel.
        stride: as all further options, that of every KANConv2d.
        padding: idem.
        dilation: idem.
        groups: idem.
        bases: the pool of P bases, each a Basis or its name.
        base: idem.
        bias: idem.
        pad: idem.
        init_scale: idem.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        branches: the P KANConv2d; after pruning those of the used bases, with their own channels.
        select_logits, selection, temperature, stage: as in :class:`SelectKANLinear`.

    Shape: (N, C, H, W) to (N, O, H', W').

    Source: "Activation Space Selectable Kolmogorov-Arnold Networks", S-ConvKAN.
    """

    trailing = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bases: Sequence[Basis | str] = _POOL,
        base: Base = "silu",
        bias: bool = True,
        pad: Literal["input", "features"] = "input",
        init_scale: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(checks.positive_int("out_channels", out_channels), groups, bases, device, dtype)
        self.in_channels, self.out_channels = checks.positive_int("in_channels", in_channels), out_channels
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "base": base}
        options |= {"bias": bias, "pad": pad, "init_scale": init_scale, "device": device, "dtype": dtype}
        self.branches.extend(KANConv2d(in_channels, out_channels, kernel_size, basis=basis, **options) for basis in self.bases)


class SelectKAN(nn.Module):
    """A stack of :class:`SelectKANLinear`, every layer with the same options.

    Args:
        widths: the sizes, from inputs to outputs: at least two.
        **options: those of :class:`SelectKANLinear`.

    Attributes:
        layers: ModuleList.

    Raises:
        ValueError: if there are fewer than two widths.

    Source: "Activation Space Selectable Kolmogorov-Arnold Networks".
    """

    def __init__(self, widths: Sequence[int], **options: Any) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected at least two sizes, got {tuple(widths)}")
        self.layers = nn.ModuleList(SelectKANLinear(i, o, **options) for i, o in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., widths[0]) to (..., widths[-1])."""
        for layer in self.layers:
            x = layer(x)
        return x

    def set_stage(self, stage: Literal["full", "select"]) -> None:
        """The stage of every layer; see :meth:`SelectKANLinear.set_stage`."""
        for layer in self.layers:
            layer.set_stage(stage)  # type: ignore[operator]

    def prune_bases(self) -> None:
        """Prune every layer, in place; see :meth:`SelectKANLinear.prune_bases`."""
        for layer in self.layers:
            layer.prune_bases()  # type: ignore[operator]

"""Networks of KAN layers: sparsity penalty, attribution, pruning, grids that follow the data.

Legend: L layers, n_l nodes of layer l (n_0 inputs, n_L outputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phyla.kan_family.bases import Basis, Device
from phyla.kan_family.linear import Base, KANLinear, Norm
from phyla.kan_family.plots import network
from phyla.shared import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Attribution:
    """Importance of the nodes and edges of a KAN for its outputs, averaged over the outputs.

    Attributes:
        nodes: `nodes[l] (n_l,)`.
        edges: `edges[l] (n_{l+1}, n_l)`.
    """

    nodes: tuple[Tensor, ...]
    edges: tuple[Tensor, ...]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The network, its edges the darker the more important, into `ax` or new axes; needs matplotlib (extra `plot`)."""
        return network(ax, self.edges)


class KAN(nn.Module):
    """A stack of `KANLinear` layers.

    Args:
        widths: sizes `n_0, .., n_L`.
        basis, base, bias, norm: as in `KANLinear`.

    Shape:
        `(..., n_0)` to `(..., n_L)`.

    Attributes:
        layers: the layers.

    Source: "KAN: Kolmogorov-Arnold Networks"; "KAN 2.0: Kolmogorov-Arnold Networks Meet Science" (attribution).
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        basis: Basis | str = "bspline",
        base: Base = "silu",
        bias: bool = True,
        norm: Norm = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected at least 2 sizes, got {list(widths)}")
        self.widths = tuple(checks.positive_int(f"widths[{i}]", width) for i, width in enumerate(widths))
        self._options: dict[str, Any] = {"base": base, "bias": bias, "norm": norm}
        self.layers = nn.ModuleList(
            KANLinear(n, m, basis=basis, device=device, dtype=dtype, **self._options)
            for n, m in zip(self.widths, self.widths[1:], strict=False)
        )

    def _stack(self) -> list[KANLinear]:
        return [layer for layer in self.layers if isinstance(layer, KANLinear)]

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., n_0)` to `(..., n_L)`."""
        for layer in self.layers:
            x = layer(x)
        return x

    @torch.no_grad()
    def update_grid(self, x: Tensor, *, eps: float = 0.02, margin: float = 0.0) -> None:
        """`KANLinear.update_grid` layer by layer; each layer sees the outputs of the updated ones before it. `x (..., n_0)`."""
        for layer in self._stack():
            layer.update_grid(x, eps=eps, margin=margin)
            x = layer(x)

    def refine(self, grid_size: int) -> None:
        """`KANLinear.refine` of every layer; parameters are replaced, build optimizers anew."""
        for layer in self._stack():
            layer.refine(grid_size)

    def regularization(self, x: Tensor, *, l1: float = 1.0, entropy: float = 2.0) -> Tensor:
        """Sparsity penalty on the sizes of the edges over the samples; a differentiable scalar.

        `v_oi = std_oi / (std(x_i) + 0.1)`; each layer adds `l1 sum v + entropy (S_row + S_col)` with the mean entropies of the rows and of
        the columns of v.

        Args:
            x: samples `(..., n_0)`.
            l1: weight of the sum.
            entropy: weight of the entropies.

        Source: "KAN: Kolmogorov-Arnold Networks", section 2.5.1, in the form of pykan's `edge_forward_spline_n`.
        """
        total = x.new_zeros(())
        for layer in self._stack():
            spread = x.reshape(-1, layer.in_features).std(0)
            size = layer.edge_std(x) / (spread + 0.1)
            total = total + l1 * size.sum() + entropy * (_entropy(size) + _entropy(size.t()))
            x = layer(x)
        return total

    @torch.no_grad()
    def attribute(self, x: Tensor) -> Attribution:
        """Scores of nodes and edges, propagated back from the outputs by the standard deviations over the samples `x (..., n_0)`.

        Source: "KAN 2.0", section 4.1.
        """
        spreads, outputs = [], []
        for layer in self._stack():
            spreads.append(layer.edge_std(x))
            x = layer(x)
            outputs.append(x.reshape(-1, layer.out_features).std(0))
        node = torch.eye(self.widths[-1], dtype=x.dtype, device=x.device)  # (outputs of the network, nodes of the layer)
        nodes, edges = [node.mean(0)], []
        for spread, output in zip(reversed(spreads), reversed(outputs), strict=True):
            edge = (node / (output + 1e-4)).unsqueeze(-1) * spread
            node = edge.sum(1)
            edges.append(edge.mean(0))
            nodes.append(node.mean(0))
        return Attribution(tuple(reversed(nodes)), tuple(reversed(edges)))

    @torch.no_grad()
    def prune(self, x: Tensor, *, node_threshold: float = 1e-2, edge_threshold: float = 3e-2) -> KAN:
        """A smaller model without the hidden nodes and edges that matter little on the samples.

        Hidden nodes that score below `node_threshold` are dropped; then edges of the remaining network that score below `edge_threshold`
        are masked. With both thresholds 0 the result equals the model. A hidden layer keeps at least its best node.

        Args:
            x: samples `(..., n_0)`.
            node_threshold: for scores of nodes.
            edge_threshold: for scores of edges.

        Returns:
            A new model; this one stays as it is.
        """
        scores = self.attribute(x).nodes
        kept = [torch.arange(width, device=x.device) for width in self.widths]
        for level in range(1, len(self.widths) - 1):
            alive = torch.nonzero(scores[level] >= node_threshold).flatten()
            kept[level] = alive if len(alive) else scores[level].argmax().reshape(1)
        model = self._selected(kept)
        for layer, edge in zip(model._stack(), model.attribute(x).edges, strict=True):
            mask = (edge >= edge_threshold).to(layer.coef.dtype)
            if layer.edge_mask is not None:
                mask = mask * layer.edge_mask
            layer.edge_mask = mask if bool((mask == 0).any()) else None
        return model

    def _selected(self, kept: Sequence[Tensor]) -> KAN:
        """The network of the nodes `kept[l]`."""
        layers = self._stack()
        first = layers[0]
        model = KAN(
            [len(nodes) for nodes in kept], basis=first.basis.spec, device=first.coef.device, dtype=first.coef.dtype, **self._options
        )
        for target, source, inputs, outputs in zip(model._stack(), layers, kept, kept[1:], strict=False):
            state, inputs_before = dict(source.state_dict()), (source.in_features,)
            for name, value in state.items():
                if name in ("coef", "base_weight", "edge_mask"):
                    state[name] = value[outputs][:, inputs]
                elif name == "bias":
                    state[name] = value[outputs]
                elif value.shape[:1] == inputs_before and value.dim() == (2 if name.startswith("basis.") else 1):  # a basis shares vectors
                    state[name] = value[inputs]
            target.load_state_dict(state)
        return model.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        shapes = [state_dict[key].shape for i in range(len(self.layers)) if (key := f"{prefix}layers.{i}.coef") in state_dict]
        extra = f"{prefix}layers.{len(self.layers)}.coef" in state_dict
        widths = (*(shape[1] for shape in shapes), shapes[-1][0]) if shapes else ()
        if extra or (len(shapes) == len(self.layers) and widths != self.widths):
            raise ValueError(f"state_dict: expected a KAN with widths {self.widths}, got {widths}{' and more' if extra else ''}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _entropy(size: Tensor) -> Tensor:
    """Mean over the rows of the entropy of their shares, in bits."""
    share = size / (size.sum(1, keepdim=True) + 1)
    return -(share * torch.log2(share + 1e-4)).sum(1).mean()

"""What the results' `plot` methods share: matplotlib, imported when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(ax: Axes | None) -> Axes:
    """`ax`, or new axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'phyla-kan-family[plot]'") from error
    return pyplot.subplots()[1]


def network(ax: Axes | None, strengths: Sequence[Tensor], labels: Sequence[Sequence[Sequence[str]]] | None = None) -> Axes:
    """Draw layers from the inputs below to the outputs above, each edge the darker the stronger it is within its layer.

    Args:
        ax: where to draw; None makes new axes.
        strengths: of the edges, not negative, one `(n_{l+1}, n_l)` a layer.
        labels: `labels[l][o][i]`, written at the edge.
    """
    ax = axes(ax)
    widths = [strengths[0].shape[1], *(layer.shape[0] for layer in strengths)]
    places = [[(node + 0.5) / width for node in range(width)] for width in widths]
    for depth, layer in enumerate(strengths):
        strongest = float(layer.max())
        for o, row in enumerate(layer.tolist()):
            for i, strength in enumerate(row):
                start, end = places[depth][i], places[depth + 1][o]
                shade = strength / strongest if strongest > 0 else 0.0
                ax.plot([start, end], [depth, depth + 1], color="black", alpha=shade, linewidth=2, zorder=1)
                if labels is not None and shade > 0:
                    at = 0.35 + 0.3 * (i % 2)  # edges of neighbours cross; their labels shall not
                    middle = start + at * (end - start)
                    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                    ax.text(middle, depth + at, labels[depth][o][i], ha="center", va="center", fontsize="small", bbox=box)
    for depth, layer_places in enumerate(places):
        ax.scatter(layer_places, [depth] * len(layer_places), color="black", zorder=2)
    ax.set_xlim(0, 1)
    ax.set_xticks(places[0], [f"x{i + 1}" for i in range(widths[0])])
    ax.set_yticks(range(len(widths)), ["inputs", *(f"layer {depth + 1}" for depth in range(len(strengths)))])
    ax.spines[["top", "right", "bottom", "left"]].set_visible(False)
    ax.tick_params(length=0)
    return ax

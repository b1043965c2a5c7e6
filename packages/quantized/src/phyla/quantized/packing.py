"""From a trained binary model to its packed form."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from torch import nn

from phyla.quantized.folding import fold_modules, has_statistics
from phyla.quantized.layers import BinaryConv1d, BinaryConv2d, BinaryLayer, BinaryLinear
from phyla.quantized.models import BinaryBlock, ResNet
from phyla.quantized.packed import PackedConv1d, PackedConv2d, PackedLayer, PackedLinear, PackedMaxPool2d, binary_input, plain_sign
from phyla.quantized.packed_block import PackedBlock
from phyla.quantized.react import RSign

__all__ = ["pack", "packed_settings"]

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class _Slot(NamedTuple):
    """A place in a module tree."""

    parent: nn.Module
    key: str
    module: nn.Module

    def put(self, module: nn.Module) -> None:
        self.parent._modules[self.key] = module


def pack(model: nn.Module, *, fold: bool = True) -> nn.Module:
    """The model for inference on bits: a deep copy in eval mode whose binary layers are packed ones. Its outputs are those of the model.

    With `fold`, bits flow between layers:

    1. In an `nn.Sequential`, also across nested ones, a binary layer -> [MaxPool2d] -> BatchNorm -> [Hardtanh, Identity, Dropout, RSign]
       -> [Flatten] -> binary layer becomes a comparison of integers; the modules between the two layers become `nn.Identity`. The sums in
       [-K, K] are all tried, so that the bits are those of the float graph.
    2. The residual blocks of this package's networks (`BinaryBlock`) keep floats and their bits in channels-last order.

    Everything else stays torch's: a batch normalisation ahead of a float layer, a residual block of another make.

    Args:
        model: a model, or one binary layer. Binary layers with `input_binarizer=nn.Identity()` are stored packed and computed in floats.
        fold: whether bits flow between layers; without it each packed layer returns floats.

    Raises:
        TypeError: weights that are neither float32 nor float64.
        ValueError: weights that are not binary, as those of `BiPer` in stage 1, or a value that is not finite in a folded chain. Both
            name the layer.

    Source: *FINN*, section 4.2, for thresholds; *Larq Compute Engine* for bits that flow.
    """
    root = nn.ModuleList([copy.deepcopy(model).eval()])
    names = {module: name for name, module in root[0].named_modules()}
    edges = list(_edges(root)) if fold else []
    flattened = {edge.target: len(edge.source.weight) for edge in edges if edge.flattened}
    packed: dict[nn.Module, PackedLayer] = {}
    for layer in filter(lambda module: isinstance(module, BinaryLayer), names):
        with _naming(names[layer]):
            packed[layer] = _packed(layer, flattened.get(layer))
    for edge in edges:
        with _naming(names[edge.source]):
            edge.fold(packed[edge.source])
    for run in _runs(root) if fold else ():
        for slot in run:
            slot.put(_packed_block(slot.module, packed, last=slot is run[-1]))
    for slot in list(_slots(root)):
        if slot.module in packed:
            slot.put(packed[slot.module])
    return root.eval()[0]


def packed_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the packed parts of a model are but for their tensors, by name, in values that JSON knows."""
    parts = (PackedLayer, PackedMaxPool2d, PackedBlock)
    return {name: module.settings() for name, module in model.named_modules() if isinstance(module, parts)}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors tell the layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}" if name else str(error)) from None


def _packed(layer: nn.Module, channels: int | None) -> PackedLayer:
    if isinstance(layer, BinaryConv1d):
        return PackedConv1d(layer)
    if isinstance(layer, BinaryConv2d):
        return PackedConv2d(layer)
    if isinstance(layer, BinaryLinear):
        return PackedLinear(layer, channels=channels)
    raise TypeError(f"model: expected BinaryLinear, BinaryConv1d and BinaryConv2d layers, got {type(layer).__name__}")


def _packed_block(block: nn.Module, packed: dict[nn.Module, PackedLayer], *, last: bool) -> PackedBlock:
    assert isinstance(block, BinaryBlock)
    conv1, conv2 = packed[block.conv1], packed[block.conv2]
    assert isinstance(conv1, PackedConv2d)
    assert isinstance(conv2, PackedConv2d)
    return PackedBlock(block, conv1, conv2, last=last)


def _slots(module: nn.Module) -> Iterator[_Slot]:
    """Every place below a module, one for each way that leads to it."""
    for key, child in module._modules.items():
        if child is not None:
            yield _Slot(module, key, child)
            yield from _slots(child)


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _links(chain: nn.Module) -> Iterator[_Slot]:
    """The modules that an `nn.Sequential` runs one after the other, those of nested ones included."""
    for key, child in chain._modules.items():
        assert child is not None
        if _is_chain(child):
            yield from _links(child)
        else:
            yield _Slot(chain, key, child)


def _chains(root: nn.Module) -> Iterator[list[_Slot]]:
    """The longest chains of modules that run one after the other."""
    joined: set[nn.Module] = set()  # chains inside longer ones
    slots = list(_slots(root))
    for slot in slots:
        if isinstance(slot.module, ResNet) and type(slot.module).forward is ResNet.forward:
            joined.update(slot.module.layers)
            yield [link for layer in slot.module.layers for link in _links(layer)]
    for slot in slots:
        if _is_chain(slot.module) and not _is_chain(slot.parent) and slot.module not in joined:
            yield list(_links(slot.module))


def _runs(root: nn.Module) -> Iterator[list[_Slot]]:
    """Residual blocks that follow each other, and stand once in the model."""
    times = Counter(slot.module for slot in _slots(root))
    for chain in _chains(root):
        for fits, run in groupby(chain, lambda link: times[link.module] == 1 and PackedBlock.fits(link.module)):
            if fits:
                yield list(run)


@dataclass
class _Edge:
    """Two binary layers and what stands between them, which becomes one comparison."""

    source: BinaryLayer
    target: BinaryLayer
    slots: list[_Slot]
    before: list[nn.Module] = field(default_factory=list)  # of the pooling
    after: list[nn.Module] = field(default_factory=list)
    pool: _Slot | None = None
    flattened: bool = False

    def foldable(self) -> bool:
        """Sort the modules in between; False where the chain is another one."""
        source, target = self.source, self.target
        norm = nn.BatchNorm2d if isinstance(source, BinaryConv2d) else nn.BatchNorm1d
        normalised = False
        for slot in self.slots:
            module, stage = slot.module, self.before if self.pool is None else self.after
            if isinstance(module, _IDENTITIES):
                continue
            if isinstance(module, norm) and has_statistics(module) and not self.flattened:
                normalised = True
                stage.append(module)
            elif isinstance(module, nn.Hardtanh) or self._signs_each(module):
                stage.append(module)
            elif _plain_pool(module) and isinstance(source, BinaryConv2d) and self.pool is None and not self.flattened:
                self.pool = slot
            elif _plain_flatten(module) and not isinstance(source, BinaryLinear) and not self.flattened:
                self.flattened = True
            else:
                return False
        channels = len(source.weight)
        if self.flattened:
            fits = isinstance(target, BinaryLinear) and target.in_features % channels == 0 and plain_sign(target.input_binarizer)
        else:
            fits = type(source) is type(target) and _inputs(target) == channels and self._signs_each(target.input_binarizer)
            self.after.append(target.input_binarizer)
        return normalised and fits and binary_input(source)

    @property
    def spatial(self) -> int:
        """Dimensions behind the channel."""
        return self.source.weight.dim() - 2

    def _signs_each(self, module: nn.Module) -> bool:
        """Whether it is a sign of each value alone, or of each value and its channel's shift, ahead of a flattening."""
        if isinstance(module, RSign) and not self.flattened and module.dim in (1, -1 - self.spatial):
            module = module.binarizer
        return plain_sign(module)

    def fold(self, layer: PackedLayer) -> None:
        """Give the packed source its threshold, and clear the modules in between."""
        fold = fold_modules(layer.scale, layer.bias, self.before, self.after, length=layer.length, spatial=self.spatial)
        layer.fold(fold.folded)
        for slot in self.slots:
            slot.put(nn.Identity())
        if self.pool is not None:
            pool = self.pool.module
            assert isinstance(pool, nn.MaxPool2d)
            self.pool.put(PackedMaxPool2d(pool, fold.folded.flip ^ fold.falling))


def _edges(root: nn.Module) -> Iterator[_Edge]:
    """The places where bits can flow from one binary layer to the next."""
    times = Counter(slot.module for slot in _slots(root))
    for chain in _chains(root):
        places = [i for i, link in enumerate(chain) if isinstance(link.module, BinaryLayer)]
        for i, j in pairwise(places):
            source, target = chain[i].module, chain[j].module
            assert isinstance(source, BinaryLayer)
            assert isinstance(target, BinaryLayer)
            edge = _Edge(source, target, chain[i + 1 : j])
            once = all(times[module] <= 1 for module in (source, target, *(slot.parent for slot in edge.slots)))
            if once and edge.foldable():
                yield edge


def _inputs(layer: BinaryLayer) -> int:
    """Channels or features that a layer reads."""
    return layer.in_channels if isinstance(layer, BinaryConv1d | BinaryConv2d) else layer.weight.shape[1]


def _plain_pool(module: nn.Module) -> bool:
    """Whether it takes the maximum of every window that lies in the image."""
    if not isinstance(module, nn.MaxPool2d) or module.ceil_mode or module.return_indices:
        return False
    return _all(module.padding, 0) and _all(module.dilation, 1)


def _all(value: int | tuple[int, ...], wanted: int) -> bool:
    return all(size == wanted for size in (value if isinstance(value, tuple) else (value,)))


def _plain_flatten(module: nn.Module) -> bool:
    return isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1

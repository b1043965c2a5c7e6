"""What all curvature operators of a model share: its data, its parameters as one flat vector, and sums over batches.

A concrete operator says only how one batch acts (`_linearise`); here the batches are weighted by their numbers of examples,
`A = Σ_b (n_b / N) A_b`, so that uneven batches give the matrix of the whole data set.
"""

from __future__ import annotations

import abc
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from phyla.second_order.operator import CurvatureOperator
from phyla.second_order.sharding import Shard
from phyla.shared import checks

__all__: list[str] = []

LossFn = Callable[[Any, Any], Tensor]
Data = tuple[Any, Any] | Iterable[tuple[Any, Any]]
Select = Iterable[str] | Callable[[str], bool] | None


class Options(TypedDict, total=False):
    """The keyword arguments that all operators of a model share; `HessianOperator` tells what they are."""

    params: Select
    chunk_size: int | None
    cache_graph: bool
    check_deterministic: bool
    process_group: dist.ProcessGroup | None


_COLUMNS = 32  # vectors that one batched backward pass carries; its memory is that many activations


def select_parameters(model: nn.Module, params: Select) -> dict[str, nn.Parameter]:
    """The named parameters: those that require gradients, those that a predicate takes, or those that are listed; in the model's order.

    Raises: ValueError for an unknown name, no parameter at all, or parameters of several dtypes or devices.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in named.items() if params(name)}
    else:
        wanted = [params] if isinstance(params, str) else list(params)
        for name in wanted:
            if name not in named:
                near = difflib.get_close_matches(name, named, n=3) or list(named)[:3]
                raise ValueError(f"params: expected names of the model's parameters, got {name!r} (close: {', '.join(map(repr, near))})")
        chosen = {name: p for name, p in named.items() if name in wanted}
    if not chosen:
        raise ValueError("params: expected at least one parameter, got none")
    first_name, first = next(iter(chosen.items()))
    for name, p in chosen.items():
        checks.same(f"params: {name!r}", p, repr(first_name), first)
    return chosen


def constants(model: nn.Module) -> dict[str, Tensor]:
    """The parameters without their gradients, and copies of the buffers, so that a forward pass changes none of the model's own."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {**parameters, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def count_examples(value: Any) -> int:
    """The first dimension of the first tensor in a batch's targets or inputs; 0 where there is none."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else 1
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((count for count in map(count_examples, parts) if count), 0)


def take(value: Any, rows: slice) -> Any:
    """The examples `rows` of every tensor in a structure of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, Mapping):
        return {key: take(part, rows) for key, part in value.items()}
    return type(value)(take(part, rows) for part in value) if isinstance(value, (tuple, list)) else value


def mean_loss(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """The loss of a batch. Raises: TypeError, ValueError if it is no scalar tensor."""
    return checks.shape("loss_fn's value, a mean over the batch", loss_fn(outputs, targets), ())


class ModelOperator(CurvatureOperator):
    """A symmetric matrix over a model's parameters, a mean over examples. See `HessianOperator` for the arguments.

    Attributes:
        num_data: examples, over all ranks.
        parameter_names: in the order of the flat vector.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Data,
        *,
        params: Select = None,
        chunk_size: int | None = None,
        cache_graph: bool = False,
        check_deterministic: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self._parameters = select_parameters(model, params)
        self.parameter_names = tuple(self._parameters)
        first = next(iter(self._parameters.values()))
        size = sum(p.numel() for p in self._parameters.values())
        self.shape, self.dtype, self.device = (size, size), first.dtype, first.device
        self._chunk = None if chunk_size is None else checks.positive_int("chunk_size", chunk_size)
        self._data: Iterable[tuple[Any, Any]]
        if isinstance(data, tuple) and len(data) == 2:
            self._data = [(data[0], data[1])]
        else:
            self._data = list(data) if isinstance(data, Iterator) else data
        self._ranks = Shard(size, process_group)
        counts = [count for _, _, count in self._chunks()]
        if not sum(counts):
            raise ValueError("data: expected at least one example, got none")
        total = torch.tensor(float(sum(counts)), dtype=torch.float64, device=self.device)
        self.num_data = int(self._ranks.sum(total))
        self._keep = cache_graph and len(counts) == 1
        self._kept: Callable[[Tensor], Tensor] | None = None
        if check_deterministic:
            one, two = self._gradient(), self._gradient()
            if not float((one - two).norm()) <= 1e-5 * float(one.norm()):
                raise ValueError(
                    "check_deterministic: expected two passes over the data to give one gradient, they differ by "
                    f"{float((one - two).norm()):.3g} of {float(one.norm()):.3g}; usual causes: dropout, BatchNorm in train mode, "
                    "data that are shuffled or augmented, non-finite values"
                )

    @abc.abstractmethod
    def _linearise(self, inputs: Any, targets: Any, index: int) -> Callable[[Tensor], Tensor]:
        """The action (k, P) -> (k, P) of the chunk `index`, a mean over its examples; it may be called many times."""

    def flatten(self, tree: Mapping[str, Tensor]) -> Tensor:
        """One flat vector, (P,), of tensors by parameter name. Raises: ValueError for missing or foreign names, or other shapes."""
        if set(tree) != set(self.parameter_names):
            raise ValueError(f"tree: expected the names {self.parameter_names}, got {tuple(tree)}")
        return torch.cat([checks.shape(f"tree: {name!r}", tree[name], tuple(p.shape)).flatten() for name, p in self._parameters.items()])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector, (P,), by parameter name. Raises: ValueError for another size."""
        checks.shape("vector", vector, (self.shape[0],))
        return {name: part[0] for name, part in zip(self.parameter_names, self._split(vector[None]), strict=True)}

    def _split(self, rows: Tensor) -> list[Tensor]:
        """(k, P) as one (k, *shape) a parameter."""
        sizes = [p.numel() for p in self._parameters.values()]
        return [part.view(-1, *p.shape) for part, p in zip(torch.split(rows, sizes, 1), self._parameters.values(), strict=True)]

    def _join(self, parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([part.reshape(part.shape[0], -1) for part in parts], 1)

    def _chunks(self) -> Iterator[tuple[Any, Any, int]]:
        """Inputs, targets and number of examples of each piece of data that is processed at once."""
        for batch in self._data:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"data: expected pairs (inputs, targets), got {type(batch).__name__}")
            inputs, targets = batch
            count = count_examples(targets) or count_examples(inputs)
            step = self._chunk or max(count, 1)
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                whole = rows == slice(0, count)
                yield (inputs, targets, count) if whole else (take(inputs, rows), take(targets, rows), rows.stop - rows.start)

    def _forward(self, inputs: Any, theta: list[Tensor]) -> Any:
        """The model's outputs at the parameters `theta`, the others as they are; nothing of the model changes."""
        chosen = dict(zip(self.parameter_names, theta, strict=True))
        return functional_call(self.model, {**constants(self.model), **chosen}, (inputs,))

    def _leaves(self) -> list[Tensor]:
        return [p.detach().requires_grad_() for p in self._parameters.values()]

    def _gradient(self, theta: list[Tensor] | None = None) -> Tensor:
        """The gradient of the mean loss over all data, (P,)."""
        leaves = self._leaves() if theta is None else theta
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        with torch.enable_grad():
            for inputs, targets, count in self._chunks():
                grads = torch.autograd.grad(mean_loss(self.loss_fn, self._forward(inputs, leaves), targets), leaves, materialize_grads=True)
                total.add_(torch.cat([g.flatten() for g in grads]), alpha=count / self.num_data)
        return self._ranks.sum(total)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._products(vector.detach()[None])[0]

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self._products(matrix.detach().T.contiguous()).T

    def _products(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        with torch.enable_grad():
            for index, (inputs, targets, count) in enumerate(self._chunks()):
                act = self._kept or self._linearise(inputs, targets, index)
                if self._keep:
                    self._kept = act
                for part, out in zip(torch.split(rows, _COLUMNS), torch.split(total, _COLUMNS), strict=True):
                    out.add_(act(part), alpha=count / self.num_data)
                del act
        return self._ranks.sum(total)


def vjp(outputs: list[Tensor], leaves: list[Tensor], vectors: list[Tensor], *, graph: bool = False) -> list[Tensor]:
    """`Jᵀ v` for k vectors (k, *shape of the output) each, as (k, *shape of the leaf); several at once by one batched backward pass.

    Outputs that do not depend on the leaves count as constants.
    """
    live = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    count = vectors[0].shape[0]
    if not live:
        return [leaf.new_zeros(count, *leaf.shape) for leaf in leaves]
    heads, tails = zip(*live, strict=True)
    many = count > 1
    grads = torch.autograd.grad(
        heads,
        leaves,
        grad_outputs=tails if many else [v[0] for v in tails],
        retain_graph=True,
        create_graph=graph,
        allow_unused=True,
        is_grads_batched=many,
    )
    return [leaf.new_zeros(count, *leaf.shape) if g is None else (g if many else g[None]) for g, leaf in zip(grads, leaves, strict=True)]

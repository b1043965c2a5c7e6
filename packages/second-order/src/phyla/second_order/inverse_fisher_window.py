"""The inverse empirical Fisher matrix of a sliding window of gradients, updated with two passes over the window a push."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phyla.second_order.gram import cholesky, column_panels, expand, project
from phyla.second_order.inverse_fisher import check_damping
from phyla.second_order.sharding import Shard
from phyla.shared import checks

__all__ = ["InverseFisherWindow"]


class InverseFisherWindow:
    """F⁻¹ for F = damping I + GᵀG/n of the last `num_grads` gradients, the rows of G.

    n is the capacity even while the window fills (empty rows are zero, so the first products are large: ‖F⁻¹g‖ is about n/‖g‖), or with
    `normalization="count"` the number of gradients present. S = n damping I + GGᵀ and its inverse P are kept in float64; a push changes
    one row and one column of S, hence P by two rank-one terms; every max(m, 256) pushes, and where rounding shows, P is computed afresh.
    A gradient that is itself row j of G needs no subtraction of near-equal
    vectors: F⁻¹ Gᵀ = n Gᵀ P, so F⁻¹ g = n Gᵀ P[:, j], right in float32 at any damping.

    A push that fails or is interrupted leaves the window as it was, or without its oldest gradient.

    Args:
        dim: size d of a gradient.
        num_grads: capacity m.
        damping: the multiple of the identity in F.
        normalization: what n is.
        dtype: of the stored gradients; sums are in float64 for all of them.
        device: of the window.
        process_group: rank r of R stores the columns [r ceil(d/R), (r+1) ceil(d/R)); gradients and results are whole on each rank.

    Attributes:
        count: gradients held.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: `process_group` without an initialised torch.distributed; or a rank that does not answer.
    Source: M-FAC, section 3.3 (the dynamic algorithm), in push-through form.
    """

    def __init__(
        self,
        dim: int,
        num_grads: int,
        *,
        damping: float = 1e-5,
        normalization: Literal["capacity", "count"] = "capacity",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.dim, self.num_grads = checks.positive_int("dim", dim), checks.positive_int("num_grads", num_grads)
        self.damping = check_damping(damping)
        self.normalization = checks.choice("normalization", normalization, ("capacity", "count"))
        self._shard = Shard(self.dim, process_group)
        self._grads = torch.zeros(self.num_grads, self._shard.width, dtype=dtype, device=device)
        checks.floating("dtype", self._grads)
        self._gram = torch.zeros(self.num_grads, self.num_grads, dtype=torch.float64, device=self._grads.device)
        self._eye = torch.eye(self.num_grads, dtype=torch.float64, device=self._grads.device)
        self.count = self._slot = self._age = 0
        self._inverse = self._eye / self._shift(0)
        self._torn = False  # a push was cut off between the row of G and its products

    @torch.no_grad()
    def push(self, grad: Tensor) -> None:
        """Add a gradient (d,), in the place of the oldest when the window is full. Raises: TypeError, ValueError: naming the argument."""
        self._commit(self._prepare(grad))

    @torch.no_grad()
    def push_ihvp(self, grad: Tensor) -> Tensor:
        """Add a gradient, then multiply it by F⁻¹.

        Args:
            grad: (d,). With a window of lower precision, the product is that of the gradient as stored.

        Returns: (d,), in the dtype of `grad`, float32 at least.
        Raises: TypeError, ValueError: naming the argument; nothing is stored then.
        """
        update = self._prepare(grad)
        column = torch.addmv(update.inverse[:, self._slot], update.inverse, self._residual(update.gram, update.inverse))
        coefficients = column * self._normal(self._next_count())
        others = coefficients.clone()
        others[self._slot] = 0  # G still holds the gradient that goes
        product = expand(self._grads, others[:, None])[:, 0].add_(update.row.double() * coefficients[self._slot])
        whole = self._shard.gather(product.to(torch.promote_types(grad.dtype, torch.float32))).to(grad.device)
        self._commit(update)
        return whole

    @torch.no_grad()
    def ihvp(self, x: Tensor) -> Tensor:
        """F⁻¹ x = (x - Gᵀ P G x) / damping for any x (..., d), in its shape and dtype. Raises: TypeError, ValueError: naming `x`."""
        checks.last_dim("x", checks.floating("x", x), self.dim)
        self._mend()
        mine = self._shard.of(x.reshape(-1, self.dim)).mT.to(self._grads.device)
        inner = self._inverse @ self._shard.sum(project(self._grads, mine))
        rows = ((mine.double() - expand(self._grads, inner)) / self.damping).mT
        return self._shard.gather(rows).reshape(x.shape).to(x.device, x.dtype)

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """The diagonal of F⁻¹, (d,), in the window's dtype, float32 at least; O(m²d)."""
        self._mend()
        parts = []
        for columns in column_panels(self._grads):
            panel = self._grads[:, columns].double()
            parts.append((1 - (panel * (self._inverse @ panel)).sum(0)) / self.damping)
        return self._shard.gather(torch.cat(parts).to(torch.promote_types(self._grads.dtype, torch.float32)))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """A snapshot (copies) from which the window goes on bit for bit; with a process group that of this rank's columns."""
        self._mend()
        tensors = {"grads": self._grads.clone(), "gram": self._gram.clone(), "inverse": self._inverse.clone()}
        return {**tensors, "count": self.count, "slot": self._slot, "age": self._age, **self._setting()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot. Raises: ValueError: it lacks something, or is of a window with other arguments; nothing is loaded then."""
        tensors = {"grads": self._grads, "gram": self._gram, "inverse": self._inverse}
        missing = [name for name in (*tensors, "count", "slot", "age", *self._setting()) if name not in state]
        if missing:
            raise ValueError(f"state: expected the entries of a window's state_dict, got none for {', '.join(missing)}")
        for name, value in self._setting().items():
            if state[name] != value:
                raise ValueError(f"state: expected {name}={value!r}, got {state[name]!r}")
        for name, tensor in tensors.items():
            checks.shape(f"state[{name!r}]", state[name], tensor.shape)
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        self.count, self._slot, self._age, self._torn = int(state["count"]), int(state["slot"]), int(state["age"]), False

    def _setting(self) -> dict[str, Any]:
        setting = {"dim": self.dim, "num_grads": self.num_grads, "damping": self.damping, "normalization": self.normalization}
        return {**setting, "rank": self._shard.rank, "ranks": self._shard.ranks}

    def _normal(self, count: int) -> int:
        return self.num_grads if self.normalization == "capacity" else max(count, 1)

    def _shift(self, count: int) -> float:
        return self._normal(count) * self.damping

    def _next_count(self) -> int:
        return min(self.count + 1, self.num_grads)

    def _prepare(self, grad: Tensor) -> _Update:
        """What a push will write; the window is not changed."""
        checks.shape("grad", checks.floating("grad", grad), (self.dim,))
        self._mend()
        row = self._shard.of(grad).to(self._grads.device, self._grads.dtype)
        products = project(self._grads, row[:, None])[:, 0]
        products[self._slot] = row.double().square().sum()
        products = self._shard.sum(products)
        norm = float(products[self._slot])
        if not math.isfinite(norm):
            raise ValueError(f"grad: expected finite values, also as {self._grads.dtype}, got a squared norm of {norm}")
        gram = self._gram.clone()
        gram[self._slot], gram[:, self._slot] = products, products
        inverse, age = None if self._is_stale() else self._changed_inverse(products, norm), self._age + 1
        if inverse is None or float(self._residual(gram, inverse).abs().max()) > 1e-7:
            inverse, age = self._fresh_inverse(gram, self._next_count()), 0
        return _Update(row, gram, inverse, age)

    def _is_stale(self) -> bool:
        """Whether the next P has to be computed afresh: its damping changes, or rounding had time to gather."""
        filling = self.normalization == "count" and self.count < self.num_grads
        return filling or self._age + 1 >= max(self.num_grads, 256)

    def _changed_inverse(self, products: Tensor, norm: float) -> Tensor | None:
        """P once row and column `slot` of GGᵀ are `products`: the old ones taken out, the new ones put in; None if too little is left."""
        slot, diagonal = self._slot, norm + self._shift(self._next_count())
        old = self._inverse[:, slot]
        inverse = torch.addr(self._inverse, old, old, alpha=-1 / float(old[slot]))
        inverse[slot] = 0
        inverse[:, slot] = 0
        t = inverse @ products
        pivot = diagonal - float(products @ t)
        t[slot] = -1
        return inverse.addr_(t, t, alpha=1 / pivot) if pivot > 1e-12 * diagonal else None

    def _residual(self, gram: Tensor, inverse: Tensor) -> Tensor:
        """e_slot - S P e_slot: as large as the relative error of F⁻¹ g, also where Gᵀ P e_slot cancels."""
        column = inverse[:, self._slot]
        return self._eye[self._slot] - gram @ column - self._shift(self._next_count()) * column

    def _fresh_inverse(self, gram: Tensor, count: int) -> Tensor:
        return torch.cholesky_inverse(cholesky(gram + self._shift(count) * self._eye))

    def _commit(self, update: _Update) -> None:
        self._torn = True
        self._grads[self._slot] = update.row
        self._gram, self._inverse = update.gram, update.inverse
        self._torn = False
        self.count, self._slot, self._age = self._next_count(), (self._slot + 1) % self.num_grads, update.age

    def _mend(self) -> None:
        """After a push that was cut off: drop the row that it was writing."""
        if self._torn:
            self._grads[self._slot], self._gram[self._slot], self._gram[:, self._slot] = 0, 0, 0
            self._inverse, self._torn = self._fresh_inverse(self._gram, self.count), False


class _Update(NamedTuple):
    """What a push writes: this rank's row of G, GGᵀ, its damped inverse P, and the pushes since P was computed afresh."""

    row: Tensor
    gram: Tensor
    inverse: Tensor
    age: int

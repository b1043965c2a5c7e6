"""A long vector divided over the ranks of a process group by contiguous ranges; one process is the whole of a group of one."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

__all__ = ["Shard"]


class Shard:
    """The range of this rank: `[r ceil(d/R), (r+1) ceil(d/R))`, cut at d, so the last ranks may hold less or nothing.

    Args:
        dim: length d of the whole.
        group: None for one process.

    Raises: RuntimeError: `group` without an initialised torch.distributed, or a process outside the group.
    """

    def __init__(self, dim: int, group: dist.ProcessGroup | None) -> None:
        if group is not None and not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("process_group: expected torch.distributed to be initialised (init_process_group), but it is not")
        self.dim, self.group = dim, group
        self.rank, self.ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise RuntimeError("process_group: expected a group that this process belongs to")
        self.step = -(-dim // self.ranks)
        self.start = min(self.rank * self.step, dim)
        self.width = min(self.step, dim - self.start)

    def of(self, whole: Tensor) -> Tensor:
        """This rank's range of the last dimension, a view."""
        return whole.narrow(-1, self.start, self.width)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.group is not None:
            self._talk("all_reduce", lambda: dist.all_reduce(value, group=self.group))
        return value

    def gather(self, mine: Tensor) -> Tensor:
        """The whole last dimension from the ranges of all ranks."""
        if self.group is None:
            return mine
        first = mine.new_zeros(self.step, *mine.shape[:-1])
        first[: self.width] = mine.movedim(-1, 0)
        whole = first.new_empty(self.ranks * self.step, *mine.shape[:-1])
        self._talk("all_gather", lambda: dist.all_gather_into_tensor(whole, first, group=self.group))
        return whole[: self.dim].movedim(0, -1)

    def _talk(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise RuntimeError(
                f"process_group: {name} failed on rank {self.rank} of {self.ranks}: a rank has ended, or does not take the same steps "
                f"({str(error).splitlines()[0]})"
            ) from error

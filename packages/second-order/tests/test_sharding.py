import datetime
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from phyla.second_order import MFAC
from phyla.shared.testing import assert_close


def run(rank, ranks, store):
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    results = []
    for group in (None, dist.group.WORLD):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.ones(7, dtype=torch.float64)), nn.Parameter(torch.ones(3, 2, dtype=torch.float64))]
        optimizer = MFAC(params, lr=0.01, num_grads=4, damping=0.01, momentum=0.5, process_group=group)
        for _ in range(9):
            for parameter in params:
                parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            optimizer.step()
        x = torch.randn(2, 13, dtype=torch.float64, generator=generator)
        weights = torch.cat([parameter.detach().flatten() for parameter in params])
        results.append((weights, optimizer.window.ihvp(x), optimizer.window.diagonal()))
    for alone, divided in zip(*results, strict=True):
        assert_close(f"rank {rank}", divided, alone, 1e-9)
    if rank == ranks - 1:
        os._exit(0)  # the others must hear of it
    with pytest.raises(RuntimeError, match=f"process_group: all_reduce failed on rank {rank} of {ranks}: a rank has ended"):
        optimizer.window.push(torch.ones(13, dtype=torch.float64))
    os._exit(0)


@pytest.mark.parametrize("ranks", [2])
def test_a_divided_window_is_a_whole_one_and_a_dead_rank_is_named(ranks):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (ranks, f"{folder}/store"), ranks)

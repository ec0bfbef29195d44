"""Run a function on real Gloo ranks, each a process of its own."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT_S = 240
"""After so long the ranks are taken to hang; they are killed and the test fails."""


def run_ranks(function: Callable[..., None], count: int, *args: Any) -> None:
    """Call `function(*args)` on `count` ranks of a Gloo group; fail with the trace of the first rank that fails.

    A rank ends by `os._exit`: the teardown of Gloo's threads in torch sometimes aborts a process that has finished.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, count, folder, function, args)) for rank in range(count)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(LIMIT_S)
        hanging = [number for number, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
        traces = sorted(Path(folder).glob("failed-*"))
        if traces:
            raise AssertionError(f"{traces[0].name}\n{traces[0].read_text()}")
        assert not hanging, f"ranks {hanging} hang"
        assert [rank.exitcode for rank in ranks] == [0] * count


def _rank(rank: int, count: int, folder: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
        function(*args)
        dist.barrier()
    except BaseException:
        Path(folder, f"failed-{rank}").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    os._exit(code)

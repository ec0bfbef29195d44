"""Real Gloo ranks, one of which is made to die or to hang; what the others say, and after how long."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 8
"""Of the process group: no survivor may wait longer, apart from a few seconds for a busy machine."""

Fault = Callable[[], None]


def die() -> None:
    """As by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Stopped: neither alive for the others nor gone."""
    os.kill(os.getpid(), signal.SIGSTOP)


def survivors(function: Callable[..., None], count: int, victim: int, *args: Any) -> dict[int, str]:
    """Run `function(rank == victim, *args)` on `count` ranks; what each of the others raised, as `Type: sentence`.

    Fails if one of them takes longer than the timeout allows, counted from the moment in which the victim calls `fault` below.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, count, folder, function, victim, args)) for rank in range(count)]
        for rank in ranks:
            rank.start()
        others = [process for rank, process in enumerate(ranks) if rank != victim]
        for process in others:
            process.join(120)
        hanging = [process.is_alive() for process in others]
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        assert not any(hanging), "a survivor hangs"
        begun = Path(folder, "fault").stat().st_mtime
        said = {}
        for rank in range(count):
            if rank != victim:
                path = Path(folder, f"said-{rank}")
                said[rank] = path.read_text()
                late = path.stat().st_mtime - begun
                assert late < TIMEOUT_S + 10, f"rank {rank} noticed after {late:.0f} s"
        return said


def mark(folder: str, fault: Fault) -> None:
    """Note the time, and be the victim."""
    Path(folder, "fault").touch()
    fault()


def _rank(rank: int, count: int, folder: str, function: Callable[..., None], victim: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    said = "nothing"
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        function(folder, rank == victim, *args)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    Path(folder, f"said-{rank}").write_text(said)
    time.sleep(0.1)
    os._exit(0)

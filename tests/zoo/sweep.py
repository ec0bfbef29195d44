"""Run cases in processes of their own, with a time limit, and remember what is done."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.zoo.catalogue import Case
from tests.zoo.trial import Result, of_line, trial

MEMORY = 14 << 30
"""Bytes of address space per process: a model that asks for more fails alone."""


def read_cache(path: Path) -> dict[str, Result]:
    """Case name → its last result, from lines of JSON; empty where there is no file."""
    if not path.exists():
        return {}
    results = [of_line(line) for line in path.read_text().splitlines() if line.strip()]
    return {result.name: result for result in results}


def sweep(
    cases: Sequence[Case],
    *,
    processes: int,
    ranks: Sequence[int],
    timeout: float,
    started: Callable[[str], None] = lambda name: None,
) -> Iterator[Result]:
    """The result of every case, as they end. `timeout` is in seconds per case."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "tests.zoo.trial", "tests.zoo.catalogue"])
    waiting = list(reversed(cases))
    running: list[tuple[Case, BaseProcess, Path, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                case = waiting.pop()
                path = Path(folder, case.name)
                process = context.Process(target=_work, args=(path, case, tuple(ranks)), daemon=True)
                process.start()
                running.append((case, process, path, time.monotonic()))
                started(case.name)
            case, process, path, start = running.pop(0)
            process.join(0.1)
            late = time.monotonic() - start > timeout
            if process.is_alive() and not late:
                running.append((case, process, path, start))
                continue
            reason = f"took longer than {timeout:.0f} s" if process.is_alive() else f"the process ended with code {process.exitcode}"
            process.kill()
            process.join()
            result = read_cache(path).get(case.name, Result(case.name))
            yield result if result.reason or result.ok else replace(result, reason=reason, seconds=timeout if late else 0.0)


def _work(path: Path, case: Case, ranks: tuple[int, ...]) -> None:
    """One case; every stage reached is written to `path`, so that a process that is killed has said how far it came."""
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with path.open("a") as file:

        def reached(result: Result) -> None:
            file.write(result.line + "\n")
            file.flush()

        dtypes = ("float32",) if case.grouped else ("float64", "lifted", "float32")
        reached(trial(case.name, case.build, ranks, dtypes, reached))
    os._exit(0)  # no teardown: it costs a second

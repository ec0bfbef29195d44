"""Step time with parameters' exchanges beside compute, and without: `python -m tests.benchmarks.overlap [--pairs 20] [--mb-per-s 0 200]`.

Two Gloo ranks run forward and backward of a stack of MLP blocks, fully sharded (FSDP): every weight is split at rest, gathered where it
is used, its gradient reduced. `early` is the module as it is emitted: gathers begin a block early, reductions are waited for a block
late; `in place` is the same module with every conversion at its place. Both give the same gradients. They take turns; a step starts at a
barrier and lasts as long as on the slower rank. Shown are medians, the median ratio of neighbours and its 95 % bootstrap interval.

Gloo's own exchanges need the same processor cores as compute does, so that little can be won by running them beside it. `--mb-per-s`
adds a link as GPUs have: an exchange of b bytes ends no sooner than b / bandwidth after the one before it, and needs no core.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from autotp.runtime.collectives import bind
from autotp.runtime.comm import ProcessComm
from autotp.trace import trace
from tests.data_parallel import data_parallel, parallel_module, without_prefetch
from tests.ranks import run_ranks

RANKS, BLOCKS, BATCH = 2, 6, 256


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, hidden]."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class SlowLink(ProcessComm):
    """Exchanges that also take the time of a link of so many bytes per second, one after the other."""

    def __init__(self, device_mesh: Any, bandwidth: float) -> None:
        super().__init__(device_mesh)
        self.bandwidth, self.free = bandwidth, 0.0
        self.ends: dict[int, float] = {}

    def sent(self, received: Tensor, x: Tensor) -> Tensor:
        self.free = max(self.free, time.perf_counter()) + max(x.nbytes, received.nbytes) / self.bandwidth
        self.ends[id(received)] = self.free
        return received

    def all_reduce(self, x: Tensor, axis: int, op: Any) -> Tensor:
        return self.sent(super().all_reduce(x, axis, op), x)

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        return self.sent(super().all_gather(x, axis), x)

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        return self.sent(super().reduce_scatter(x, axis), x)

    def wait(self, x: Tensor) -> Tensor:
        end = self.ends.pop(id(x))
        x = super().wait(x)
        time.sleep(max(end - time.perf_counter(), 0.0))
        return x


def two_ways(hidden: int, bandwidth: float) -> tuple[dict[str, Any], Tensor]:
    """The modules, which have shown that they give the same gradients, and an input."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block(hidden) for _ in range(BLOCKS))), torch.randn(BATCH, hidden)
    space, decisions = data_parallel(trace(model, (x,)), {"dp": RANKS}, "S")
    mesh = init_device_mesh("cpu", (RANKS,))
    ways: dict[str, Any] = {name: parallel_module(model, space, decisions, mesh) for name in ("early", "in place")}
    without_prefetch(ways["in place"])
    for way in ways.values():
        if bandwidth:
            bind(way._sharded.graph, SlowLink(mesh, bandwidth))
        way(x).square().mean().backward()
    for one, other in zip(*(way.parameters() for way in ways.values()), strict=True):
        torch.testing.assert_close(one.grad.to_local(), other.grad.to_local())
    return ways, x


def step_time(way: nn.Module, x: Tensor) -> float:
    """Seconds of one forward and backward on this rank."""
    way.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    way(x).square().mean().backward()
    return time.perf_counter() - start


def measure(hidden: int, bandwidth: float, pairs: int, steps: int) -> tuple[dict[str, float], tuple[float, float, float]]:
    """Median seconds of each way; the median ratio and the ends of its interval."""
    ways, x = two_ways(hidden, bandwidth)
    for way in ways.values():
        for _ in range(3):
            step_time(way, x)
    mine: dict[str, list[list[float]]] = {name: [] for name in ways}
    for turn in range(pairs):
        for name in ways if turn % 2 else reversed(ways):
            mine[name].append([step_time(ways[name], x) for _ in range(steps)])
    slowest = torch.tensor(list(mine.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    early, in_place = slowest.median(-1).values.tolist()
    ratios, draw = [a / b for a, b in zip(early, in_place, strict=True)], random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    seconds = {"early": statistics.median(early), "in place": statistics.median(in_place)}
    return seconds, (statistics.median(ratios), medians[49], medians[-50])


def report(sizes: Sequence[int], bandwidths: Sequence[float], pairs: int, steps: int) -> None:
    """Measure and print, on every rank; rank 0 prints."""
    say: Callable[..., None] = print if dist.get_rank() == 0 else lambda *_, **__: None
    say(f"torch {torch.__version__}, {RANKS} Gloo ranks, {BLOCKS} blocks, batch {BATCH}, {pairs} pairs of {steps} steps\n")
    say("| hidden | link | early | in place | early / in place (95 %) |")
    say("|---|---|---|---|---|")
    for hidden in sizes:
        for bandwidth in bandwidths:
            seconds, ratio = measure(hidden, bandwidth * 1e6, pairs, steps)
            times = " | ".join(f"{1e3 * value:.1f} ms" for value in seconds.values())
            link = f"Gloo and {bandwidth:g} MB/s" if bandwidth else "Gloo alone"
            say(f"| {hidden} | {link} | {times} | {{:.3f}} ({{:.3f}}–{{:.3f}}) |".format(*ratio), flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20, help="turns in which both ways are measured (default 20)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each way in a turn; the median counts (default 5)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256], help="hidden sizes (default 256)")
    parser.add_argument("--mb-per-s", type=float, nargs="+", default=[0, 200], help="bandwidths of the added link; 0: none")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    run_ranks(report, RANKS, options.hidden, options.mb_per_s, options.pairs, options.steps)
    sys.stdout.flush()


if __name__ == "__main__":
    main()

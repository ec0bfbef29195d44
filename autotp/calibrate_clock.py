"""Timing calls on a device: one small interface for CPU and CUDA, and robust statistics over its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Protocol

import torch

Call = Callable[[], object]

INTERVAL = 5e-4
"""Seconds that one sample should last: calls that are shorter are repeated within it."""
MOST_CALLS = 200
"""Calls in one sample, at most: fewer than a CUDA stream queues before the host has to wait."""
FEWEST_SAMPLES, MOST_SAMPLES = 3, 40
PLUG_BYTES = 1 << 28
PLUG_SECONDS = 2e-3
"""How long a GPU is kept busy while the host queues a sample: longer than queueing MOST_CALLS kernels takes."""


class Clock(Protocol):
    """Times calls on one device."""

    device: torch.device

    def sample(self, call: Call, count: int) -> tuple[float, float]:
        """Seconds per call of `count` calls in a row: (on the device, of the host until it may go on)."""


class CpuClock:
    """On a CPU the call is over when it returns.

    Args:
        now: the time in seconds. `time.thread_time` leaves out what other processes do meanwhile, and is right for calls
            that neither wait nor use other threads.
    """

    def __init__(self, now: Callable[[], float] = perf_counter) -> None:
        self.device, self.now = torch.device("cpu"), now

    def sample(self, call: Call, count: int) -> tuple[float, float]:
        began = self.now()
        for _ in range(count):
            call()
        seconds = (self.now() - began) / count
        return seconds, seconds


class CudaClock:
    """Time between two events of the current stream, which come up only when the host has had time to queue all calls.

    Without that head start, the time between the events of short kernels is that of launching them. One call stands
    before the first event: ranks that call a collective leave it at the same time.

    Args:
        device: the GPU.
        cuda: `torch.cuda`, or something that acts like it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.filler = torch.empty(PLUG_BYTES, dtype=torch.uint8, device=device)
        self.plugs = 0
        self.sample(self.filler.zero_, 1)
        seconds, _ = self.sample(self.filler.zero_, 10)
        self.plugs = ceil(PLUG_SECONDS / max(seconds, 1e-6))

    def sample(self, call: Call, count: int) -> tuple[float, float]:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        self.cuda.synchronize(self.device)
        for _ in range(self.plugs):
            self.filler.zero_()
        call()
        start.record()
        began = perf_counter()
        for _ in range(count):
            call()
        host = perf_counter() - began
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / count, host / count


class Team(Protocol):
    """The ranks that measure together."""

    def start(self) -> None:
        """Waits for all of them."""

    def slowest(self, values: Sequence[float]) -> list[float]:
        """The greatest value of any rank, place by place; all give equally many."""


class Alone:
    """A process that measures by itself."""

    def start(self) -> None:
        pass

    def slowest(self, values: Sequence[float]) -> list[float]:
        return list(values)


@dataclass(frozen=True)
class Timing:
    """The time of a call.

    Attributes:
        seconds: median over the samples, on the device.
        host_seconds: median that the host needs until it may go on.
        spread: distance between the quartiles over the median: 0.02 on a quiet machine.
    """

    seconds: float
    host_seconds: float
    spread: float


def measure(clock: Clock, call: Call, seconds: float, team: Team | None = None) -> Timing:
    """Time `call`, warmed up, in about `seconds`; at least three samples are taken, however long they last.

    Every rank of a `team` takes the same samples, starts each together with the others, and the slowest rank counts.
    """
    team = team or Alone()
    clock.sample(call, 1)  # first calls load kernels, reserve memory and connect ranks
    team.start()
    began = perf_counter()
    once, _ = clock.sample(call, 1)
    rough, wall = team.slowest([max(once, 1e-9), perf_counter() - began])
    count = min(max(round(INTERVAL / rough), 1), MOST_CALLS)
    samples = int(seconds / (max(rough, wall) + (count - 1) * rough))
    samples = min(max(samples, FEWEST_SAMPLES), MOST_SAMPLES)
    pairs = []
    for _ in range(samples):
        team.start()
        pairs.append(clock.sample(call, count))
    times = team.slowest([device for device, _ in pairs])
    low, middle, high = quantiles(times, n=4, method="inclusive")
    return Timing(middle, median(host for _, host in pairs), (high - low) / middle if middle else 0.0)

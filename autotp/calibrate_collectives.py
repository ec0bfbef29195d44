"""Measuring collectives between the running ranks, and the constants of the links that follow from them.

What is timed is what a parallel module runs: `runtime.comm.ProcessComm` over the groups of a mesh axis, all groups of the
axis at once. Bytes are counted as in `autotp.price.communication.collective_seconds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autotp.calibrate_clock import Clock, Timing, measure
from autotp.errors import AutotpError
from autotp.price.cluster import KINDS, Link, Sweep
from autotp.runtime.comm import ProcessComm

SIZES = {
    "cpu": tuple(1 << power for power in range(10, 27, 2)),
    "cuda": tuple(1 << power for power in range(10, 31)),
}
"""Bytes of the messages: 1 KiB to 64 MiB on CPU, to 1 GiB on CUDA."""
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
CALLS = 5
"""Calls that the shortest measurement makes: warm-up, a rough one, three samples."""


@dataclass(frozen=True)
class MeasuredSweep:
    """One kind in one group: `points` of (bytes, timing), for `ranks` ranks that stand `stride` apart."""

    kind: str
    ranks: int
    stride: int
    points: tuple[tuple[int, Timing], ...]


@dataclass(frozen=True)
class Collectives:
    """All that was measured among `world` ranks, `per_node` on each machine."""

    world: int
    per_node: int
    sweeps: tuple[MeasuredSweep, ...]

    @property
    def spreads(self) -> list[float]:
        """The spread of every point."""
        return [timing.spread for sweep in self.sweeps for _, timing in sweep.points]


class Ranks:
    """All ranks of the default process group, which talk over the CPU about what they measure."""

    def start(self) -> None:
        dist.all_reduce(torch.zeros(1))

    def slowest(self, values: Sequence[float]) -> list[float]:
        greatest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        return list(greatest.tolist())


def groups_of(world: int, per_node: int) -> list[tuple[int, int]]:
    """(ranks, stride) of the groups to measure: 2, 4, … and all ranks of a node, then whole nodes, and one rank of each.

    >>> groups_of(6, 6)
    [(2, 1), (4, 1), (6, 1)]
    >>> groups_of(8, 4)
    [(2, 1), (4, 1), (8, 1), (2, 4)]
    """

    def sizes(count: int) -> list[int]:
        return [size for size in (1 << power for power in range(1, 32)) if size < count] + [count] * (count > 1)

    inside = [(size, 1) for size in sizes(per_node)]
    nodes = sizes(world // per_node)
    whole = [(size * per_node, 1) for size in nodes]
    return inside + whole + [(size, per_node) for size in nodes if per_node > 1]


def measure_collectives(clock: Clock, seconds: float, per_node: int, say: Callable[[str], None] = lambda words: None) -> Collectives:
    """Measure every kind in every group, in about `seconds`; all ranks of the default process group call this.

    Args:
        per_node: ranks on each machine, which are consecutive.
        say: told what is being measured.

    Raises:
        AutotpError: a rank failed or went away.
    """
    world, kind_of_device = dist.get_world_size(), clock.device.type
    groups = groups_of(world, per_node)
    each = seconds / max(1, len(groups) * len(KINDS) * len(SIZES[kind_of_device]))
    sweeps = []
    try:
        for ranks, stride in groups:
            comm = _comm(ranks, stride, world, kind_of_device)
            for kind in KINDS:
                say(f"{kind} of {ranks} ranks" + (f", {stride} apart" if stride > 1 else ""))
                sweeps.append(MeasuredSweep(kind, ranks, stride, _sweep(clock, comm, kind, ranks, each)))
    except RuntimeError as error:  # Gloo and NCCL report a peer that has gone as one
        reason = (str(error).splitlines() or [""])[0][:120]
        raise AutotpError(f"the collectives could not be measured, a rank has failed or gone: {reason}") from error
    return Collectives(world, per_node, tuple(sweeps))


def _comm(ranks: int, stride: int, world: int, kind_of_device: str) -> ProcessComm | None:
    """The groups of consecutive ranks, on axis 1; None on a rank that is left over."""
    count = world // (ranks * stride)
    mesh = torch.arange(count * ranks * stride).view(count, ranks, stride).movedim(1, 2).reshape(-1, ranks)
    device_mesh = DeviceMesh(kind_of_device, mesh)
    return None if device_mesh.get_coordinate() is None else ProcessComm(device_mesh)


def _sweep(clock: Clock, comm: ProcessComm | None, kind: str, ranks: int, each: float) -> tuple[tuple[int, Timing], ...]:
    """Growing messages, until one would take much longer than `each` seconds allow. Every rank stops at the same size."""
    found: list[tuple[int, Timing]] = []
    dtype = DTYPE[clock.device.type]
    grain = ranks * dtype.itemsize
    for size in SIZES[clock.device.type]:
        nbytes = max(size // grain, 1) * grain
        if found and CALLS * found[-1][1].seconds * nbytes / found[-1][0] > 3 * each:
            break
        found.append((nbytes, measure(clock, _call(comm, kind, ranks, nbytes, dtype, clock.device), each, Ranks())))
    return tuple(found)


def _call(
    comm: ProcessComm | None, kind: str, ranks: int, nbytes: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor | None]:
    if comm is None:
        return lambda: None
    elements = nbytes // dtype.itemsize // (ranks if kind == "all_gather" else 1)
    x = torch.ones(elements, dtype=dtype, device=device)
    calls: dict[str, Callable[[], Tensor]] = {
        "all_reduce": lambda: comm.all_reduce(x, 1, "sum"),
        "all_gather": lambda: comm.all_gather(x, 1),
        "reduce_scatter": lambda: comm.reduce_scatter(x, 1),
        "all_to_all": lambda: comm.all_to_all(x, 1, None, None),
    }
    return lambda: comm.wait(calls[kind]())


# ---- the links ------------------------------------------------------------------------------------------------------


def fit_links(measured: Collectives) -> tuple[Link, ...]:
    """The tiers, innermost first, each with its sweeps and the constants that come closest to them.

    Constants are fitted to groups whose steps all cross the tier: those inside a node, and those of one rank from each
    node. A tier's raw bandwidth is the best that any of its messages reached.
    """
    links = []
    across = measured.world > measured.per_node
    inner = tuple(sweep for sweep in measured.sweeps if sweep.ranks * sweep.stride <= measured.per_node)
    outer = tuple(sweep for sweep in measured.sweeps if sweep not in inner)
    if inner:
        links.append(_link("node", measured.per_node, inner, inner))
    if across:
        direct = tuple(sweep for sweep in outer if sweep.stride == measured.per_node)
        links.append(_link("network", None, outer, direct))
    return tuple(links)


def _link(tier: str, devices: int | None, sweeps: tuple[MeasuredSweep, ...], direct: tuple[MeasuredSweep, ...]) -> Link:
    rows = [(*_terms(sweep.kind, sweep.ranks, size), seconds) for sweep in direct for size, seconds in envelope(sweep.points)]
    launch, latency, seconds_per_byte = _non_negative([row[:3] for row in rows], [row[3] for row in rows])
    raw = max(moved / seconds for _, _, moved, seconds in rows)
    usable = 1 / seconds_per_byte if seconds_per_byte else raw
    return Link(
        tier=tier,
        devices=devices,
        bandwidth=raw,
        efficiency=min(1.0, usable / raw),
        latency=latency,
        launch=launch,
        sweeps=tuple(Sweep(sweep.kind, sweep.ranks, sweep.stride, envelope(sweep.points)) for sweep in sweeps),
    )


def envelope(points: Sequence[tuple[int, Timing]]) -> tuple[tuple[float, float], ...]:
    """(bytes, seconds) that never fall as bytes grow: what a smaller message takes beyond a bigger one is noise."""
    lowest, found = float("inf"), []
    for size, timing in reversed(points):
        lowest = min(lowest, timing.seconds)
        found.append((float(size), lowest))
    return tuple(reversed(found))


def _terms(kind: str, ranks: int, nbytes: float) -> tuple[float, float, float]:
    """How often launch, latency and the time per byte count: those of a ring in `autotp.price.communication`."""
    steps, moved = float(ranks - 1), (ranks - 1) / ranks * nbytes
    if kind == "all_reduce":
        return 1.0, 2 * steps, 2 * moved
    return 1.0, steps / 2 if kind == "all_to_all" else steps, moved


def _non_negative(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, float, float]:
    """The constants, none below 0, whose relative errors have the least sum of squares.

    With three constants all subsets that may differ from 0 can be tried (Lawson & Hanson 1974, "Solving least squares
    problems", chapter 23, does so step by step).
    """
    matrix = np.array(terms) / np.array(seconds)[:, None]
    ones = np.ones(len(matrix))
    scale = np.abs(matrix).max(axis=0)
    best, least = np.zeros(3), float("inf")
    for count in (1, 2, 3):
        for chosen in combinations(range(3), count):
            columns = list(chosen)
            found = np.zeros(3)
            found[columns] = np.linalg.lstsq(matrix[:, columns] / scale[columns], ones, rcond=None)[0] / scale[columns]
            error = float(np.square(matrix @ found - ones).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = found, error
    return float(best[0]), float(best[1]), float(best[2])

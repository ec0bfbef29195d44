"""`calibrate`: measures the machine that it runs on, and writes a cluster's YAML that plans use at once.

One process measures the device alone; the ranks of a process group measure their devices at the same time, then the
collectives between them. Nothing is written before everything is measured and the result has been loaded once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time

import torch
import torch.distributed as dist

from autotp.calibrate_clock import Alone, Clock, CpuClock, CudaClock, Team
from autotp.calibrate_collectives import Collectives, Ranks, fit_links, measure_collectives
from autotp.calibrate_device import Device, measure_device
from autotp.calibrate_file import NO_PROFILE, Fit, fits, loaded, shipped_cluster, text_of
from autotp.errors import AutotpError
from autotp.plans import write_whole
from autotp.price.cluster import Cluster
from autotp.runtime.agreement import together

DEVICE_SHARE = 0.5
"""Part of the time that goes to the device where collectives are measured too."""
NOISY = 0.1
"""Spread between the quartiles of a measurement, in the median over all, above which the machine counts as noisy."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured, and what was made of it.

    Attributes:
        cluster: as `load_cluster` reads it from the text.
        text: the YAML.
        fits: how near the cluster's prices come to the measured times.
        shipped: the cluster that comes with autotp for the same device, if any.
        warnings: sentences on what makes the figures doubtful.
    """

    device: Device
    collectives: Collectives | None
    cluster: Cluster
    text: str
    fits: tuple[Fit, ...]
    shipped: Cluster | None
    warnings: tuple[str, ...]


def calibrate(
    output: str | Path | None = None,
    *,
    seconds: float = 60.0,
    device: str | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Calibration:
    """Measure this machine in about `seconds`, and write the result to `output`, which is replaced.

    Call it in one process, or on every rank of a process group; then all ranks get the same collectives, and rank 0
    writes. The default `device` is "cuda" if there is a GPU, else "cpu".

    Raises:
        AutotpError: there is no such device, the time is too short, a rank failed, or the file cannot be written.
    """
    clock = together(lambda: clock_of(device))
    team: Team = Ranks() if dist.is_initialized() else Alone()
    world = dist.get_world_size() if dist.is_initialized() else 1
    per_node = ranks_per_node(team, world)
    measured = together(lambda: measure_device(clock, seconds * (DEVICE_SHARE if world > 1 else 1.0), say))
    waiting = CpuClock() if clock.device.type == "cpu" else clock  # a collective waits for other processes
    collectives = measure_collectives(waiting, seconds * (1 - DEVICE_SHARE), per_node, say) if world > 1 else None
    peak = measured.accelerator.peak_flops[measured.dtype]
    slowest, fastest = -team.slowest([-peak])[0], team.slowest([peak])[0]
    say("fitting")
    links = fit_links(collectives) if collectives else ()
    shipped = shipped_cluster(measured.label if clock.device.type == "cuda" else "cpu", measured.accelerator.memory_bytes)
    base = shipped.name if shipped else NO_PROFILE
    how = _how(clock, collectives)
    cluster = loaded(text_of(measured, links, base, how))
    found = fits(cluster, measured, collectives)
    text = text_of(measured, links, base, how, found)
    if output is not None:
        together(lambda: write_whole(output, text) if world == 1 or dist.get_rank() == 0 else None)
    warnings = _warnings(clock, measured, collectives, slowest / fastest, None if links else base)
    return Calibration(measured, collectives, cluster, text, found, shipped, warnings)


def clock_of(device: str | None) -> Clock:
    """The clock of "cpu", "cuda", or None for a GPU if there is one.

    Raises:
        AutotpError: another name, or there is no GPU.
    """
    if device not in (None, "cpu", "cuda"):
        raise AutotpError(f"cannot calibrate the device {device!r}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise AutotpError("there is no CUDA device here: PyTorch sees no GPU; use --device cpu, or check the driver")
    if device == "cpu" or not torch.cuda.is_available():
        return CpuClock(thread_time if torch.get_num_threads() == 1 else perf_counter)
    return CudaClock(torch.device("cuda", torch.cuda.current_device()))


def ranks_per_node(team: Team, world: int) -> int:
    """Ranks on each machine, as torchrun says.

    Raises:
        AutotpError: machines have different numbers of ranks.
    """
    local = float(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    most, least = team.slowest([local])[0], -team.slowest([-local])[0]
    if most != least or world % int(most):
        raise AutotpError(f"machines have {least:g} to {most:g} ranks: start as many on each (torchrun --nproc-per-node)")
    return int(most)


def _how(clock: Clock, collectives: Collectives | None) -> str:
    backend = "Gloo" if clock.device.type == "cpu" else "NCCL"
    ranks = ""
    if collectives:
        nodes = collectives.world // collectives.per_node
        ranks = f", {collectives.world} ranks on {nodes} node{'s' if nodes > 1 else ''} with {backend}"
    today = datetime.now(UTC).date().isoformat()
    return f"measured by autotp calibrate on {today}, torch {torch.__version__}{ranks}; predicted against measured times"


def _warnings(
    clock: Clock, device: Device, collectives: Collectives | None, balance: float, base: str | None
) -> tuple[str, ...]:
    """Sentences on what makes the figures doubtful; `balance` is the peak of the slowest rank over that of the fastest."""
    found = []
    spread = median(device.spreads + (collectives.spreads if collectives else []))
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if spread > NOISY:
        found.append(f"the machine is noisy: repetitions differ by {spread:.0%} (quartiles, in the median); measure again when it is idle")
    elif clock.device.type == "cpu" and load > cores + 0.5 and (collectives or torch.get_num_threads() > 1):
        found.append(f"the machine is busy (load {load:.1f} on {cores} cores): times may be too long; measure again when it is idle")
    if balance < 1 - NOISY:
        found.append(f"the slowest rank computes {1 - balance:.0%} slower than the fastest; the file describes rank 0")
    if base is not None:
        found.append(f"links were not measured, those of {base} are used; run it under torchrun to measure them")
    return tuple(found)

"""A measured device and its links as a cluster's YAML, and how near the prices that follow come to what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from autotp.calibrate_collectives import Collectives
from autotp.calibrate_device import DTYPES, Device
from autotp.errors import AutotpError
from autotp.price.accelerator import Accelerator
from autotp.price.cluster import Cluster, Link, cluster_names, load_cluster
from autotp.price.communication import Group, collective_seconds
from autotp.price.compute import attention_seconds, gemm_seconds, memory_seconds

NO_PROFILE = "pcie-workstation"
"""Whose links stand in where none were measured and no shipped cluster has this device."""


@dataclass(frozen=True)
class Fit:
    """Relative distance of predicted from measured times: median and 90th percentile over `count` measurements."""

    what: str
    count: int
    median: float
    p90: float

    def __str__(self) -> str:
        return f"{self.what}: median {self.median:.0%}, p90 {self.p90:.0%} of {self.count}"


def fits(cluster: Cluster, device: Device, collectives: Collectives | None) -> tuple[Fit, ...]:
    """How near the prices of `cluster` come to the times that were measured, kind by kind."""
    dtype = str(DTYPES[device.dtype]).removeprefix("torch.")
    pairs: dict[str, list[tuple[float, float]]] = {
        "matrix products": [
            (gemm_seconds(cluster, *product.shape, dtype), product.timing.seconds) for product in device.products
        ],
        "copies": [(memory_seconds(cluster, 2.0 * size), timing.seconds) for size, timing in device.copies],
        "attention": [
            (attention_seconds(cluster, heads, length, length, width, width, True, dtype), timing.seconds)
            for (heads, length, width), timing in device.attention
        ],
    }
    for sweep in collectives.sweeps if collectives else ():
        group = Group(sweep.ranks, sweep.stride)
        pairs.setdefault(sweep.kind.replace("_", "-"), []).extend(
            (collective_seconds(cluster, sweep.kind, nbytes, group), timing.seconds) for nbytes, timing in sweep.points
        )
    return tuple(_fit(what, rows) for what, rows in pairs.items() if rows)


def _fit(what: str, rows: Sequence[tuple[float, float]]) -> Fit:
    errors = [abs(predicted / measured - 1) for predicted, measured in rows]
    p90 = quantiles(errors, n=10, method="inclusive")[-1] if len(errors) > 1 else errors[0]
    return Fit(what, len(errors), median(errors), p90)


# ---- the file -------------------------------------------------------------------------------------------------------


def text_of(device: Device, links: Sequence[Link], base: str, how: str, found: Sequence[Fit] = ()) -> str:
    """The YAML of a cluster.

    Args:
        links: those that were measured; none takes the links of `base`.
        base: name of a shipped cluster.
        how: one line on how and when this was measured.
        found: stated in the file.
    """
    source = how + "".join(f"; {fit}" for fit in found)
    body: dict[str, Any] = {"description": f"{device.label}, measured by autotp calibrate"}
    if not links:
        body["base"] = base
    body["source"] = source if links else f"{source}; links not measured, those of {base}"
    body["accelerator"] = _accelerator(device)
    if links:
        body["links"] = [_link(link) for link in links]
    return str(yaml.safe_dump(body, sort_keys=False, width=120, allow_unicode=True, default_flow_style=None))


def loaded(text: str) -> Cluster:
    """The cluster that a text describes, by way of a file, as plans load it.

    Raises:
        AutotpError: what was measured contradicts itself.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "calibrated.yaml"
        path.write_text(text)
        try:
            return load_cluster(path)
        except AutotpError as error:
            reason = str(error).removeprefix(f"{path}, ")
            raise AutotpError(f"what was measured makes no cluster file ({reason}); measure again when the machine is idle") from error


def _accelerator(device: Device) -> dict[str, Any]:
    accelerator, gemm = device.accelerator, device.accelerator.gemm
    return {
        "description": device.label,
        "memory_bytes": accelerator.memory_bytes,
        "bandwidth_gb_per_s": _short(accelerator.bandwidth / 1e9),
        "bandwidth_efficiency": _short(accelerator.bandwidth_efficiency),
        "launch_us": _short(1e6 * accelerator.launch_seconds),
        "host_launch_us": _short(1e6 * accelerator.host_launch_seconds),
        "attention_efficiency": _short(accelerator.attention_efficiency),
        "peak_tflops": {key: _short(rate / 1e12) for key, rate in accelerator.peak_flops.items()}
        | {"source": "best measured square product of each dtype, not a data sheet's peak"},
        "gemm": {
            "units": gemm.units,
            "tiles": [list(tile) for tile in gemm.tiles],
            "efficiency": _short(gemm.efficiency),
            "max_efficiency": _short(gemm.max_efficiency),
            "tile_overhead": _short(gemm.tile_overhead),
            "k_overhead": _short(gemm.k_overhead),
            "split_k_us": _short(1e6 * gemm.split_k_seconds),
            "start_us": _short(1e6 * gemm.start_seconds),
            "alignment_bytes": gemm.alignment_bytes,
            "misaligned_efficiency": _short(gemm.misaligned_efficiency),
            "source": f"fitted to {len(device.products)} products of {device.dtype}",
        },
    }


def _link(link: Link) -> dict[str, Any]:
    return {
        "tier": link.tier,
        "devices": link.devices or "any",
        "bandwidth_gb_per_s": _short(link.bandwidth / 1e9, up=True),
        "efficiency": _short(link.efficiency),
        "latency_us": _short(1e6 * link.latency),
        "launch_us": _short(1e6 * link.launch),
        "measured": [
            {
                "collective": sweep.kind,
                "ranks": sweep.ranks,
                "stride": sweep.stride,
                "time_us_by_bytes": {int(size): _short(1e6 * seconds) for size, seconds in sweep.points},
            }
            for sweep in link.sweeps
        ],
    }


def _short(value: float, up: bool = False) -> float:
    """Four significant digits; rounded up a little where what was measured must stay below."""
    return float(f"{value * (1.001 if up else 1):.4g}")


# ---- the nearest shipped profile ------------------------------------------------------------------------------------


def shipped_cluster(label: str, memory_bytes: int) -> Cluster | None:
    """The shipped cluster of this device; None if there is none.

    >>> shipped_cluster("NVIDIA A100-SXM4-40GB", 42 * 10**9).accelerator.name
    'a100-40gb'
    """
    known = [load_cluster(name) for name in cluster_names()]
    scored = [(_likeness(cluster.accelerator, label, memory_bytes), cluster) for cluster in known]
    best = max(scored, key=lambda pair: pair[0])
    return best[1] if best[0][0] > 0 else None


def _likeness(accelerator: Accelerator, label: str, memory_bytes: int) -> tuple[float, float]:
    """(words of the accelerator's name that the label has, nearness of memory); (0, …) if it is another device.

    Names such as "rtx4090" and "RTX 4090" are the same word.
    """
    words = re.findall(r"[a-z0-9]+", label.lower())
    words += [first + second for first, second in pairwise(words)]
    name, *rest = accelerator.name.split("-")
    nearness = -abs(log(memory_bytes / accelerator.memory_bytes)) if memory_bytes else -inf
    if name not in words:
        return 0.0, nearness
    return 1.0 + sum(any(word.startswith(part) for word in words) for part in rest), nearness

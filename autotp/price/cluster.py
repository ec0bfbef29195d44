"""Clusters: accelerators and the links between them, read from `cost_models/clusters/*.yaml`.

A cluster is one kind of accelerator and its links, innermost first (NVLink, then InfiniBand). The files are data
that users read, copy and change, so every mistake in them is reported with file, line and key. In Python all
quantities are in bytes, seconds, bytes per second and floating-point operations per second; in the YAML, keys name
their units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from autotp.errors import AutotpError
from autotp.price.accelerator import Accelerator, read_accelerator
from autotp.price.sections import BYTES_PER_SECOND, SECONDS, Section, cost_models_dir, names_in, nearest, open_section

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
"""The collectives that have a price."""

DEFAULT_CLUSTER = "dgx-h100"
"""What plans are for where nothing else is said."""


@dataclass(frozen=True)
class Sweep:
    """A measured collective: `points` of (bytes, seconds) for `ranks` ranks, `stride` devices apart.

    Bytes are counted as in `autotp.price.communication.collective_seconds`.
    """

    kind: str
    ranks: int
    stride: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Link:
    """One tier of the interconnect.

    Attributes:
        tier: its name, e.g. "NVLink".
        devices: how many devices one domain of this tier joins; None for any number.
        bandwidth: bytes/s per device and direction; `efficiency` is the fraction that collectives reach.
        latency: seconds per step of a ring or tree.
        launch: seconds that a collective takes before its first step.
        in_switch_reduction: the switch can sum (NVLink SHARP).
        mesh: each pair has its own wire, so that a group of n out of N devices has (n-1)/(N-1) of the bandwidth.
        sweeps: measured collectives.
    """

    tier: str
    devices: int | None
    bandwidth: float
    efficiency: float
    latency: float
    launch: float
    in_switch_reduction: bool = False
    mesh: bool = False
    sweeps: tuple[Sweep, ...] = ()


@dataclass(frozen=True, eq=False)
class Cluster:
    """Accelerators and the links between them, innermost first. Compared and hashed by identity."""

    name: str
    accelerator: Accelerator
    links: tuple[Link, ...]
    description: str = ""

    @property
    def devices_per_node(self) -> int:
        """Devices in one domain of the innermost link; 1 if that link joins any number."""
        return self.links[0].devices or 1

    @property
    def max_devices(self) -> int | None:
        """The greatest number of devices, or None for any number."""
        return self.links[-1].devices


def cluster_names() -> list[str]:
    """Names that `load_cluster` takes, sorted."""
    return names_in("clusters")


def load_cluster(name_or_path: str | Path) -> Cluster:
    """The cluster of this name, or of this YAML file (a `Path`, or text with a slash or ending in .yaml or .yml).

    Raises:
        AutotpError: no such cluster or file, or the file is wrong; the sentence names file, line and key.
    """
    path = _cluster_path(name_or_path)
    top = _open_cluster(path)
    accelerator = read_accelerator(top.reference("accelerator"))
    description = top.text("description", "")
    links = tuple(_read_link(section) for section in top.sections("links"))
    top.finish()
    limits = [math.inf if link.devices is None else link.devices for link in links]
    if any(inner >= outer for inner, outer in pairwise(limits)):
        raise top.error("links", "must stand innermost first, each joining more devices than the one before it")
    for position, link in enumerate(links):
        reach = links[position - 1].devices or 0 if position else 1
        for sweep in link.sweeps:
            if not reach < sweep.ranks * sweep.stride <= limits[position]:
                found = f"measures {sweep.kind} of {sweep.ranks} ranks, stride {sweep.stride}, at tier {link.tier!r}"
                raise top.error("links", f"{found}, which is not the tier that these ranks cross: move it there")
    return Cluster(path.stem, accelerator, links, description)


def _read_link(section: Section) -> Link:
    link = Link(
        tier=section.text("tier"),
        devices=None if section.text("devices") == "any" else section.integer("devices", least=2),
        bandwidth=section.quantity("bandwidth", BYTES_PER_SECOND),
        efficiency=section.fraction("efficiency", 0.8),
        latency=section.quantity("latency", SECONDS),
        launch=section.quantity("launch", SECONDS),
        in_switch_reduction=section.choice("in_switch_reduction", {"true": True, "false": False}, "false"),
        mesh=section.choice("topology", {"switch": False, "mesh": True}, "switch"),
        sweeps=tuple(_read_sweep(entry) for entry in section.sections("measured", required=False)),
    )
    section.finish()
    if link.mesh and (link.devices or 0) < 2:
        raise section.error("topology", "mesh needs a number of devices, at least 2")
    return link


def _read_sweep(section: Section) -> Sweep:
    kind = section.choice("collective", {kind: kind for kind in KINDS})
    ranks = section.integer("ranks", least=2)
    sweep = Sweep(kind, ranks, section.integer("stride", 1), section.points("time_us_by_bytes"))
    section.finish()
    return sweep


def _cluster_path(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise AutotpError(f"no cluster file {path}: give the path of a YAML file, or run `autotp clusters`")
        return path
    names = cluster_names()
    if text not in names and Path(text).is_file():
        raise AutotpError(f"the file {text} is no cluster: give a YAML file (.yaml or .yml) or a name from `autotp clusters`")
    if text not in names:
        raise AutotpError(f"unknown cluster {text!r}{nearest(text, names)}; run `autotp clusters` for the list")
    return cost_models_dir() / "clusters" / f"{text}.yaml"


def _open_cluster(path: Path, seen: tuple[Path, ...] = ()) -> Section:
    """The file's top mapping over that of the cluster that its `base:` names, if any."""
    section = open_section(path)
    if "base" in section.entries:
        base = _cluster_path(section.text("base"))
        if base in seen:
            raise section.error("base", f"leads back to {base.name}: start from a cluster that has no such base")
        section.entries = {**_open_cluster(base, (*seen, base)).entries, **section.entries}
    section.expected.add("base")
    return section

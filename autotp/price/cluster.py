"""Clusters: accelerators and the links between them, read from `cost_models/clusters/*.yaml`.

A cluster is one kind of accelerator and its links, innermost first (NVLink, then InfiniBand). The files are data
that users read, copy and change, so every mistake in them is reported with file, line and key. In Python all
quantities are in bytes, seconds, bytes per second and floating-point operations per second; in the YAML, keys name
their units.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from autotp.errors import AutotpError
from autotp.price.accelerator import Accelerator, read_accelerator
from autotp.price.sections import BYTES_PER_SECOND, SECONDS, Section, cost_models_dir, names_in, nearest, open_section

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
"""The collectives that have a price."""

TOPOLOGIES = ("switch", "mesh", "ring", "pcie_tree")
"""How a tier joins its devices, or the domains of the tier below."""

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
        bandwidth: bytes/s per direction of each device, or of each port; `efficiency` is the fraction that collectives reach.
        latency: seconds per hop of a ring or tree.
        launch: seconds that a collective takes before its first hop.
        in_switch_reduction: the switch can sum (NVLink SHARP).
        sweeps: measured collectives.
        topology: one of `TOPOLOGIES`. Of the bandwidth that each of N devices (or domains of the tier below) has,
            "switch": all is there for any peer;
            "mesh": each pair has its own wire, so that a group of n has (n-1)/(N-1) of it;
            "ring": half goes to either neighbour;
            "pcie_tree": all is there for any peer, but everything passes the host, which passes `root` altogether.
        ports: ports that the devices of one domain of the tier below share; None for a port per device.
        root: bytes/s per direction that the host passes for all devices of a domain; only of "pcie_tree".
    """

    tier: str
    devices: int | None
    bandwidth: float
    efficiency: float
    latency: float
    launch: float
    in_switch_reduction: bool = False
    sweeps: tuple[Sweep, ...] = ()
    topology: str = "switch"
    ports: int | None = None
    root: float | None = None


@dataclass(frozen=True, eq=False)
class Cluster:
    """Accelerators and the links between them, innermost first. Compared and hashed by identity.

    `node` is the number of devices of a node, where that is not a domain of the innermost link.
    """

    name: str
    accelerator: Accelerator
    links: tuple[Link, ...]
    description: str = ""
    node: int | None = None

    @property
    def devices_per_node(self) -> int:
        """Devices of a node: `node`, else those in one domain of the innermost link; 1 if that link joins any number."""
        return self.node or self.links[0].devices or 1

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
    top = _open_cluster(path, (path.resolve(),))
    accelerator = read_accelerator(top.reference("accelerator"))
    description = top.text("description", "")
    links: list[Link] = []
    for section in top.sections("links"):
        links.append(_read_link(section, links))
    node = top.integer("devices_per_node") if "devices_per_node" in top.entries else None
    top.expected.add("devices_per_node")
    top.finish()
    domains = [link.devices for link in links if link.devices]
    if node is not None and node not in domains:
        joined = ", ".join(map(str, domains)) or "any number"
        raise top.error("devices_per_node", f"is {node}, but the tiers join {joined}: give the number of one of them")
    return Cluster(path.stem, accelerator, tuple(links), description, node)


def _read_link(section: Section, inner: list[Link]) -> Link:
    """The next link after those that stand further inside."""
    tier = section.text("tier")
    if tier in (link.tier for link in inner):
        raise section.error("tier", f"is {tier!r} a second time: give every tier its own name")
    below = inner[-1].devices if inner else 1
    if below is None:
        raise section.error("tier", f"stands after {inner[-1].tier!r}, which joins any number of devices: let that be the last tier")
    devices = None if section.text("devices") == "any" else section.integer("devices", least=2)
    if devices is not None and (devices <= below or devices % below):
        domain = f"{below}, the devices of one {inner[-1].tier!r} domain" if inner else "1"
        raise section.error("devices", f"is {devices} but must be a multiple of {domain}: tiers stand innermost first")
    topology = section.choice("topology", {word: word for word in TOPOLOGIES}, "switch")
    if topology != "switch" and devices is None:
        raise section.error("topology", f"is {topology}, which needs a number of devices instead of any")
    roots = [key for key in section.entries if key.startswith("root_bandwidth")]
    if roots and topology != "pcie_tree":
        raise section.error(roots[0], f"belongs to the topology pcie_tree, but the topology is {topology}: remove it")
    link = Link(
        tier,
        devices,
        bandwidth=section.quantity("bandwidth", BYTES_PER_SECOND),
        efficiency=section.fraction("efficiency", 0.8),
        latency=section.quantity("latency", SECONDS),
        launch=section.quantity("launch", SECONDS),
        in_switch_reduction=section.choice("in_switch_reduction", {"true": True, "false": False}, "false"),
        sweeps=_read_sweeps(section, below, devices),
        topology=topology,
        ports=section.integer("shared_ports") if "shared_ports" in section.entries else None,
        root=section.quantity("root_bandwidth", BYTES_PER_SECOND) if topology == "pcie_tree" else None,
    )
    section.expected.add("shared_ports")
    section.finish()
    if link.ports and not inner:
        raise section.error("shared_ports", "is of no use at the innermost tier: give the bandwidth of a device")
    if link.in_switch_reduction and topology != "switch":
        raise section.error("in_switch_reduction", f"needs a switch, but the topology is {topology}")
    return link


def _read_sweeps(link: Section, below: int, devices: int | None) -> tuple[Sweep, ...]:
    """The sweeps of a link that joins `devices`, in domains of `below`."""
    sweeps: dict[tuple[str, int, int], Sweep] = {}
    for section in link.sections("measured", required=False):
        kind = section.choice("collective", {kind: kind for kind in KINDS})
        ranks, stride = section.integer("ranks", least=2), section.integer("stride", 1)
        what = f"{kind} of {ranks} ranks, stride {stride}"
        move = "move it to the tier that these ranks cross"
        if devices is not None and ranks * stride > devices:
            raise section.error("ranks", f"measures {what}, more than the {devices} devices of this tier: {move}")
        if ranks * stride <= below:
            raise section.error("ranks", f"measures {what}, inside one domain of {below} devices: {move}")
        if (kind, ranks, stride) in sweeps:
            raise section.error("ranks", f"measures {what}, a second time: leave one of the two out, or join their points")
        sweeps[kind, ranks, stride] = Sweep(kind, ranks, stride, section.points("time_us_by_bytes"))
        section.finish()
    return tuple(sweeps.values())


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


def _open_cluster(path: Path, seen: tuple[Path, ...]) -> Section:
    """The file's top mapping over that of the cluster that its `base:` names, if any; `seen` are the files that led here."""
    section = open_section(path)
    section.expected.add("base")
    if "base" not in section.entries:
        return section
    word = section.text("base")
    beside = path.parent / word
    try:
        base = beside if beside.is_file() else _cluster_path(word)
    except AutotpError as error:
        raise section.error("base", f"names no cluster: {error}") from error
    if base.resolve() in seen:
        raise section.error("base", f"leads back to {base.name}: start from a cluster that has no such base")
    inherited = _open_cluster(base, (*seen, base.resolve())).entries
    if "links" in section.entries and "links" in inherited:
        section.entries["links"] = _links_over(section.entries["links"], inherited["links"])
    section.entries = {**inherited, **section.entries}
    return section


def _links_over(ours: yaml.Node, theirs: yaml.Node) -> yaml.Node:
    """Our links, where a tier that the base has too starts from the base's keys."""
    if not isinstance(ours, yaml.SequenceNode) or not isinstance(theirs, yaml.SequenceNode):
        return ours
    base = {str(keys["tier"].value): keys for link in theirs.value if "tier" in (keys := _keys(link))}
    links = []
    for link in ours.value:
        keys = _keys(link)
        known = base.get(str(keys["tier"].value), {}) if "tier" in keys else {}
        kept = [(key, value) for key, value in known.items() if key not in keys]
        names = [(yaml.ScalarNode("tag:yaml.org,2002:str", key, value.start_mark), value) for key, value in kept]
        links.append(yaml.MappingNode(link.tag, names + link.value, link.start_mark, link.end_mark) if kept else link)
    return yaml.SequenceNode(ours.tag, links, ours.start_mark, ours.end_mark)


def _keys(link: yaml.Node) -> dict[str, yaml.Node]:
    """The keys of a mapping; of anything else, none."""
    return {str(key.value): value for key, value in link.value} if isinstance(link, yaml.MappingNode) else {}

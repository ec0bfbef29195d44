"""Hardware descriptions: accelerators and clusters, read from YAML.

A cluster is one kind of accelerator and its links, innermost first (NVLink, then InfiniBand). The files are data
that users read, copy and change, so every mistake in them is reported with file, line and key. In Python all
quantities are in bytes, seconds, bytes per second and floating-point operations per second; in the YAML, keys name
their units.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import yaml

from autotp.errors import AutotpError

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
"""The collectives that have a price."""

BYTES = {"bytes": 1.0, "gb": 1e9, "gib": 2.0**30}
BYTES_PER_SECOND = {"gb_per_s": 1e9, "tb_per_s": 1e12, "gbit_per_s": 1e9 / 8}
SECONDS = {"us": 1e-6, "ns": 1e-9, "ms": 1e-3}
T = TypeVar("T")
DEFAULT_CLUSTER = "dgx-h100"
"""What plans are for where nothing else is said."""
PEAKS = ("fp64", "fp32", "bf16", "fp16", "fp8", "int8")


@dataclass(frozen=True)
class Gemm:
    """How fast matrix products of a given shape run; see `autotp.price.compute` for the formula.

    Attributes:
        units: processors that work on output tiles at the same time (SMs, compute units, cores).
        tiles: output tiles (rows, columns) that the library's kernels use.
        efficiency: fraction of peak inside a long product of large tiles.
        max_efficiency: fraction of peak that no whole product exceeds (power and clocks included).
        tile_overhead: c in a tile's loss 1 + c·(1/rows + 1/columns), in elements: small tiles reload operands more
            often. The loss counts relative to the first tile, for which `efficiency` holds.
        k_overhead: start and end of a tile, in elements of k.
        split_k_seconds: extra time when k is split over several processors.
        alignment_bytes, misaligned_efficiency: rows that are no multiple of these bytes long run at this fraction.
    """

    units: int
    tiles: tuple[tuple[int, int], ...]
    efficiency: float
    max_efficiency: float
    tile_overhead: float
    k_overhead: float
    split_k_seconds: float
    alignment_bytes: int
    misaligned_efficiency: float


@dataclass(frozen=True, eq=False)
class Accelerator:
    """One device as PyTorch sees it.

    Attributes:
        name: the YAML file's stem.
        memory_bytes: device memory in bytes.
        bandwidth: peak memory bandwidth in bytes/s; `bandwidth_efficiency` is the fraction that a long copy reaches.
        launch_seconds: duration of the shortest kernel.
        peak_flops: FLOP/s by "fp64", "fp32", "bf16", "fp16", "fp8", "int8"; dense, without TF32 for "fp32".
        attention_efficiency: fraction of peak that fused attention reaches on long sequences.
        gemm: matrix product constants.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bandwidth_efficiency: float
    launch_seconds: float
    peak_flops: Mapping[str, float]
    attention_efficiency: float
    gemm: Gemm


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


def cost_models_dir() -> Path:
    """The folder of the YAML files: `autotp/cost_models` in a wheel, `cost_models` at the top of a source checkout.

    Raises:
        AutotpError: neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cost_models", package.parent / "cost_models"):
        if (folder / "clusters").is_dir():
            return folder
    raise AutotpError(f"no cost_models folder beside {package}: reinstall autotp")


def cluster_names() -> list[str]:
    """Names that `load_cluster` takes, sorted."""
    return _names("clusters")


def accelerator_names() -> list[str]:
    """Names that a cluster's `accelerator:` takes, sorted."""
    return _names("accelerators")


def load_cluster(name_or_path: str | Path) -> Cluster:
    """The cluster of this name, or of this YAML file (a `Path`, or text with a slash or ending in .yaml or .yml).

    Raises:
        AutotpError: no such cluster or file, or the file is wrong; the sentence names file, line and key.
    """
    path = _cluster_path(name_or_path)
    top = _open_cluster(path)
    accelerator = _read_accelerator(top)
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


def _read_accelerator(cluster: _Section) -> Accelerator:
    """The accelerator written inside the cluster's file, or the one that it names."""
    section = cluster.reference("accelerator")
    peaks = section.section("peak_tflops")
    given = [key for key in PEAKS if key == "fp32" or key in peaks.entries]
    peak_flops = {key: 1e12 * peaks.number(key, positive=True) for key in given}
    peaks.expected.update(PEAKS)
    peaks.finish()
    gemm = section.section("gemm")
    accelerator = Accelerator(
        name=section.name,
        memory_bytes=int(section.quantity("memory", BYTES)),
        bandwidth=section.quantity("bandwidth", BYTES_PER_SECOND),
        bandwidth_efficiency=section.fraction("bandwidth_efficiency", 0.9),
        launch_seconds=section.quantity("launch", SECONDS),
        peak_flops=peak_flops,
        attention_efficiency=section.fraction("attention_efficiency", 0.4),
        gemm=Gemm(
            units=gemm.integer("units"),
            tiles=gemm.pairs("tiles"),
            efficiency=gemm.fraction("efficiency"),
            max_efficiency=gemm.fraction("max_efficiency"),
            tile_overhead=gemm.number("tile_overhead"),
            k_overhead=gemm.number("k_overhead"),
            split_k_seconds=gemm.quantity("split_k", SECONDS),
            alignment_bytes=gemm.integer("alignment_bytes", 1),
            misaligned_efficiency=gemm.fraction("misaligned_efficiency", 1.0),
        ),
    )
    gemm.finish()
    section.text("description", "")
    section.finish()
    return accelerator


def _read_link(section: _Section) -> Link:
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


def _read_sweep(section: _Section) -> Sweep:
    kind = section.choice("collective", {kind: kind for kind in KINDS})
    ranks = section.integer("ranks", least=2)
    sweep = Sweep(kind, ranks, section.integer("stride", 1), section.points("time_us_by_bytes"))
    section.finish()
    return sweep


def _names(folder: str) -> list[str]:
    return sorted(path.stem for path in (cost_models_dir() / folder).glob("*.yaml"))


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
        raise AutotpError(f"unknown cluster {text!r}{_nearest(text, names)}; run `autotp clusters` for the list")
    return cost_models_dir() / "clusters" / f"{text}.yaml"


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(found)}?" if found else ""


def _open(path: Path) -> _Section:
    """The file's top mapping."""
    try:
        with path.open(encoding="utf-8") as stream:
            node = yaml.compose(stream, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise AutotpError(f"{path}, line {line}: not valid YAML, {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AutotpError(f"cannot read {path}: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise AutotpError(f"{path}, line 1: must be a mapping of keys, such as `accelerator: h100-sxm`")
    return _Section(node, path, path.stem)


def _open_cluster(path: Path, seen: tuple[Path, ...] = ()) -> _Section:
    """The file's top mapping over that of the cluster that its `base:` names, if any."""
    section = _open(path)
    if "base" in section.entries:
        base = _cluster_path(section.text("base"))
        if base in seen:
            raise section.error("base", f"leads back to {base.name}: start from a cluster that has no such base")
        section.entries = {**_open_cluster(base, (*seen, base)).entries, **section.entries}
    section.expected.add("base")
    return section


class _Section:
    """One mapping of a file, read key by key; `finish` refuses the keys that nobody read."""

    def __init__(self, node: yaml.MappingNode, path: Path, name: str) -> None:
        self.node, self.path, self.name = node, path, name
        self.entries: dict[str, yaml.Node] = {}
        self.expected: set[str] = {"source"}
        for key, value in node.value:
            word = str(key.value)
            if word in self.entries:
                raise AutotpError(f"{path}, line {key.start_mark.line + 1}: {word!r} stands here a second time")
            self.entries[word] = value

    def error(self, key: str, message: str) -> AutotpError:
        mark = self.entries.get(key, self.node).start_mark
        return AutotpError(f"{mark.name}, line {mark.line + 1}: {key!r} {message}")

    def finish(self) -> None:
        for key in self.entries:
            if key not in self.expected:
                hint = _nearest(key, self.expected) or f"; known keys: {', '.join(sorted(self.expected))}"
                raise self.error(key, f"is no known key{hint}")

    def scalar(self, key: str, wanted: str, default: str | None = None) -> str:
        self.expected.add(key)
        node = self.entries.get(key)
        if node is None and default is not None:
            return default
        if node is None:
            raise self.error(key, f"is missing: add it as {wanted}")
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(key, f"must be {wanted}")
        return str(node.value)

    def text(self, key: str, default: str | None = None) -> str:
        return self.scalar(key, "text", default)

    def choice(self, key: str, values: dict[str, T], default: str | None = None) -> T:
        wanted = " or ".join(values)
        word = self.scalar(key, wanted, default)
        if word not in values:
            raise self.error(key, f"is {word!r} but must be {wanted}")
        return values[word]

    def number(self, key: str, default: float | None = None, positive: bool = False, unit: str = "number") -> float:
        wanted = f"a {unit}{' greater than 0' if positive else ', at least 0'}"
        text = self.scalar(key, wanted, None if default is None else repr(default))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise self.error(key, f"is {text!r} but must be {wanted}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.number(key, default)
        if value != int(value) or value < least:
            raise self.error(key, f"is {value:g} but must be a whole number, at least {least}")
        return int(value)

    def fraction(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default, positive=True)
        if value > 1:
            raise self.error(key, f"is {value:g} but must be a fraction between 0 and 1")
        return value

    def quantity(self, stem: str, units: dict[str, float]) -> float:
        """A number whose key ends in its unit, e.g. `memory_gb`, in base units."""
        keys = [f"{stem}_{unit}" for unit in units]
        self.expected.update(keys)
        found = [key for key in keys if key in self.entries]
        if len(found) != 1:
            wrong = [key for key in self.entries if key not in self.expected and key.startswith(stem)]
            problem = "is given twice" if found else "has no known unit" if wrong else "is missing"
            raise self.error((found + wrong + keys)[0], f"{problem}: give exactly one of {', '.join(keys)}")
        unit = found[0].removeprefix(f"{stem}_")
        return self.number(found[0], positive=units is not SECONDS, unit=f"number of {unit}") * units[unit]

    def section(self, key: str) -> _Section:
        """The mapping under `key`."""
        self.expected.add(key)
        node = self.entries.get(key)
        if not isinstance(node, yaml.MappingNode):
            raise self.error(key, "must be a mapping of keys" if node else "is missing: add it as a mapping of keys")
        return _Section(node, self.path, self.name)

    def sections(self, key: str, required: bool = True) -> list[_Section]:
        """The list of mappings under `key`."""
        self.expected.add(key)
        node = self.entries.get(key)
        if node is None and not required:
            return []
        items = node.value if isinstance(node, yaml.SequenceNode) else []
        if not items or not all(isinstance(item, yaml.MappingNode) for item in items):
            raise self.error(key, "must be a list of mappings" if node else "is missing: add it as a list of mappings")
        return [_Section(item, self.path, self.name) for item in items]

    def reference(self, key: str) -> _Section:
        """The mapping under `key`, or that of the accelerator file that it names."""
        if isinstance(self.entries.get(key), yaml.MappingNode):
            return self.section(key)
        word = self.scalar(key, "the name of an accelerator, a YAML file, or a mapping")
        if word.endswith((".yaml", ".yml")) and (self.path.parent / word).is_file():
            return _open(self.path.parent / word)
        if word not in accelerator_names():
            raise self.error(key, f"names no known accelerator {word!r}{_nearest(word, accelerator_names())}")
        return _open(cost_models_dir() / "accelerators" / f"{word}.yaml")

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        """A list of pairs of whole numbers, such as `[[128, 256], [64, 64]]`."""
        self.expected.add(key)
        node = self.entries.get(key)
        try:
            rows = yaml.safe_load(yaml.serialize(node)) if node else None
            found = tuple((int(first), int(second)) for first, second in rows or ())
        except (TypeError, ValueError, yaml.YAMLError):
            found = ()
        if not found or min(map(min, found)) < 1:
            raise self.error(key, "must be a list of pairs of whole numbers, such as [[128, 256], [64, 64]]")
        return found

    def points(self, key: str) -> tuple[tuple[float, float], ...]:
        """A mapping of bytes to microseconds, as ((bytes, seconds), …) with growing bytes."""
        table = self.section(key)
        points = []
        for size in table.entries:
            if not size.isdigit() or int(size) == 0:
                raise table.error(size, "must be a whole number of bytes, at least 1")
            points.append((float(size), 1e-6 * table.number(size, positive=True, unit="number of us")))
        if not points:
            raise self.error(key, "is empty: give bytes and microseconds, such as {65536: 15.2, 131072: 16.8}")
        return tuple(sorted(points))

"""How well collectives are priced where nothing was measured: `python -m tests.benchmarks.collective_accuracy --data FOLDER`.

FOLDER holds `openxla_collectives.csv` (OpenXLA's performance tables: arch, collective, dtype, n_ranks, total_bytes,
time_us) and `published_figures.yaml` (rows of kind `collective`: hardware, model, ranks, total_bytes, and time or bus
bandwidth). Rows below 64 KiB, which carry first-call artefacts, are left out.

Four tables, each with the relative error |predicted / measured - 1|:

1. a point left out: every measured point that stands in a cluster's YAML file, predicted without it;
2. a sweep left out: the same points, predicted without all sweeps of their collective and group size at that tier;
3. links alone: the same points, predicted without any sweep, as for clusters that have none;
4. measured elsewhere: published points that stand in no file (other software, another machine with the same links).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
import yaml
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autotp.price.cluster import Cluster, Link, Sweep, load_cluster
from autotp.price.communication import Group, collective_seconds

LEAST_BYTES = 65536
CLUSTER_OF_ARCH = {"sm_90": "dgx-h100", "sm_100_B200": "hgx-b200", "sm_100_GB200": "nvl72", "gfx950": "mi355x-8"}
CLUSTER_OF_HARDWARE = {"A100": "dgx-a100", "H100": "dgx-h100", "H200": "hgx-h200", "B200": "hgx-b200", "MI300X": "mi300x-8"}
BUS_SHARE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


@dataclass(frozen=True)
class Measured:
    """One published time: `seconds` of a collective on the full tensor's `nbytes`, among `ranks` neighbours."""

    cluster: str
    kind: str
    ranks: int
    nbytes: float
    seconds: float


def openxla(path: Path) -> list[Measured]:
    """The rows of OpenXLA's tables whose architecture one of our clusters describes."""
    with path.open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["arch"] in CLUSTER_OF_ARCH]
    return [
        Measured(
            CLUSTER_OF_ARCH[row["arch"]],
            row["collective"].replace("-", "_"),
            int(row["n_ranks"]),
            float(row["total_bytes"]),
            float(row["time_us"]) * 1e-6,
        )
        for row in rows
    ]


def published(path: Path) -> list[Measured]:
    """The rows of confidence A whose hardware, ranks and bytes are known."""
    found = []
    for row in yaml.safe_load(path.read_text(encoding="utf-8"))["rows"]:
        if row["kind"] != "collective" or row["confidence"] != "A" or not isinstance(row.get("ranks"), int):
            continue
        names = [name for word, name in CLUSTER_OF_HARDWARE.items() if word in row["hardware"]]
        if len(names) != 1:
            continue
        kind, ranks, nbytes = row["model"], row["ranks"], float(row["total_bytes"])
        moved = BUS_SHARE[kind] * (ranks - 1) / ranks * nbytes
        seconds = row["value"] * 1e-6 if row["unit"] == "us" else moved / (row["value"] * 1e9)
        found.append(Measured(names[0], kind, ranks, nbytes, seconds))
    return found


def stands_in(cluster: Cluster, point: Measured) -> bool:
    """Whether the cluster's file has this very point; times in files are rounded to 4 or 5 digits."""
    return any(
        (sweep.kind, sweep.ranks) == (point.kind, point.ranks)
        and nbytes == point.nbytes
        and math.isclose(seconds, point.seconds, rel_tol=1e-3)
        for link in cluster.links
        for sweep in link.sweeps
        for nbytes, seconds in sweep.points
    )


def without(cluster: Cluster, keep: Callable[[Sweep, float], bool]) -> Cluster:
    """The cluster with only those points of its sweeps that are to be kept."""

    def shortened(link: Link) -> Link:
        sweeps = (replace(sweep, points=tuple(p for p in sweep.points if keep(sweep, p[0]))) for sweep in link.sweeps)
        return replace(link, sweeps=tuple(sweep for sweep in sweeps if sweep.points))

    return replace(cluster, links=tuple(shortened(link) for link in cluster.links))


def without_point(cluster: Cluster, point: Measured) -> Cluster:
    return without(cluster, lambda sweep, nbytes: (sweep.kind, sweep.ranks, nbytes) != (point.kind, point.ranks, point.nbytes))


def without_sweep(cluster: Cluster, point: Measured) -> Cluster:
    return without(cluster, lambda sweep, _: (sweep.kind, sweep.ranks) != (point.kind, point.ranks))


def error(cluster: Cluster, point: Measured) -> float:
    """|predicted / measured - 1|."""
    return abs(collective_seconds(cluster, point.kind, point.nbytes, Group(point.ranks)) / point.seconds - 1)


def summary(title: str, errors: Iterable[tuple[Measured, float]]) -> Table:
    """One row per cluster and kind, and the total."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("cluster", "collective"):
        table.add_column(name, no_wrap=True)
    table.add_column("ranks")
    for name in ("points", "median", "p90", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[tuple[Measured, float]]] = {}
    for point, value in errors:
        groups.setdefault((point.cluster, point.kind), []).append((point, value))
    everything = [pair for pairs in groups.values() for pair in pairs]
    for (cluster, kind), pairs in [*sorted(groups.items()), (("all", ""), everything)]:
        values = sorted(value for _, value in pairs)
        ranks = "" if cluster == "all" else ", ".join(map(str, sorted({point.ranks for point, _ in pairs})))
        figures = (median(values), values[math.ceil(0.9 * len(values)) - 1], values[-1]) if values else ()
        table.add_row(cluster, kind, ranks, str(len(values)), *(f"{100 * figure:.1f} %" for figure in figures))
    return table


def main(data: Annotated[Path, typer.Option(help="The folder of the published figures.")]) -> None:
    """Errors of predicted collectives against published ones."""
    points = openxla(data / "openxla_collectives.csv") + published(data / "published_figures.yaml")
    points = [point for point in points if point.nbytes >= LEAST_BYTES]
    clusters = {name: load_cluster(name) for name in sorted({point.cluster for point in points})}
    ours = [point for point in points if stands_in(clusters[point.cluster], point)]
    others = [point for point in points if not stands_in(clusters[point.cluster], point)]
    console = Console()
    tables: tuple[tuple[str, list[Measured], Callable[[Cluster, Measured], Cluster]], ...] = (
        ("A point left out", ours, without_point),
        ("A sweep left out", ours, without_sweep),
        ("Links alone", ours, lambda cluster, _: without(cluster, lambda *_: False)),
        ("Measured elsewhere", others, lambda cluster, _: cluster),
    )
    for title, chosen, view in tables:
        known: dict[tuple[str, str, int], Cluster] = {}
        found = []
        for point in track(chosen, title, console=Console(stderr=True), transient=True):
            cluster = view(clusters[point.cluster], point)
            if view is without_sweep:  # one cluster for all points of the sweep, for its curves are kept
                cluster = known.setdefault((point.cluster, point.kind, point.ranks), cluster)
            found.append((point, error(cluster, point)))
        console.print(summary(title, found))


if __name__ == "__main__":
    typer.run(main)

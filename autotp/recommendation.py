"""Meshes worth trying on a cluster, what was found for each, and how they rank. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import TYPE_CHECKING

from autotp.errors import AutotpError
from autotp.price.cluster import Cluster

if TYPE_CHECKING:  # it brings torch, which a wrong number of devices does not need
    from autotp.plans import Plan

TIE = 0.02
"""Step times that differ by less, relative, count as equal: fewer devices, then the simpler mesh, come first."""

NODES = 2
"""Tensor parallelism is tried over at most this many nodes: it communicates in every layer, over the slowest link it crosses."""


@dataclass(frozen=True)
class Candidate:
    """One mesh, planned.

    Attributes:
        mesh: axis name → size, outermost first: `dp` splits the batch, `tp` never does.
        plan: its fastest plan within the memory limit; None if there is none.
        least_bytes: where no plan fits, bytes per device below which none can go; None if the solver ran out of time.
    """

    mesh: Mapping[str, int]
    plan: Plan | None
    least_bytes: float | None = None

    @property
    def gpus(self) -> int:
        """How many devices it uses."""
        return prod(self.mesh.values())

    @property
    def tensor_parallel(self) -> int:
        """Size of the `tp` axis; 1 without one."""
        return self.mesh.get("tp", 1)

    @property
    def step_s(self) -> float:
        """Predicted seconds per step; infinite without a plan."""
        return self.plan.time.step_s if self.plan else inf


@dataclass(frozen=True)
class Recommendation:
    """Meshes of one cluster at one batch, best first. `print(recommendation)` shows them as a table.

    Attributes:
        gpus: most devices that were allowed; node: devices of one node.
        batch, sequence: samples per step over all devices, and tokens in each; None where the model has no such size.
        memory_limit: bytes per device that a plan may use, of `device_bytes`.
        candidates: those that fit by rank, then those that do not, by the memory they need.
        remedies: where nothing fits, what would.
    """

    model: str
    mode: str
    cluster: str
    gpus: int
    node: int
    batch: int | None
    sequence: int | None
    memory_limit: float
    device_bytes: float
    candidates: tuple[Candidate, ...]
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The first that fits."""
        return next((candidate for candidate in self.candidates if candidate.plan), None)

    @property
    def verdict(self) -> str:
        """One sentence: what to use and why, or what would be needed."""
        from autotp.report_recommend import verdict  # pages stand after what they show; only printing needs them

        return verdict(self)

    def __str__(self) -> str:
        from autotp.report_recommend import render

        return render(self)


def check_devices(cluster: Cluster, gpus: int) -> None:
    """Refuse a number of devices that the cluster does not have, or that is no whole number of its nodes.

    Raises:
        AutotpError: so it is.
    """
    if not isinstance(gpus, int) or isinstance(gpus, bool) or gpus < 1:
        raise AutotpError(f"the number of GPUs is {gpus!r}, but must be a whole number of at least 1")
    if cluster.max_devices is not None and gpus > cluster.max_devices:
        raise AutotpError(
            f"{gpus} GPUs are more than the {cluster.max_devices} of {cluster.name}: take fewer, or another cluster (`autotp clusters`)"
        )
    node = node_size(cluster, gpus)
    if gpus > node and gpus % node:
        near = gpus // node * node
        raise AutotpError(
            f"{gpus} GPUs are no whole number of nodes: {cluster.name} has {node} in each; take {near} or {near + node}, or at most {node}"
        )


def node_size(cluster: Cluster, gpus: int) -> int:
    """Devices of a node; all of them where the innermost link joins any number."""
    return cluster.node or cluster.links[0].devices or gpus


def divisors(number: int) -> list[int]:
    """All divisors, in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def meshes_of(gpus: int, node: int, batch: int | None) -> list[dict[str, int]]:
    """Every mesh dp × tp of a divisor of `gpus`, the most promising first: many devices, tensor parallelism inside a node.

    Args:
        node: devices that the fastest link joins; `tp` divides a node, or is whole nodes (at most `NODES`).
        batch: samples per step, which `dp` divides; None: no batch to split.
    """
    found = []
    for count in divisors(gpus):
        for tp in divisors(count):
            inside = node % tp == 0 or count <= node
            if (inside or (tp % node == 0 and tp <= NODES * node)) and (batch or 1) % (count // tp) == 0:
                found.append((count, tp))
    order = sorted(found, key=lambda item: (-item[0], item[1] > node, -item[1]))
    return [{"dp": count // tp} | ({"tp": tp} if tp > 1 else {}) if count > tp else {"tp": tp} for count, tp in order]


def mesh_name(mesh: Mapping[str, int]) -> str:
    """`1 GPU`, `tp=4` or `dp=2 × tp=4`."""
    return " × ".join(f"{name}={size}" for name, size in mesh.items()) if prod(mesh.values()) > 1 else "1 GPU"


def ranked(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those with a plan by step time, ties to fewer devices and then the simpler mesh; then the others by the memory they need."""
    left = [candidate for candidate in candidates if candidate.plan]
    without = [candidate for candidate in candidates if not candidate.plan]
    found: list[Candidate] = []
    while left:
        fastest = min(candidate.step_s for candidate in left)
        close = [candidate for candidate in left if candidate.step_s <= fastest * (1 + TIE)]
        found.append(min(close, key=_simplicity))
        left.remove(found[-1])
    return (*found, *sorted(without, key=lambda candidate: (candidate.least_bytes or inf, *_simplicity(candidate))))


def _simplicity(candidate: Candidate) -> tuple[float, ...]:
    return candidate.gpus, len(candidate.mesh), candidate.tensor_parallel, candidate.step_s


def fastest(candidates: Sequence[Candidate]) -> float:
    """The least step time; infinite if nothing fits."""
    return min((candidate.step_s for candidate in candidates), default=inf)

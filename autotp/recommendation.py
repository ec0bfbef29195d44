"""Meshes worth trying on a cluster, what was found for each, and how they rank. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import TYPE_CHECKING

from autotp.mesh_shapes import data_axes, data_parallel

if TYPE_CHECKING:  # it brings torch, which a wrong number of devices does not need
    from autotp.plans import Plan

TIE = 0.02
"""Step times that differ by less, relative, count as equal: fewer devices, then the simpler mesh, come first."""

USABLE = 0.95
"""Share of a device's memory that a plan may fill by default; the rest is left to the driver, NCCL and the allocator's gaps."""

MODEL_ERROR = 0.10
"""Predicted times of layers are off by up to this share (docs/accuracy.md, Layers): smaller differences may be the other way round."""


@dataclass(frozen=True)
class Candidate:
    """One mesh, planned.

    Attributes:
        mesh: axis name → size, outermost first: `dp` and `fsdp` split the batch, `cp` and `tp` never do.
        plan: its fastest plan within the memory limit; None if there is none.
        least_bytes: where no plan fits, bytes per device below which none was found to go.
        bound_s: seconds of the fastest plan without a memory limit, where that one does not fit. Without a plan beside it, none was made
            because none was expected to win. With no plan, least_bytes or bound_s the solver ran out of time.
    """

    mesh: Mapping[str, int]
    plan: Plan | None
    least_bytes: float | None = None
    bound_s: float | None = None

    @property
    def gpus(self) -> int:
        """How many devices it uses."""
        return prod(self.mesh.values())

    @property
    def tensor_parallel(self) -> int:
        """Over how many devices everything but the batch is split; 1 for data parallelism alone."""
        return self.gpus // data_parallel(self.mesh)

    @property
    def tensor_span(self) -> int:
        """Devices from the first to the last that share one sample; neighbours unless a data-parallel axis stands inside."""
        names = list(self.mesh)
        outer = next((place for place, name in enumerate(names) if name not in data_axes(self.mesh)), None)
        return 1 if outer is None else prod(self.mesh[name] for name in names[outer:])

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
        remedies: where nothing fits, what would; `tried`: what else would not.
        left_out: how many meshes were neither planned nor listed: they could not win.
        unit: in which bytes are told: GiB, or GB where the user wrote so.
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
    tried: tuple[str, ...] = ()
    left_out: int = 0
    unit: str = "GiB"

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


def ranked(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those with a plan by step time, ties to fewer devices and then the simpler mesh; those that cannot win; those that do not fit."""
    left = [candidate for candidate in candidates if candidate.plan]
    without = [candidate for candidate in candidates if not candidate.plan]
    found: list[Candidate] = []
    while left:
        fastest = min(candidate.step_s for candidate in left)
        close = [candidate for candidate in left if candidate.step_s <= fastest * (1 + TIE)]
        found.append(min(close, key=_simplicity))
        left.remove(found[-1])
    slower = sorted((one for one in without if one.bound_s is not None), key=lambda one: (one.bound_s or 0.0, *_simplicity(one)))
    large = sorted((one for one in without if one.bound_s is None), key=lambda one: (one.least_bytes or inf, *_simplicity(one)))
    return (*found, *slower, *large)


def _simplicity(candidate: Candidate) -> tuple[float, ...]:
    return candidate.gpus, len(candidate.mesh), candidate.tensor_parallel, candidate.step_s


def fastest(candidates: Iterable[Candidate]) -> float:
    """The least step time; infinite if nothing fits."""
    return min((candidate.step_s for candidate in candidates), default=inf)

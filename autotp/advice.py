"""Which mesh of a cluster to run a model on: every sensible one planned within the device's memory, ranked by time.

A candidate is `dp × tp`: data parallelism outside, tensor parallelism inside, where the links are fastest. It is planned as the 2-D
mesh that it is, with the batch pinned to `dp` and kept from `tp` (`autotp.batch_axes`), inputs and outputs split by it over `dp`.
All candidates of a ranking do the same work in a step: the same global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from autotp.batch_axes import batch_size
from autotp.kpi import rates
from autotp.planning import Request, make_plan
from autotp.price.accelerator import Accelerator
from autotp.price.cluster import DEFAULT_CLUSTER, Cluster, cluster_names, load_cluster
from autotp.program import Program
from autotp.recommendation import TIE, Candidate, Recommendation, check_devices, divisors, fastest, mesh_name, meshes_of, node_size, ranked
from autotp.solve import OutOfMemoryError, OutOfTimeError
from autotp.trace import trace

USABLE = 0.95
"""Share of a device's memory that a plan may fill by default; the rest is left to the driver, NCCL and the allocator's gaps."""

GAP = 1e-3
"""Distance from the optimum, relative, at which the solver may stop: far below a tie."""

DOUBLINGS = 3
"""Where the batch may be chosen: one, two, four and eight samples per device are tried."""

GROWTH = 16
"""Where nothing fits: up to this many times the devices are looked at."""


@dataclass(frozen=True)
class Traced:
    """A model traced at one batch; `batch` and `sequence` are None where it has no such size."""

    program: Program
    batch: int | None
    sequence: int | None
    notes: tuple[str, ...] = ()


TracedAt = Callable[[int], Traced]
"""The model traced at another batch."""


def recommend(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    gpus: int,
    cluster: str | Path | Cluster | None = None,
    mode: str = "train",
    memory: float | None = None,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> Recommendation:
    """Rank the meshes of up to `gpus` devices for one step of `model` at the batch of its example inputs. Needs no GPU.

    Args:
        model, args, kwargs, mode: as for `autotp.plan`.
        gpus: most devices to use.
        cluster: a name that `autotp clusters` lists, a YAML file, or a `Cluster`; by default `dgx-h100`.
        memory: peak bytes allowed per device; by default 95 % of the device's memory.
        time_limit: seconds of the solver for each mesh.
        progress: called with a few words before every mesh.

    Raises:
        AutotpError: the model cannot be traced, or the cluster does not have these devices.
    """
    priced = cluster if isinstance(cluster, Cluster) else load_cluster(cluster or DEFAULT_CLUSTER)
    search = Search(type(model).__name__, gpus, priced, mode, memory, time_limit, progress or (lambda words: None))
    program = trace(model, args, kwargs)
    first = next((node.outputs[0] for node in program.nodes if node.kind == "input"), None)
    of_tokens = first is not None and len(first.hint) == 2 and not first.dtype.is_floating_point
    return search.run(Traced(program, batch_size(program), first.hint[1] if first and of_tokens else None), None)


@dataclass(frozen=True)
class Search:
    """What is asked, apart from the model: see `recommend`.

    Raises:
        AutotpError: the cluster does not have these devices, or not in whole nodes; the mode or the memory is wrong.
    """

    model: str
    gpus: int
    cluster: Cluster
    mode: str
    memory: float | None
    time_limit: float
    progress: Callable[[str], None]

    def __post_init__(self) -> None:
        check_devices(self.cluster, self.gpus)
        Request({"tp": 1}, self.mode, self.memory)

    @property
    def limit(self) -> float:
        """Bytes per device that a plan may use."""
        return self.memory or USABLE * self.cluster.accelerator.memory_bytes

    def run(self, traced: Traced, traced_at: TracedAt | None, *, choose_batch: bool = False) -> Recommendation:
        """Plan and rank every mesh at the batch of `traced`, or at the best one found from there.

        Args:
            traced_at: traces the model at another batch; None if it cannot be.
            choose_batch: double the batch while the best mesh handles more samples per second, or halve it until something fits.
        """
        candidates = self.candidates(traced)
        if choose_batch and traced_at is not None:
            traced, candidates = self.other_batches(traced, candidates, traced_at)
        fits = any(candidate.plan for candidate in candidates)
        remedies = () if fits else self.remedies(traced, None if choose_batch else traced_at)
        order = ranked(candidates)
        notes = order[0].plan.notes if order[0].plan else traced.program.notes
        return Recommendation(
            model=self.model,
            mode=self.mode,
            cluster=self.cluster.name,
            gpus=self.gpus,
            node=node_size(self.cluster, self.gpus),
            batch=traced.batch,
            sequence=traced.sequence,
            memory_limit=self.limit,
            device_bytes=float(self.cluster.accelerator.memory_bytes),
            candidates=order,
            remedies=remedies,
            notes=(*traced.notes, *self.unsplit(traced), *notes),
        )

    def candidates(self, traced: Traced) -> list[Candidate]:
        """Every mesh at this batch, planned."""
        meshes = meshes_of(self.gpus, node_size(self.cluster, self.gpus), traced.batch)
        whole = self.whole_bytes(traced)
        found = []
        for number, mesh in enumerate(meshes, start=1):
            batch = f" at batch {traced.batch}" if traced.batch else ""
            self.progress(f"planning {self.model} on {mesh_name(mesh)}{batch} ({number} of {len(meshes)})")
            found.append(self.candidate(traced, mesh, whole))
        return found

    def whole_bytes(self, traced: Traced) -> float:
        """Peak bytes on one device of any size: n devices together never need less."""
        return make_plan(traced.program, Request({"tp": 1}, self.mode), self.cluster, self.model).memory.total

    def candidate(self, traced: Traced, mesh: Mapping[str, int], whole: float) -> Candidate:
        """One mesh, planned within the memory limit; not at all where even an equal share of the `whole` bytes is too much."""
        share = whole / prod(mesh.values())
        if share > self.limit:
            return Candidate(mesh, None, share)
        request = Request(mesh, self.mode, self.limit, data=tuple(name for name in mesh if name == "dp"))
        try:
            plan = make_plan(traced.program, request, self.cluster, self.model, time_limit=self.time_limit, gap=GAP)
        except OutOfMemoryError as error:
            return Candidate(mesh, None, error.least)
        except OutOfTimeError:
            return Candidate(mesh, None)
        speed = rates(traced.batch, traced.sequence, plan.time.step_s)
        return Candidate(mesh, replace(plan, batch=traced.batch, sequence=traced.sequence, kpi={**plan.kpi, **speed}))

    def other_batches(self, traced: Traced, candidates: list[Candidate], traced_at: TracedAt) -> tuple[Traced, list[Candidate]]:
        """The batch with most samples per second, ties to the smaller one; all meshes are planned anew at each batch."""
        while not any(candidate.plan for candidate in candidates) and (traced.batch or 1) > 1:
            traced = traced_at((traced.batch or 1) // 2)
            candidates = self.candidates(traced)
        start = self.gpus
        while traced.batch and start <= traced.batch < self.gpus * 2**DOUBLINGS:
            more = traced_at(2 * traced.batch)
            found = self.candidates(more)
            if fastest(found) * (1 + TIE) >= 2 * fastest(candidates):
                break
            traced, candidates = more, found
        return traced, candidates

    def remedies(self, traced: Traced, traced_at: TracedAt | None) -> tuple[str, ...]:
        """What would fit: more devices of this cluster, devices with more memory, a smaller batch."""
        found = []
        most = min(self.cluster.max_devices or GROWTH * self.gpus, GROWTH * self.gpus)
        more = [size for size in (self.gpus * 2**power for power in range(1, GROWTH)) if size <= most]
        wider = next(((size, mesh) for size in more if (mesh := replace(self, gpus=size).first_fit(traced))), None)
        if wider is not None:
            found.append(f"{wider[0]} GPUs ({mesh_name(wider[1])})")
        larger = next((cluster for cluster in self.larger_devices() if replace(self, cluster=cluster).first_fit(traced)), None)
        if larger is not None:
            found.append(f"devices with more memory, such as {larger.accelerator.name} (cluster {larger.name})")
        if traced_at is not None and (traced.batch or 1) > 1 and self.first_fit(traced_at(1)):
            halves = [(traced.batch or 1) // 2**power for power in range(1, (traced.batch or 1).bit_length())]
            found.append(f"batch {next(size for size in halves if self.first_fit(traced_at(size)))}")
        return tuple(found)

    def first_fit(self, traced: Traced) -> Mapping[str, int] | None:
        """A mesh of all devices on which the model fits, or None."""
        whole = self.whole_bytes(traced)
        for mesh in meshes_of(self.gpus, node_size(self.cluster, self.gpus), traced.batch):
            if prod(mesh.values()) == self.gpus:
                at = f" at batch {traced.batch}" if traced.batch else ""
                self.progress(f"looking for what would fit: {mesh_name(mesh)} of {self.cluster.name}{at}")
                if self.candidate(traced, mesh, whole).plan:
                    return mesh
        return None

    def larger_devices(self) -> list[Cluster]:
        """Shipped clusters of as many devices with more memory: those of the same family (a100-40gb, a100-80gb) first, then by memory."""
        here = self.cluster.accelerator

        def order(cluster: Cluster) -> tuple[bool, int]:
            return _family(cluster.accelerator) != _family(here), cluster.accelerator.memory_bytes

        shipped = [load_cluster(name) for name in cluster_names() if name != "cpu"]
        enough = [cluster for cluster in shipped if self.gpus <= (cluster.max_devices or self.gpus)]
        larger = [cluster for cluster in enough if cluster.accelerator.memory_bytes > here.memory_bytes]
        return [] if self.memory is not None else sorted(larger, key=order)

    def unsplit(self, traced: Traced) -> list[str]:
        """Why some sizes of the `dp` axis are missing."""
        missing = [str(size) for size in divisors(self.gpus) if (traced.batch or 1) % size]
        if not missing:
            return []
        whose = f"A batch of {traced.batch}" if traced.batch else "A model without a batch"
        return [f"{whose} does not divide into {', '.join(missing)}: data parallelism of that size is left out."]


def _family(device: Accelerator) -> str:
    return device.name.partition("-")[0]

"""Which mesh of a cluster to run a model on: every sensible one planned within the device's memory, ranked by time.

A candidate is `dp × tp`: data parallelism outside, tensor parallelism inside, where the links are fastest. It is planned as the 2-D
mesh that it is, with the batch pinned to `dp` and kept from `tp` (`autotp.batch_axes`), inputs and outputs split by it over `dp`.
The best are also tried with their axes bound to the cluster's tiers in other ways (`autotp.mesh_shapes`).
All candidates of a ranking do the same work in a step: the same global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from autotp.batch_axes import sizes_of
from autotp.mesh_search import MeshSearch, Traced
from autotp.mesh_shapes import check_devices, divisors, mesh_name, meshes_of, meshes_on, node_size
from autotp.planning import Request
from autotp.price.accelerator import Accelerator
from autotp.price.cluster import DEFAULT_CLUSTER, Cluster, cluster_names, load_cluster
from autotp.recommendation import TIE, USABLE, Candidate, Recommendation, fastest, ranked
from autotp.trace import trace

DOUBLINGS = 3
"""Where the batch may be chosen: one, two, four and eight samples per device are tried."""

FINALISTS = 3
"""How many meshes of one batch are tried at twice that batch."""

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
    return search.run(Traced(program, *sizes_of(program)), None)


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
    unit: str = "GiB"

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
        candidates = self.meshes(traced).refined(candidates)
        order = ranked(candidates)
        fits = order[0].plan is not None
        remedies, tried = ((), ()) if fits else self.remedies(traced, order, None if choose_batch else traced_at)
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
            tried=tried,
            left_out=max(0, len(self.shapes(traced)) - len(candidates)),
            unit=self.unit,
        )

    def meshes(self, traced: Traced) -> MeshSearch:
        """The search over meshes at one batch."""
        request = Request({"tp": 1}, self.mode, self.limit)
        return MeshSearch(traced, request, self.cluster, self.model, time_limit=self.time_limit, progress=self.progress)

    def shapes(self, traced: Traced) -> list[dict[str, int]]:
        """The meshes that are looked at first."""
        return meshes_of(self.gpus, node_size(self.cluster, self.gpus), traced.batch)

    def candidates(self, traced: Traced) -> list[Candidate]:
        """Every mesh at this batch, planned where it may win."""
        return self.meshes(traced).candidates(self.shapes(traced))

    def other_batches(self, traced: Traced, candidates: list[Candidate], traced_at: TracedAt) -> tuple[Traced, list[Candidate]]:
        """The batch with most samples per second, ties to the smaller one; only the best meshes decide whether a larger one is better."""
        while not any(candidate.plan for candidate in candidates) and (traced.batch or 1) > 1:
            traced = traced_at((traced.batch or 1) // 2)
            candidates = self.candidates(traced)
        start, best, some = self.gpus, traced, candidates
        while best.batch and start <= best.batch < self.gpus * 2**DOUBLINGS:
            more = traced_at(2 * best.batch)
            found = self.meshes(more).candidates([candidate.mesh for candidate in ranked(some)[:FINALISTS]])
            if fastest(found) * (1 + TIE) >= 2 * fastest(some):
                break
            best, some = more, found
        return (traced, candidates) if best is traced else (best, self.candidates(best))

    def remedies(
        self, traced: Traced, order: Sequence[Candidate], traced_at: TracedAt | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What would fit (more devices of this cluster, devices with more memory, a smaller batch), and what was tried in vain."""
        known = [candidate for candidate in order if candidate.least_bytes is not None]
        if not known:
            return (), ()
        nearest = known[0]
        found, vain = [], []
        wider, _, tried = self.meshes(traced).nearest(nearest.mesh, nearest.least_bytes or 0.0)
        if wider is not None:
            found.append(f"{prod(wider.values())} GPUs ({mesh_name(wider)})")
        vain += [f"{prod(mesh.values())} GPUs ({mesh_name(mesh)})" for mesh in tried]
        for cluster in self.larger_devices():
            limit = USABLE * cluster.accelerator.memory_bytes
            if (nearest.least_bytes or 0.0) * nearest.gpus / self.gpus > limit:
                continue
            if replace(self, cluster=cluster).fits(traced, nearest.mesh):
                found.append(f"devices with more memory, such as {cluster.accelerator.name} (cluster {cluster.name})")
                break
            vain.append(f"cluster {cluster.name}")
            if len(vain) - len(tried) == FINALISTS:
                break
        if traced_at is not None and (traced.batch or 1) > 1:
            size = self.fitting_batch(traced, traced_at)
            found += [] if size is None else [f"batch {size}"]
            vain += ["batch 1"] if size is None else []
        return tuple(found), tuple(vain)

    def fitting_batch(self, traced: Traced, traced_at: TracedAt) -> int | None:
        """The largest batch, halved from this one, that fits on all devices; None if one sample does not."""
        sizes = [(traced.batch or 1) // 2**power for power in range(1, (traced.batch or 1).bit_length())]
        low, high = 0, len(sizes)  # the smaller the batch, the less memory: bisection
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(traced_at(sizes[middle])) else (middle + 1, high)
        return sizes[low] if low < len(sizes) else None

    def fits(self, traced: Traced, mesh: Mapping[str, int] | None = None) -> bool:
        """Whether the model fits on a mesh, by default on the most promising one of all devices."""
        shape = mesh or meshes_on(self.gpus, node_size(self.cluster, self.gpus), traced.batch)[0]
        return self.meshes(traced).least(shape) <= self.limit

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

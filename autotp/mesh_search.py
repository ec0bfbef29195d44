"""One model on many meshes: which of them is fastest within a memory limit, without solving for every one.

Two facts save most of the work. A plan without a memory limit is quick to find, and no plan within the limit is faster: meshes whose
unlimited plan is slower than a plan that fits need no other. And a mesh that is in no axis larger than one on which nothing fits
cannot do either: what it could do, the larger one can do several times over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, prod

from autotp.kpi import rates
from autotp.mesh_shapes import data_axes, data_parallel, mesh_name, node_size, variants
from autotp.planning import Request, for_mode, least_peak, make_plan
from autotp.plans import Plan
from autotp.price.cluster import Cluster
from autotp.price.memory import OPTIMIZERS
from autotp.program import Program
from autotp.recommendation import TIE, Candidate, fastest, ranked
from autotp.solve import OutOfMemoryError, OutOfTimeError

GAP = 1e-3
"""Distance from the optimum, relative, at which the solver may stop: far below a tie."""

FEW = 12
"""So many meshes are planned whatever their number of devices; of further ones those that may win."""

SLACK = 1.1
"""Pieces of the work may run this much better than the whole, so that n devices are at most this much more than n times as fast."""

FINALISTS, NEAR = 2, 1.25
"""How many meshes are also tried with their axes bound to the tiers in other ways, and how much slower than the best they may be."""

HOPELESS = 4.0
"""Where a mesh needs so many times the memory limit, others of no more devices are not tried."""

TOO_MUCH = 1.5
"""Where the plan with the smallest estimate needs so many times the memory limit, no other is looked for."""

GROWTH, TRIES = 16, 4
"""What would fit is looked for on up to this many times the devices, and on so many meshes."""


@dataclass(frozen=True)
class Traced:
    """A model traced at one batch; `batch` and `sequence` are None where it has no such size."""

    program: Program
    batch: int | None
    sequence: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeshSearch:
    """A traced model on the meshes of one cluster.

    Attributes:
        request: what is asked of every plan; its axes are those of no mesh in particular.
        by_batch: the axes `dp` and `fsdp` split the batch and nothing else, inputs and outputs included, and the others never do; else
            all axes are free, as in a plan for a given mesh.
        time_limit: seconds of the solver for each mesh.
        progress: called with a few words before every mesh.
    """

    traced: Traced
    request: Request
    cluster: Cluster
    model: str
    by_batch: bool = True
    time_limit: float = 60.0
    progress: Callable[[str], None] = lambda words: None

    @property
    def limit(self) -> float:
        """Peak bytes per device that a plan may use; infinite without a limit."""
        return inf if self.request.memory is None else self.request.memory

    @cached_property
    def alone_s(self) -> float:
        """Seconds of a step on one device, if it had memory enough."""
        return self.plan({"tp": 1}, None).time.step_s

    @cached_property
    def state_bytes(self) -> float:
        """Bytes of parameters, gradients and optimizer state, on all devices together: all are there when the update begins."""
        optimizer = OPTIMIZERS[self.request.optimizer]
        total = 0
        for node in for_mode(self.traced.program, self.request.mode).nodes:
            if node.kind == "parameter":
                tensor = node.outputs[0]
                total += tensor.bytes
                if tensor.requires_grad:
                    total += tensor.bytes + optimizer.state_bytes(tensor.hint, tensor.dtype.itemsize)
        return float(total)

    def plan(self, mesh: Mapping[str, int], limit: float | None) -> Plan:
        """The fastest plan on a mesh within `limit` bytes per device.

        Raises:
            OutOfMemoryError, OutOfTimeError: none was found.
        """
        request = self.asked(mesh, limit)
        plan = make_plan(self.traced.program, request, self.cluster, self.model, time_limit=self.time_limit, gap=GAP)
        batch, sequence = self.traced.batch or plan.batch, self.traced.sequence
        return replace(plan, batch=batch, sequence=sequence, kpi={**plan.kpi, **rates(batch, sequence, plan.time.step_s)})

    def asked(self, mesh: Mapping[str, int], limit: float | None) -> Request:
        """What is asked of a plan on a mesh within `limit` bytes per device."""
        return replace(self.request, axes=mesh, memory=limit, data=data_axes(mesh) if self.by_batch else self.request.data)

    def least(self, mesh: Mapping[str, int]) -> float:
        """Bytes per device that some plan on a mesh keeps to, be it slow: near the least, and found in seconds."""
        return least_peak(self.traced.program, self.asked(mesh, self.request.memory), self.cluster, time_limit=self.time_limit)

    def candidates(
        self, meshes: Sequence[Mapping[str, int]], found: Iterable[Candidate] = (), below: float = inf
    ) -> list[Candidate]:
        """Every mesh: planned, or with the reason why not. Not listed are those left out because of what others need or take.

        Args:
            meshes: the most promising first.
            found: of other meshes of the same search, with which these compete.
            below: meshes that take so many seconds without a memory limit, or more, are not solved within it.
        """
        done: list[Candidate] = []
        best = fastest(found)
        large: list[tuple[float, Mapping[str, int]]] = []
        for number, mesh in enumerate(meshes, start=1):
            gpus = prod(mesh.values())
            if self.state_bytes / gpus > self.limit:
                done.append(Candidate(mesh, None, self.state_bytes / gpus))
                continue
            if number > FEW and self.alone_s / gpus > SLACK * best:
                continue
            self.say("planning", mesh, f" ({number} of {len(meshes)})")
            plan = self.plan(mesh, None)
            if plan.memory.total <= self.limit:
                done.append(Candidate(mesh, plan))
                best = min(best, plan.time.step_s)
            else:
                large.append((plan.time.step_s, mesh))
        for number, (bound, mesh) in enumerate(sorted(large, key=lambda item: item[0]), start=1):
            if any((other.least_bytes or 0.0) > HOPELESS * self.limit and other.gpus >= prod(mesh.values()) for other in done):
                continue
            if bound >= below:
                done.append(Candidate(mesh, None, bound_s=bound))
                continue
            done.append(self.within(mesh, bound, best, done, f" ({number} of {len(large)})"))
            best = min(best, done[-1].step_s)
        return done

    def within(self, mesh: Mapping[str, int], bound: float, best: float, done: Sequence[Candidate], count: str = "") -> Candidate:
        """A mesh whose fastest plan, of `bound` seconds, is too large: planned within the limit if it may still win.

        Args:
            best: seconds of the fastest plan that fits; done: what is known of other meshes.
        """
        if bound > best * (1 + TIE):
            return Candidate(mesh, None, bound_s=bound)
        needs = [other.least_bytes for other in done if other.least_bytes is not None and _contains(other.mesh, mesh)]
        if needs:
            return Candidate(mesh, None, max(needs))
        self.say("planning within the memory limit", mesh, count)
        least = self.least(mesh)
        if least > TOO_MUCH * self.limit:
            return Candidate(mesh, None, least)
        try:
            return Candidate(mesh, self.plan(mesh, self.request.memory), bound_s=bound)
        except OutOfMemoryError as error:
            return Candidate(mesh, None, error.least)
        except OutOfTimeError:
            return Candidate(mesh, None)

    def refined(self, found: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, and the best meshes among them with their axes bound to the cluster's tiers in other ways.

        Within a limit that binds, a variant is solved only if it is faster than the best mesh where neither has a limit: the two differ in
        links alone, so that what a limit costs is much the same.
        """
        order = [candidate for candidate in ranked(found) if candidate.plan]
        best = fastest(order)
        near = [candidate for candidate in order if candidate.step_s <= NEAR * best][:FINALISTS]
        known = [list(candidate.mesh.items()) for candidate in found]
        shapes = [shape for candidate in near for shape in variants(candidate.mesh, self.cluster)]
        fresh = [shape for place, shape in enumerate(shapes) if list(shape.items()) not in known and shape not in shapes[:place]]
        return [*found, *self.candidates(fresh, found, order[0].bound_s or inf)] if order else list(found)

    def nearest(self, mesh: Mapping[str, int], least: float) -> tuple[Mapping[str, int] | None, float, list[Mapping[str, int]]]:
        """The smallest larger mesh on which the model fits, bytes per device of a plan there, and the meshes tried in vain.

        Args:
            mesh: one on which it does not fit.
            least: bytes per device that it needs there. Meshes on which that would be too much even if it fell in proportion to the
                devices are passed over.
        """
        vain: list[Mapping[str, int]] = []
        for larger in self.larger(mesh):
            if len(vain) == TRIES:
                break
            if least * prod(mesh.values()) / prod(larger.values()) > self.limit:
                continue
            self.say("looking for what would fit:", larger)
            needed = self.least(larger)
            if needed <= self.limit:
                return larger, needed, vain
            vain.append(larger)
        return None, inf, vain

    def larger(self, mesh: Mapping[str, int]) -> list[dict[str, int]]:
        """The mesh with one axis two, four, … times as large, as far as the cluster and the batch go; fewest devices first."""
        most = min(self.cluster.max_devices or inf, GROWTH * prod(mesh.values()))
        axes = [name for name in mesh if name in data_axes(mesh)] + [name for name in mesh if name not in data_axes(mesh)]
        found = []
        for factor in (2**power for power in range(1, GROWTH.bit_length())):
            for name in axes:
                shape = {**mesh, name: mesh[name] * factor}
                gpus = prod(shape.values())
                node = node_size(self.cluster, gpus)
                divides = not self.by_batch or (self.traced.batch or 1) % data_parallel(shape) == 0
                if gpus <= most and (gpus <= node or gpus % node == 0) and divides:
                    found.append(shape)
        return found

    def say(self, what: str, mesh: Mapping[str, int], count: str = "") -> None:
        """Report what comes next."""
        batch = f" at batch {self.traced.batch}" if self.traced.batch else ""
        name = f" {self.model} on" if what.startswith("planning") else ""
        self.progress(f"{what}{name} {mesh_name(mesh)}{batch}{count}")


def _contains(mesh: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether each axis of the other mesh is there, and at least as large."""
    return all(mesh.get(name, 1) >= size and mesh.get(name, 1) % size == 0 for name, size in other.items())

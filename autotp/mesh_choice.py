"""The fastest mesh of a number of devices, planned; and, where a memory limit cannot be kept, what would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, log, log10, prod

from autotp.errors import AutotpError
from autotp.mesh_search import MeshSearch
from autotp.mesh_shapes import check_devices, data_axes, mesh_name, mesh_option, meshes_on, node_size
from autotp.plans import Plan
from autotp.recommendation import MODEL_ERROR, Candidate, ranked
from autotp.report_rows import duration, size
from autotp.solve import OutOfMemoryError

SHOWN = 8
"""So many meshes are compared in a note, the fastest first."""


def fastest_mesh(search: MeshSearch, gpus: int) -> tuple[Candidate, ...]:
    """Every mesh of exactly `gpus` devices that is worth trying, best first.

    Raises:
        AutotpError: the cluster does not have these devices, or not in whole nodes.
    """
    check_devices(search.cluster, gpus)
    shapes = meshes_on(gpus, node_size(search.cluster, gpus), search.traced.batch)
    return ranked(search.refined(search.candidates(shapes)))


def plan_on(search: MeshSearch, gpus: int, unit: str = "GiB") -> Plan:
    """The plan on the fastest mesh of `gpus` devices; its notes say which others were tried, and what the batch axes mean.

    Args:
        unit: in which bytes are told: `GiB` or `GB`.

    Raises:
        AutotpError: as `fastest_mesh`.
        OutOfMemoryError: on none of them the memory limit can be kept.
    """
    found = fastest_mesh(search, gpus)
    best = found[0]
    if best.plan is None:
        known = next((one for one in found if one.least_bytes is not None), None)
        if known is None:
            raise AutotpError(f"no plan for {gpus} GPUs was found in time: give a mesh, or raise the memory limit")
        raise does_not_fit(search, known.mesh, known.least_bytes or 0.0, unit, found)
    border = " and ".join(data_axes(best.mesh))
    told = f"the batch is split over {border}: every rank passes its own samples and gets their outputs"
    return replace(best.plan, notes=(*best.plan.notes, compared(found, unit), *([told] if border else [])))


def compared(found: Sequence[Candidate], unit: str = "GiB") -> str:
    """One sentence: which mesh is fastest, and by how much the others lose."""
    best, others = found[0], found[1 : SHOWN + 1]
    if not others:
        return f"{mesh_name(best.mesh)} is the only mesh of {best.gpus} GPUs that splits this batch"
    said = []
    for other in others:
        if other.plan:
            ratio = other.step_s / best.step_s
            said.append(f"{mesh_name(other.mesh)} {ratio:.2f}×")
        elif other.bound_s is not None:
            said.append(f"{mesh_name(other.mesh)} at least {other.bound_s / best.step_s:.2f}×")
        elif other.least_bytes is not None:
            said.append(f"{mesh_name(other.mesh)} does not fit (≥ {size(other.least_bytes, unit)})")
        else:
            said.append(f"{mesh_name(other.mesh)} not planned in time")
    more = f", and {len(found) - 1 - SHOWN} more" if len(found) - 1 > SHOWN else ""
    return (
        f"of {len(found)} meshes of {best.gpus} GPUs {mesh_name(best.mesh)} is best with {duration(best.step_s)} per step; the others "
        f"take, of its time: {', '.join(said)}{more} (differences below {MODEL_ERROR:.0%} are within the model's error)"
    )


def does_not_fit(
    search: MeshSearch, mesh: Mapping[str, int], least: float, unit: str = "GB", found: Sequence[Candidate] = ()
) -> OutOfMemoryError:
    """That the memory limit cannot be kept: the least that would do on this mesh, and the nearest mesh that would.

    Args:
        least: bytes per device that the mesh needs.
        found: the other meshes that were tried, if any.
    """
    where = "on this mesh" if not found else f"on {prod(mesh.values())} GPUs, with {mesh_option(mesh)},"
    told = _enough(least, unit)
    said = f"the memory limit of {size(search.limit, unit)} per device cannot be kept: the least that would do {where} is {told}"
    nearest, needed, vain = search.nearest(mesh, least)
    if nearest is not None:
        hint = f"{mesh_option(nearest)} would do with {size(needed, unit)}"
    elif vain:
        hint = f"{' and '.join(map(mesh_option, vain))} would not do either: raise the limit, or use a smaller batch"
    else:
        hint = "no larger mesh of this kind was found: raise the limit, use more devices, or a smaller batch"
    return OutOfMemoryError(f"{said}; {hint}", least)


def _enough(count: float, unit: str) -> str:
    """Bytes in four digits, rounded up, so that a limit of what is read is kept."""
    base = 1024 if "i" in unit else 1000
    power = max(1, min(4, int(log(max(count, 1.0), base))))
    digits = 3 - int(log10(max(count / base**power, 1.0)))
    return f"{ceil(count / base**power * 10**digits) / 10**digits:g} {'KMGT'[power - 1]}{'i' if 'i' in unit else ''}B"

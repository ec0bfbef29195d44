"""A scaling study on paper: the fastest mesh for each number of devices, and what becomes of time, memory and communication. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from autotp.errors import AutotpError
from autotp.recommendation import Candidate

if TYPE_CHECKING:  # it brings torch, which wrong options do not need
    from autotp.mesh_search import MeshSearch


@dataclass(frozen=True)
class ScalingPoint:
    """One number of devices.

    Attributes:
        gpus: devices; batch: samples per step over all of them, None where the model has no batch.
        candidates: the meshes that were tried, best first.
    """

    gpus: int
    batch: int | None
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The fastest mesh that fits; else the one that needs least memory."""
        return self.candidates[0]

    @property
    def samples_per_s(self) -> float:
        """Predicted samples per second over all devices; 0 if nothing fits."""
        return (self.batch or 1) / self.best.step_s if self.best.plan else 0.0


@dataclass(frozen=True)
class ScalingStudy:
    """A model on more and more devices of a cluster. `print(study)` shows it as a table.

    Attributes:
        per_gpu: samples of each device: weak scaling, the work of a device stays. None: strong scaling, the whole work stays.
        sequence: tokens of a sample; None where there are none.
        memory_limit: bytes per device that a plan may use, of `device_bytes`.
        points: by number of devices, ascending.
        unit: in which bytes are told: GiB, or GB where the user wrote so.
    """

    model: str
    parameters: int
    mode: str
    cluster: str
    per_gpu: Fraction | None
    sequence: int | None
    memory_limit: float
    device_bytes: float
    points: tuple[ScalingPoint, ...]
    notes: tuple[str, ...] = ()
    unit: str = "GiB"

    def efficiency(self, point: ScalingPoint) -> float | None:
        """Samples per second and device, relative to the smallest number of devices on which the model fits; None if it does not fit.

        The parallel efficiency of weak scaling (Gustafson 1988), and of strong scaling (Amdahl 1967), by which batch is held.
        """
        first = next((one for one in self.points if one.best.plan), None)
        if first is None or not point.best.plan:
            return None
        return (point.samples_per_s / point.gpus) / (first.samples_per_s / first.gpus)

    def __str__(self) -> str:
        from autotp.report_scaling import render  # pages stand after what they show; only printing needs them

        return render(self)


def parse_counts(text: str) -> list[int]:
    """`[8, 64, 512]` for `8,64,512`, ascending and without repetition.

    Raises:
        AutotpError: it is no list of whole numbers.
    """
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise AutotpError(f"--gpus {text} is not understood: write numbers of devices such as 8,64,512") from None


def parse_share(text: str) -> Fraction:
    """Samples per device: `2`, `0.5` or `1/8`.

    Raises:
        AutotpError: it is no positive number.
    """
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if found <= 0:
        raise AutotpError(f"--batch-per-gpu {text} is not understood: write a positive number such as 2, 0.5 or 1/8")
    return found


def batch_at(gpus: int, batch: int | None, per_gpu: Fraction | None) -> int | None:
    """Samples per step on `gpus` devices: `batch` on any number, or `per_gpu` for each.

    Raises:
        AutotpError: the share of these devices is no whole number.
    """
    if per_gpu is None:
        return batch
    size = per_gpu * gpus
    if size.denominator != 1:
        near = -(-gpus // per_gpu.denominator) * per_gpu.denominator
        raise AutotpError(f"{per_gpu} samples per GPU are {float(size):g} on {gpus} GPUs, which is no whole number: take {near} GPUs")
    return int(size)


def points_of(
    counts: Sequence[int],
    search_at: Callable[[int], MeshSearch],
    meshes_at: Callable[[MeshSearch, int], tuple[Candidate, ...]],
) -> tuple[ScalingPoint, ...]:
    """The study's points.

    Args:
        search_at: number of devices → the model, traced at its batch, on the cluster.
        meshes_at: the ranked meshes of so many devices.
    """
    found = []
    for gpus in counts:
        search = search_at(gpus)
        found.append(ScalingPoint(gpus, search.traced.batch, meshes_at(search, gpus)))
    return tuple(found)

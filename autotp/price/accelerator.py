"""Accelerators: what one device computes and moves per second, read from `cost_models/accelerators/*.yaml`.

In Python all quantities are in bytes, seconds, bytes per second and floating-point operations per second; in the YAML, keys name
their units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autotp.price.sections import BYTES, BYTES_PER_SECOND, SECONDS, Section, names_in

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
        start_seconds: duration of a product that has next to no arithmetic.
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
    start_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Accelerator:
    """One device as PyTorch sees it.

    Attributes:
        name: the YAML file's stem.
        memory_bytes: device memory in bytes.
        bandwidth: peak memory bandwidth in bytes/s; `bandwidth_efficiency` is the fraction that a long copy reaches.
        launch_seconds: what a kernel bound by memory takes beside its bytes, on the device, in a stream of kernels.
        peak_flops: FLOP/s by "fp64", "fp32", "bf16", "fp16", "fp8", "int8"; dense, without TF32 for "fp32".
        attention_efficiency: fraction of peak that fused attention reaches on long sequences, at a head size of 128.
        gemm: matrix product constants.
        host_launch_seconds: what the host needs to launch a kernel from eager PyTorch; the device waits for it if its
            kernels are shorter, unless they are recorded in a CUDA graph.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bandwidth_efficiency: float
    launch_seconds: float
    peak_flops: Mapping[str, float]
    attention_efficiency: float
    gemm: Gemm
    host_launch_seconds: float = 0.0


def accelerator_names() -> list[str]:
    """Names that a cluster's `accelerator:` takes, sorted."""
    return names_in("accelerators")


def read_accelerator(section: Section) -> Accelerator:
    """The accelerator that a mapping describes.

    Raises:
        AutotpError: a key is missing, unknown or wrong; the sentence names file, line and key.
    """
    peaks = section.section("peak_tflops")
    given = [key for key in PEAKS if key == "fp32" or key in peaks.entries]
    peak_flops = {key: 1e12 * peaks.number(key, positive=True) for key in given}
    peaks.expected.update(PEAKS)
    peaks.finish()
    gemm = section.section("gemm")
    launch = section.quantity("launch", SECONDS)
    accelerator = Accelerator(
        name=section.name,
        memory_bytes=int(section.quantity("memory", BYTES)),
        bandwidth=section.quantity("bandwidth", BYTES_PER_SECOND),
        bandwidth_efficiency=section.fraction("bandwidth_efficiency", 0.9),
        launch_seconds=launch,
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
            start_seconds=gemm.quantity("start", SECONDS, launch),
        ),
        host_launch_seconds=section.quantity("host_launch", SECONDS, launch),
    )
    gemm.finish()
    section.text("description", "")
    section.finish()
    return accelerator

"""Seconds of compute on one device: matrix products, fused attention, and everything bound by memory.

All three are rooflines: the greater of arithmetic and memory traffic, each slowed by what the shape costs, plus the
time of the shortest kernel. None is ever below the physical floor, FLOPs / peak or bytes / bandwidth.

A matrix product is a set of output tiles. Each of the device's `units` works on one tile at a time, so time goes in
waves, ceil(tiles / units); a tile costs its rows × columns × (k + k_overhead), more if it is small, and a long k
may be split over several units. The best tile shape and split is taken, as the library's heuristic does. The
constants of H100 and B200 are fitted to OpenXLA's measured tables
(xla/service/gpu/model/default_matmul_perf_table.txtpb, 375 bf16 shapes each, mean error 4 %); `max_efficiency` is
the best product measured on the device (ml-engineering, compute/accelerator).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, inf

from autotp.errors import AutotpError
from autotp.price.accelerator import Accelerator, Gemm
from autotp.price.cluster import Cluster

DTYPES: dict[str, tuple[int, str]] = {
    "float64": (8, "fp64"),
    "float32": (4, "fp32"),
    "bfloat16": (2, "bf16"),
    "float16": (2, "fp16"),
    "float8_e4m3fn": (1, "fp8"),
    "float8_e5m2": (1, "fp8"),
    "int8": (1, "int8"),
    "uint8": (1, "int8"),
    "bool": (1, "int8"),
    "int16": (2, "fp32"),
    "int32": (4, "fp32"),
    "int64": (8, "fp32"),
    "complex64": (8, "fp32"),
    "complex128": (16, "fp64"),
}
"""dtype → bytes per element, and whose peak it computes at."""

SPLITS = (1, 2, 4, 8)
SHORTEST_SPLIT = 256
"""k is split only into pieces of at least this many elements."""
ATTENTION_ROWS = 128
ATTENTION_SPLIT = 256
"""Rows of queries per block, and least keys per block when a short query is split over its keys."""


def itemsize(dtype: str) -> int:
    """Bytes per element. Raises AutotpError for an unknown dtype."""
    return _dtype(dtype)[0]


def peak_flops(cluster: Cluster, dtype: str) -> float:
    """Peak FLOP/s at which the cluster's accelerator multiplies this dtype.

    A dtype that the accelerator's file does not list computes at its "fp32" rate (bf16 on a V100, integers).

    Raises:
        AutotpError: unknown dtype, or float64 on an accelerator whose file gives no fp64 peak.
    """
    peaks = cluster.accelerator.peak_flops
    key = _dtype(dtype)[1]
    if key == "fp64" and key not in peaks:
        raise AutotpError(
            f"accelerator {cluster.accelerator.name!r} gives no float64 peak: add fp64 to peak_tflops in its YAML file"
        )
    rate = peaks.get(key, peaks["fp32"])
    return rate / 4 if dtype.startswith("complex") else rate


def gemm_seconds(
    cluster: Cluster, m: int, n: int, k: int, dtype: str, batch: int = 1, traffic: float | None = None
) -> float:
    """Seconds of `batch` products (m, k) @ (k, n) -> (m, n), all at local sizes.

    Args:
        m, n, k, batch: elements; a product without elements costs one launch.
        dtype: of operands and result, e.g. "bfloat16".
        traffic: bytes read and written, where these are not matrices in memory (a convolution); None: those of the matrices.

    Raises:
        AutotpError: unknown dtype or a negative size.
    """
    return _gemm_seconds(cluster, m, n, k, dtype, batch, traffic)


def memory_seconds(cluster: Cluster, bytes: float, kernels: float = 1.0) -> float:
    """Seconds of operators bound by memory: `bytes` read and written in all, by `kernels` kernels.

    A kernel takes at least the accelerator's launch time; fewer than one kernel stands for operators fused into others.

    Raises:
        AutotpError: negative bytes or kernels.
    """
    if bytes < 0 or kernels < 0:
        raise AutotpError(f"cannot price {bytes} bytes in {kernels} kernels: give numbers of at least 0")
    device = cluster.accelerator
    return kernels * device.launch_seconds + bytes / (device.bandwidth * device.bandwidth_efficiency)


def attention_seconds(
    cluster: Cluster, batch_heads: int, s: int, t: int, e: int, f: int, causal: bool, dtype: str, start: int = 0
) -> float:
    """Seconds of the forward pass of fused attention: (batch_heads, s, e) · (…, t, e) · (…, t, f) -> (…, s, f).

    FLOPs are 2 · pairs · (e + f), where a causal mask leaves min(i + 1, t) keys for the query at position i. Scores never reach
    memory.

    Args:
        batch_heads: batch × heads on this device; s, t: queries and keys; e, f: sizes of a key and of a value.
        start: position of the first query, for the causal mask.

    Raises:
        AutotpError: unknown dtype or a negative size.
    """
    return _attention_seconds(cluster, batch_heads, s, t, e, f, causal, dtype, start)


@lru_cache(maxsize=1 << 16)
def _gemm_seconds(cluster: Cluster, m: int, n: int, k: int, dtype: str, batch: int, traffic: float | None) -> float:
    _check_sizes("matrix product", m=m, n=n, k=k, batch=batch)
    device, size, peak = cluster.accelerator, itemsize(dtype), peak_flops(cluster, dtype)
    flops = 2.0 * batch * m * n * k
    traffic = float(size) * batch * (m * k + k * n + m * n) if traffic is None else traffic
    if flops == 0:
        return memory_seconds(cluster, traffic)
    arithmetic = max(_tiled_seconds(device, peak, m, n, k, batch), flops / (peak * device.gemm.max_efficiency))
    if any(length * size % device.gemm.alignment_bytes for length in (n, k)):
        arithmetic /= device.gemm.misaligned_efficiency
    return device.launch_seconds + max(arithmetic, traffic / (device.bandwidth * device.bandwidth_efficiency))


def _tiled_seconds(device: Accelerator, peak: float, m: int, n: int, k: int, batch: int) -> float:
    """Seconds of arithmetic under the best tiling and split of k."""
    gemm = device.gemm
    rate = peak / gemm.units * gemm.efficiency * _reloads(gemm, gemm.tiles[0])
    best = inf
    for tile in gemm.tiles:
        rows, columns = tile
        tiles = batch * ceil(m / rows) * ceil(n / columns)
        seconds_per_k = 2.0 * rows * columns * _reloads(gemm, tile) / rate
        for split in SPLITS:
            if split > 1 and k < split * SHORTEST_SPLIT:
                break
            waves = ceil(tiles * split / gemm.units)
            seconds = waves * seconds_per_k * (k / split + gemm.k_overhead)
            best = min(best, seconds + (gemm.split_k_seconds if split > 1 else 0.0))
    return best


def _reloads(gemm: Gemm, tile: tuple[int, int]) -> float:
    """Relative cost of a tile's arithmetic: small tiles reload operands more often."""
    return 1 + gemm.tile_overhead * (1 / tile[0] + 1 / tile[1])


@lru_cache(maxsize=1 << 16)
def _attention_seconds(
    cluster: Cluster, batch_heads: int, s: int, t: int, e: int, f: int, causal: bool, dtype: str, start: int
) -> float:
    _check_sizes("attention", batch_heads=batch_heads, s=s, t=t, e=e, f=f, start=start)
    device, size = cluster.accelerator, itemsize(dtype)
    traffic = float(size) * batch_heads * (s * e + t * e + t * f + s * f)
    pairs = s * t
    if causal:
        pairs = _causal_pairs(start + s, t) - _causal_pairs(start, t)
    flops = 2.0 * batch_heads * pairs * (e + f)
    if flops == 0:
        return memory_seconds(cluster, traffic)
    units, blocks = device.gemm.units, batch_heads * ceil(s / ATTENTION_ROWS)
    if blocks < units:
        blocks = min(units, blocks * ceil(t / ATTENTION_SPLIT))
    busy = blocks / (ceil(blocks / units) * units)
    arithmetic = flops / (peak_flops(cluster, dtype) * device.attention_efficiency * busy)
    return device.launch_seconds + max(arithmetic, traffic / (device.bandwidth * device.bandwidth_efficiency))


def _causal_pairs(queries: int, t: int) -> int:
    """Pairs of the first `queries` positions with the keys that each of them sees, of `t` keys in all."""
    square = min(queries, t)
    return square * (square + 1) // 2 + (queries - square) * t


def _dtype(dtype: str) -> tuple[int, str]:
    if dtype not in DTYPES:
        raise AutotpError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _check_sizes(what: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 0:
            raise AutotpError(f"cannot price a {what} of {name} = {value}: sizes must be at least 0")

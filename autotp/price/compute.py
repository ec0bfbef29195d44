"""Seconds of compute on one device: matrix products, fused attention, and everything bound by memory.

All three are rooflines: the greater of arithmetic and memory traffic, each slowed by what the shape costs, plus the
time of the shortest kernel. None is ever below the physical floor, FLOPs / peak or bytes / bandwidth. Times are those
of the device in a stream of kernels; with `eager=True` a kernel takes at least what the host needs to launch it.

A matrix product is a set of output tiles. Each of the device's `units` works on one tile at a time, so time goes in
waves, ceil(tiles / units); a tile costs its rows × columns × (k + k_overhead), more if it is small, and a long k
may be split over several units. The best tile shape and split is taken, as the library's heuristic does. Constants
come from `autotp.price.fit`; docs/accuracy.md holds the errors on shapes that the fit did not see.

Fused attention (FlashAttention-2, arXiv:2307.08691, and -3, arXiv:2407.08608) is a set of blocks of queries, each
walking over the keys it sees. Three losses keep it from its share of peak at long sequences: the start and end of a
block, which cost as much as `k_overhead` keys; the keys on a causal mask's diagonal that are computed in vain; and
the softmax, one exponential per score however small the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil

from autotp.errors import AutotpError
from autotp.price.accelerator import Accelerator
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
"""No piece of a split k is shorter than this many elements."""
ATTENTION_ROWS = 128
ATTENTION_SPLIT = 256
"""Rows of queries per block, and least keys per block when a short query is split over its keys."""
ATTENTION_DIAGONAL = 128
"""Keys per query that a causal kernel computes in vain: half a block of queries and half a block of keys."""
ATTENTION_HEAD = 128
SOFTMAX_HEAD = 40
"""`attention_efficiency` holds at the first head size; a score's softmax takes as long as the second adds to it.

FlashAttention-3 on H100 reaches 621 TFLOP/s at head size 128 (pytorch/benchmark pull 2391, 16,384 tokens) and 514 at
64 (Dao-AILab/flash-attention issue 1438, 32,768 tokens).
"""
ATTENTION_BACKWARD_PRODUCTS = 2.5
ATTENTION_BACKWARD_EFFICIENCY = 0.85
ATTENTION_BACKWARD_KERNELS = 3
"""Backward does five matrix products where forward does two (Dao et al. 2022, algorithm 4), at this share of forward's
efficiency: 63 of 73 % of peak on A100 (arXiv:2307.08691), 1247 to 1360 of 1535 TFLOP/s on B200
(Dao-AILab/flash-attention pull 2280). Its kernels: the products of output and gradient, the main one, the cast of
the queries' gradients.
"""


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
    cluster: Cluster, m: int, n: int, k: int, dtype: str, batch: int = 1, traffic: float | None = None, *, eager: bool = False
) -> float:
    """Seconds of `batch` products (m, k) @ (k, n) -> (m, n), all at local sizes.

    Args:
        m, n, k, batch: elements; a product without elements costs one launch.
        dtype: of operands and result, e.g. "bfloat16".
        traffic: bytes read and written, where these are not matrices in memory (a convolution); None: those of the matrices.
        eager: at least the host's launch time.

    Raises:
        AutotpError: unknown dtype or a negative size.
    """
    seconds = _gemm_seconds(cluster, m, n, k, dtype, batch, traffic)
    return max(seconds, cluster.accelerator.host_launch_seconds) if eager else seconds


def memory_seconds(cluster: Cluster, bytes: float, kernels: float = 1.0, *, eager: bool = False) -> float:
    """Seconds of operators bound by memory: `bytes` read and written in all, by `kernels` kernels.

    The launch time is added, not a floor: 201 MB take a B200 30.4 µs in a stream of kernels, 28 µs for the bytes and 2
    for starting and draining (NVIDIA/cccl pull 7391). So a short kernel reaches a small share of the bandwidth.

    Args:
        kernels: fewer than one stands for operators fused into others.
        eager: at least the host's launch time, for each kernel.

    Raises:
        AutotpError: negative bytes or kernels.
    """
    if bytes < 0 or kernels < 0:
        raise AutotpError(f"cannot price {bytes} bytes in {kernels} kernels: give numbers of at least 0")
    device = cluster.accelerator
    seconds = kernels * device.launch_seconds + bytes / (device.bandwidth * device.bandwidth_efficiency)
    return max(seconds, kernels * device.host_launch_seconds) if eager else seconds


def attention_seconds(
    cluster: Cluster,
    batch_heads: int,
    s: int,
    t: int,
    e: int,
    f: int,
    causal: bool,
    dtype: str,
    start: int = 0,
    *,
    kv_batch_heads: int | None = None,
    backward: bool = False,
    eager: bool = False,
) -> float:
    """Seconds of one pass of fused attention: (batch_heads, s, e) · (…, t, e) · (…, t, f) -> (…, s, f).

    FLOPs are 2 · pairs · (e + f), where a causal mask leaves min(i + 1, t) keys for the query at position i; backward
    has 2.5 times as many. Scores never reach memory.

    Args:
        batch_heads: batch × heads on this device; s, t: queries and keys; e, f: sizes of a key and of a value.
        start: position of the first query, for the causal mask.
        kv_batch_heads: batch × heads of keys and values, which a group of query heads shares and reads once; None:
            as many as of queries.
        backward: the pass that computes the gradients, without the forward pass.
        eager: at least the host's launch time.

    Raises:
        AutotpError: unknown dtype or a negative size.
    """
    shared = batch_heads if kv_batch_heads is None else kv_batch_heads
    seconds = _attention_seconds(cluster, batch_heads, shared, s, t, e, f, causal, dtype, start, backward)
    kernels = ATTENTION_BACKWARD_KERNELS if backward else 1
    return max(seconds, kernels * cluster.accelerator.host_launch_seconds) if eager else seconds


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
    start = max(device.launch_seconds, device.gemm.start_seconds)
    return start + max(arithmetic, traffic / (device.bandwidth * device.bandwidth_efficiency))


def tilings(
    units: int, tiles: Sequence[tuple[int, int]], m: int, n: int, k: int, batch: int
) -> Iterator[tuple[int, float, float, bool]]:
    """The ways to tile a product over `units` processors, from which the library takes the fastest.

    Yields for each tile and split of k: output elements that one unit computes in all its waves, elements of k that
    each takes, the tile's reloads 1/rows + 1/columns, and whether k is split.
    """
    depths = [(split, max(k / split, min(k, SHORTEST_SPLIT))) for split in SPLITS]
    for rows, columns in tiles:
        count = batch * -(-m // rows) * -(-n // columns)
        area, reloads = rows * columns, 1 / rows + 1 / columns
        for split, depth in depths:
            yield -(-count * split // units) * area, depth, reloads, split > 1


def _tiled_seconds(device: Accelerator, peak: float, m: int, n: int, k: int, batch: int) -> float:
    """Seconds of arithmetic under the best tiling and split of k."""
    gemm = device.gemm
    rows, columns = gemm.tiles[0]
    overhead, start, extra = gemm.tile_overhead, gemm.k_overhead, (0.0, gemm.split_k_seconds)
    scale = 2.0 * gemm.units / (peak * gemm.efficiency * (1 + overhead * (1 / rows + 1 / columns)))
    return min(
        scale * elements * (1 + overhead * reloads) * (depth + start) + extra[split]
        for elements, depth, reloads, split in tilings(gemm.units, gemm.tiles, m, n, k, batch)
    )


@lru_cache(maxsize=1 << 16)
def _attention_seconds(
    cluster: Cluster,
    heads: int,
    shared: int,
    s: int,
    t: int,
    e: int,
    f: int,
    causal: bool,
    dtype: str,
    start: int,
    backward: bool,
) -> float:
    _check_sizes("attention", batch_heads=heads, kv_batch_heads=shared, s=s, t=t, e=e, f=f, start=start)
    device, size = cluster.accelerator, itemsize(dtype)
    traffic = float(size) * (heads * s + shared * t) * (e + f)
    kernels = 1
    if backward:  # reads what forward read and wrote, and the output's gradient; writes three gradients
        traffic, kernels = 2 * traffic, ATTENTION_BACKWARD_KERNELS
    if not heads * shared * s * t * (e + f):
        return memory_seconds(cluster, traffic, kernels)
    pairs = s * t
    if causal:
        pairs = min(_causal_pairs(start + s, t) - _causal_pairs(start, t) + s * ATTENTION_DIAGONAL, pairs)
    flops = 2.0 * (e + f)  # of one pair
    rate = peak_flops(cluster, dtype) / device.gemm.units * _attention_efficiency(device, (e + f) / 2)
    if backward:
        flops, rate = ATTENTION_BACKWARD_PRODUCTS * flops, ATTENTION_BACKWARD_EFFICIENCY * rate
    queries = s * ceil(heads / shared)  # those of a group share a block
    least = min(rows for rows, _ in device.gemm.tiles)
    rows = min(ceil(queries / least) * least, ATTENTION_ROWS)
    arithmetic = _blocked_seconds(device, shared * ceil(queries / rows), pairs / s, rows * flops / rate)
    memory = traffic / (device.bandwidth * device.bandwidth_efficiency)
    return kernels * device.launch_seconds + max(arithmetic, memory)


def _blocked_seconds(device: Accelerator, blocks: int, keys: float, seconds_per_key: float) -> float:
    """Seconds of arithmetic of `blocks` that walk over `keys` each; few blocks are split over their keys, at a kernel's price."""
    units, overhead = device.gemm.units, device.gemm.k_overhead
    whole = ceil(blocks / units) * (keys + overhead) * seconds_per_key
    if blocks > units // 2:
        return whole
    part = max(keys / (units // blocks), min(keys, ATTENTION_SPLIT))
    return min(whole, (part + overhead) * seconds_per_key + device.launch_seconds)


def _attention_efficiency(device: Accelerator, head: float) -> float:
    """Share of peak on long sequences at a head size."""
    relative = (1 + SOFTMAX_HEAD / ATTENTION_HEAD) / (1 + SOFTMAX_HEAD / head)
    return min(1.0, device.attention_efficiency * relative)


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

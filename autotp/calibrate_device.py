"""Measuring one device: peaks, matrix products, memory bandwidth, launches and attention.

What is measured is described in the terms of `autotp.price.accelerator`, so that the prices that follow from it meet
the measured times. Operands are random and, as far as there is memory, other ones in every call: zeros switch fewer
transistors, and the weights of a model do not wait in a cache.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from autotp.calibrate_clock import Clock, Timing, measure
from autotp.errors import AutotpError
from autotp.price.accelerator import Accelerator, Gemm
from autotp.price.cluster import Cluster
from autotp.price.compute import attention_seconds
from autotp.price.fit import GPU_TILES, fit_gemm

Say = Callable[[str], None]
Shape = tuple[int, int, int]
"""(m, n, k) of a product (m, k) @ (k, n), in elements."""

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POOL_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Random numbers from which operands are taken in turn: more than caches hold."""
SQUARES = (512, 1024, 2048, 4096, 8192, 16384)
"""Sizes of the products that are tried for the peak."""
CPU_TILES = ((16, 16), (8, 16), (4, 16), (1, 16))
"""Output tiles (rows, columns) of a CPU's kernels, the best first: a few vector registers of accumulators."""
CUDA_ALIGNMENT = 16
"""Bytes that rows must be a multiple of for a GPU's fast copies into shared memory."""
FEWEST_PRODUCTS = 16
COPIES = tuple(1 << power for power in range(20, 30))
"""Bytes of the copies that are timed; long ones, of at least a quarter of the pool, make the bandwidth."""
ATTENTION_SIZES = ((16, 512), (16, 1024), (16, 2048), (16, 4096))
"""(batch × heads, sequence) of the causal attention that is timed, with heads of 128 elements."""


@dataclass(frozen=True)
class Product:
    """A timed matrix product of the dtype under which products are fitted."""

    shape: Shape
    timing: Timing


@dataclass(frozen=True, eq=False)
class Device:
    """A measured device.

    Attributes:
        label: its name, as the driver or the operating system gives it.
        accelerator: the constants found.
        dtype: key in `peak_flops` of the dtype in which products and attention were measured.
        products: the products that the constants are fitted to.
        copies: (bytes copied, timing).
        attention: ((batch × heads, sequence, head size), timing).
        launch: the shortest kernel.
    """

    label: str
    accelerator: Accelerator
    dtype: str
    products: tuple[Product, ...]
    copies: tuple[tuple[int, Timing], ...]
    attention: tuple[tuple[Shape, Timing], ...]
    launch: Timing

    @property
    def spreads(self) -> list[float]:
        """The spread of every measurement."""
        return [timing.spread for _, timing in (*self.copies, *self.attention)] + [p.timing.spread for p in self.products]


def measure_device(clock: Clock, seconds: float, say: Say = lambda words: None, memory_bytes: int | None = None) -> Device:
    """Measure the clock's device in about `seconds`.

    Args:
        say: told what is being measured.
        memory_bytes: the device's memory; None asks the driver or the operating system.

    Raises:
        AutotpError: the device does not multiply float32 matrices.
    """
    kind = clock.device.type
    pool = _Pool(clock.device, POOL_BYTES[kind])
    say("the shortest kernel")
    launch = _launch(clock, 0.05 * seconds)
    say("memory bandwidth")
    copies = _copies(clock, pool, 0.1 * seconds)
    long = [2 * size / timing.seconds for size, timing in copies if size >= pool.bytes // 4]
    bandwidth, reached = max(long), median(long)
    found = _peaks(clock, pool, 0.25 * seconds, say)
    dtype = main_dtype(clock.device, found)
    peaks = {key: max(_rate(shape, timing) for shape, timing in rows) for key, rows in found.items()}
    products = _products(clock, pool, dtype, peaks[dtype], 0.4 * seconds, say)
    peaks[dtype] = max(peaks[dtype], *(_rate(product.shape, product.timing) for product in products))
    units = _units(clock.device)
    accelerator = Accelerator(
        name="measured",
        memory_bytes=memory_bytes or device_memory(clock.device),
        bandwidth=bandwidth,
        bandwidth_efficiency=reached / bandwidth,
        launch_seconds=launch.seconds,
        peak_flops=peaks,
        attention_efficiency=1.0,
        host_launch_seconds=launch.host_seconds,
        gemm=_fitted(products, dtype, peaks[dtype], reached, units, launch.seconds, kind),
    )
    say("attention")
    attention = _attention(clock, pool, dtype, 0.2 * seconds, peaks[dtype])
    accelerator = replace(accelerator, attention_efficiency=_attention_efficiency(accelerator, dtype, attention))
    return Device(device_label(clock.device), accelerator, dtype, products, copies, attention, launch)


def main_dtype(device: torch.device, measured: Collection[str]) -> str:
    """The dtype that models mostly run in: bf16 or fp16 on a GPU, fp32 on a CPU."""
    wanted = ("bf16", "fp16", "fp32") if device.type == "cuda" else ("fp32",)
    return next(key for key in wanted if key in measured)


# ---- what is timed --------------------------------------------------------------------------------------------------


class _Pool:
    """Random numbers on the device; `take` gives views of them, from another place in every call."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.bytes, self.takes = device, size, 0
        self.numbers: dict[torch.dtype, Tensor] = {}

    def fits(self, elements: int, dtype: torch.dtype) -> bool:
        return elements * dtype.itemsize <= self.bytes

    def take(self, dtype: torch.dtype, *shape: int) -> Callable[[], Tensor]:
        """A function that returns a tensor of this shape, filled with numbers of the standard normal distribution."""
        if dtype not in self.numbers:
            self.numbers.clear()
            block = torch.randn(1 << 20, device=self.device).to(dtype)
            self.numbers[dtype] = block.repeat(self.bytes // (dtype.itemsize << 20))
        numbers, elements = self.numbers[dtype], prod(shape)
        step = -(-elements * dtype.itemsize // 4096) * 4096 // dtype.itemsize  # every tensor starts at a page
        starts = range(0, max(numbers.numel() - elements, 0) + 1, step)
        views = [numbers[start : start + elements].view(shape) for start in starts[:64]]
        self.takes += 1
        turn = len(views) * (self.takes % 3) // 3  # the operands of one call are not the same numbers
        endless = cycle(views[turn:] + views[:turn])
        return lambda: next(endless)


def _launch(clock: Clock, seconds: float) -> Timing:
    x = torch.zeros(1, device=clock.device)
    return measure(clock, lambda: x.add_(1.0), seconds)


def _copies(clock: Clock, pool: _Pool, seconds: float) -> tuple[tuple[int, Timing], ...]:
    sizes = [size for size in COPIES if size <= pool.bytes // 2]
    result = torch.empty(max(sizes) // 4, device=clock.device)
    found = []
    for size in sizes:
        source, target = pool.take(torch.float32, size // 4), result[: size // 4]
        found.append((size, measure(clock, lambda t=target, s=source: t.copy_(s()), seconds / len(sizes))))  # type: ignore[misc]
    return tuple(found)


def _peaks(clock: Clock, pool: _Pool, seconds: float, say: Say) -> dict[str, list[tuple[Shape, Timing]]]:
    """Growing square products of every dtype that the device multiplies, until they no longer fit in the time."""
    found: dict[str, list[tuple[Shape, Timing]]] = {}
    each = seconds / len(DTYPES) / 3
    for key, dtype in DTYPES.items():
        rows: list[tuple[Shape, Timing]] = []
        for size in SQUARES:
            expected = 2.0 * size**3 / _rate(*rows[-1]) if rows else 0.0
            if not pool.fits(size * size, dtype) or 4 * expected > each:
                break
            say(f"peak of {key}: {size}³")
            try:
                rows.append(((size, size, size), measure(clock, _product(clock, pool, dtype, (size, size, size)), each)))
            except (RuntimeError, NotImplementedError):  # no kernel for this dtype, or no memory left for the result
                break
        if rows:
            found[key] = rows
    if "fp32" not in found:
        raise AutotpError(f"{device_label(clock.device)} multiplies no float32 matrices of {SQUARES[0]} × {SQUARES[0]}")
    return found


def _product(clock: Clock, pool: _Pool, dtype: torch.dtype, shape: Shape) -> Callable[[], object]:
    """x @ Wᵀ, as a linear layer does it."""
    m, n, k = shape
    x, weight = pool.take(dtype, m, k), pool.take(dtype, n, k)
    result = torch.empty(m, n, dtype=dtype, device=clock.device)
    return lambda: torch.mm(x(), weight().t(), out=result)


def grid(alignment: int) -> list[Shape]:
    """The products that constants are fitted to, families in turn: square, skinny, short k, and other shapes of layers.

    Args:
        alignment: elements that a row's length should be a multiple of; beside some shapes stands one that is not.
    """
    families = [
        [(s, s, s) for s in (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)],
        [(m, n, n) for n in (256, 1024, 4096, 8192) for m in (1, 8, 16, 64, 128, 256)],
        [(m, m, k) for m in (1024, 2048, 4096, 8192) for k in (64, 128, 256, 512)],
        [(m, n, k) for m, k in ((512, 1024), (2048, 4096), (4096, 8192)) for n in (64, 128, 256, 512)],
        [(512, 1536, 512), (1024, 3072, 1024), (2048, 4608, 1536), (2048, 11008, 4096), (4096, 12288, 3072), (4096, 14336, 4096)],
        [(1024, 1024 - alignment // 4, 1024), (2048, 2048 - alignment // 4, 2048), (4096, 4096 - alignment // 4, 4096)]
        if alignment >= 4
        else [],
    ]
    longest = max(map(len, families))
    return list(dict.fromkeys(family[i] for i in range(longest) for family in families if i < len(family)))


def _products(clock: Clock, pool: _Pool, key: str, peak: float, seconds: float, say: Say) -> tuple[Product, ...]:
    """Those products of the grid that fit in the time and in memory, at least the smallest ones."""
    dtype = DTYPES[key]
    shapes = [s for s in grid(_alignment(clock.device, dtype)) if pool.fits(max(s[0] * s[2], s[1] * s[2], s[0] * s[1]), dtype)]
    each = seconds / len(shapes)
    smallest = sorted(shapes, key=prod)[:FEWEST_PRODUCTS]
    shapes = [shape for shape in shapes if 4 * 2.0 * prod(shape) / peak <= 2 * each or shape in smallest]
    found = []
    for i, shape in enumerate(shapes):
        say(f"product {i + 1} of {len(shapes)}: {' × '.join(map(str, shape))}")
        found.append(Product(shape, measure(clock, _product(clock, pool, dtype, shape), each)))
    return tuple(found)


def _attention(clock: Clock, pool: _Pool, key: str, seconds: float, peak: float) -> tuple[tuple[Shape, Timing], ...]:
    dtype, width = DTYPES[key], 128
    found: list[tuple[Shape, Timing]] = []
    each = seconds / len(ATTENTION_SIZES)
    for heads, length in ATTENTION_SIZES:
        if found and 4 * 2.0 * heads * length**2 * width / peak > 2 * each:
            break
        q, k, v = (pool.take(dtype, 1, heads, length, width) for _ in range(3))
        call = lambda q=q, k=k, v=v: scaled_dot_product_attention(q(), k(), v(), is_causal=True)  # noqa: E731
        found.append(((heads, length, width), measure(clock, call, each)))
    return tuple(found)


# ---- what follows from it -------------------------------------------------------------------------------------------


def _rate(shape: Shape, timing: Timing) -> float:
    return 2.0 * prod(shape) / timing.seconds


def _alignment(device: torch.device, dtype: torch.dtype) -> int:
    """Elements that a row's length should be a multiple of."""
    return CUDA_ALIGNMENT // dtype.itemsize if device.type == "cuda" else 1


def _fitted(
    products: Sequence[Product], dtype: str, peak: float, bandwidth: float, units: int, launch: float, kind: str
) -> Gemm:
    size = DTYPES[dtype].itemsize
    times = {product.shape: product.timing.seconds for product in products}
    aligned = CUDA_ALIGNMENT if kind == "cuda" else 1
    losses = [
        times[shape[0], shape[2], shape[2]] / seconds
        for shape, seconds in times.items()
        if shape[1] * size % aligned and (shape[0], shape[2], shape[2]) in times
    ]
    return fit_gemm(
        [(1, *shape) for shape in times],
        list(times.values()),
        peak,
        bandwidth,
        units=units,
        launch_seconds=launch,
        itemsize=size,
        tiles=GPU_TILES if kind == "cuda" else CPU_TILES,
        alignment_bytes=aligned,
        misaligned_efficiency=min(1.0, median(losses)) if losses else 1.0,
    )


def _attention_efficiency(accelerator: Accelerator, dtype: str, rows: Sequence[tuple[Shape, Timing]]) -> float:
    """The share of peak at which the price of attention meets the measured times, in the median."""
    cluster, name = Cluster("measured", accelerator, ()), str(DTYPES[dtype]).removeprefix("torch.")
    launch = accelerator.launch_seconds
    shares = []
    for (heads, length, width), timing in rows:
        ideal = attention_seconds(cluster, heads, length, length, width, width, True, name) - launch
        shares.append(ideal / max(timing.seconds - launch, 1e-9))
    return min(1.0, median(shares))


# ---- the device itself ----------------------------------------------------------------------------------------------


def _units(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return torch.get_num_threads()


def device_label(device: torch.device) -> str:
    """The device's product name; no name of the host."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or this process's share of the machine's memory: as much as each of its local ranks gets."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    quota = Path("/sys/fs/cgroup/memory.max")  # the limit of a container
    if quota.is_file() and (text := quota.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

"""Constants of matrix products from measured times: the inverse of `autotp.price.compute.gemm_seconds`.

The model's waves and splits are known once `units` and `tiles` are; what is fitted are the positive constants
`efficiency`, `tile_overhead`, `k_overhead`, `split_k_seconds` and `start_seconds`; `max_efficiency` is the best rate
measured. They minimise the mean of |log(predicted / measured)|, so that relative errors count and a row that was
measured badly pulls no harder than any other (least absolute deviations); products weigh by the cube root of their
time, because a plan's time lies in the long ones, while the short ones fix the overheads. The search is a pattern search
(Hooke & Jeeves 1961, "Direct search solution of numerical and statistical problems"): one or two constants at a time
are moved by a factor, and the factor is halved when nothing helps; the best of a few starts is kept. It draws no random
numbers, so equal measurements give equal constants. 375 shapes take one or two seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotp.errors import AutotpError
from autotp.price.accelerator import Gemm
from autotp.price.compute import tilings

Floats = NDArray[np.float64]
Constants = dict[str, float]

GPU_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Output tiles (rows, columns) of cuBLAS's and hipBLASLt's 16-bit kernels, the best first."""

STARTS = tuple(
    {"efficiency": 0.85, "tile_overhead": tile, "k_overhead": k, "split_k_seconds": 3e-6, "start_seconds": 4e-6}
    for tile in (10.0, 40.0)
    for k in (20.0, 200.0)
)
LIMITS = {
    "efficiency": (0.01, 1.0),
    "tile_overhead": (0.1, 200.0),
    "k_overhead": (0.1, 4000.0),
    "split_k_seconds": (1e-8, 1e-4),
    "start_seconds": (1e-8, 1e-4),
}
FIRST_STEP, LAST_STEP = 0.15, 0.002
"""Relative steps at which the search starts and ends."""


def fit_gemm(
    shapes: Sequence[tuple[int, int, int, int]],
    seconds: Sequence[float],
    peak: float,
    bandwidth: float,
    *,
    units: int,
    launch_seconds: float,
    itemsize: int = 2,
    tiles: Sequence[tuple[int, int]] = GPU_TILES,
    alignment_bytes: int = 16,
    misaligned_efficiency: float = 0.69,
) -> Gemm:
    """The constants with which `gemm_seconds` comes closest to measured products.

    Args:
        shapes: (batch, m, n, k) of each product, in elements; rows whose length is no multiple of `alignment_bytes`
            are left out of the fit.
        seconds: measured time of each, in the same order.
        peak: FLOP/s of the dtype measured.
        bandwidth: bytes/s that a long copy reaches (the accelerator's bandwidth × bandwidth_efficiency).
        units: processors that work on tiles at the same time (SMs, compute units, cores).
        launch_seconds: duration of the shortest kernel, below which no product's start is put.
        itemsize: bytes per element of operands and result.
        tiles: output tiles (rows, columns), the best first.
        alignment_bytes, misaligned_efficiency: taken over as they are.

    Raises:
        AutotpError: fewer than 8 usable products, lists of different lengths, or a size, time or rate that is not
            positive.
    """
    if len(shapes) != len(seconds):
        raise AutotpError(f"cannot fit {len(shapes)} products to {len(seconds)} times: give one time per product")
    if not all(size > 0 for shape in shapes for size in shape) or not all(time > 0 for time in seconds):
        raise AutotpError("cannot fit matrix products: every size and every time must be greater than 0")
    if min(peak, bandwidth, units, itemsize) <= 0 or launch_seconds < 0:
        raise AutotpError("cannot fit matrix products: peak, bandwidth, units and itemsize must be greater than 0")
    even = [all(length * itemsize % alignment_bytes == 0 for length in shape[2:]) for shape in shapes]
    used = [(shape, time) for shape, time, keep in zip(shapes, seconds, even, strict=True) if keep]
    if len(used) < 8:
        raise AutotpError(f"cannot fit matrix products to {len(used)} aligned shapes: measure at least 8")
    limits = LIMITS | {"start_seconds": (max(launch_seconds, LIMITS["start_seconds"][0]), LIMITS["start_seconds"][1])}
    best = max(2.0 * prod(shape) / time for shape, time in used) / peak
    gemm = Gemm(
        units=units,
        tiles=tuple(tiles),
        **STARTS[0],
        max_efficiency=min(best, 1.0),
        alignment_bytes=alignment_bytes,
        misaligned_efficiency=misaligned_efficiency,
    )
    predict = _predictor(gemm, [shape for shape, _ in used], peak, bandwidth, itemsize)
    measured = np.log([time for _, time in used])

    def error(constants: Constants) -> float:
        return float(np.average(np.abs(np.log(predict(constants)) - measured), weights=np.exp(measured / 3)))

    found: dict[str, Any] = min((_search(error, start, limits) for start in STARTS), key=error)
    return replace(gemm, **found)


def _predictor(
    gemm: Gemm, shapes: Sequence[tuple[int, int, int, int]], peak: float, bandwidth: float, itemsize: int
) -> Callable[[Constants], Floats]:
    """What `gemm_seconds` says for all shapes, as a function of the constants.

    The ways to tile each shape do not depend on the constants and are listed once: arrays of shape (shapes, tilings).
    """
    batch, m, n, k = np.array(shapes, dtype=np.float64).T
    flops = 2 * batch * m * n * k
    memory = itemsize * batch * (m * k + k * n + m * n) / bandwidth
    fastest = np.maximum(flops / (peak * gemm.max_efficiency), memory)
    ways = np.array([list(tilings(gemm.units, gemm.tiles, m, n, k, batch)) for batch, m, n, k in shapes])
    elements, depth, reloads, split = (ways[:, :, column] for column in range(4))
    first = sum(1 / length for length in gemm.tiles[0])

    def predict(constants: Constants) -> Floats:
        rate = peak / gemm.units * constants["efficiency"] * (1 + constants["tile_overhead"] * first)
        tiled = 2 * elements * (1 + constants["tile_overhead"] * reloads) / rate * (depth + constants["k_overhead"])
        arithmetic = (tiled + constants["split_k_seconds"] * split).min(axis=1)
        seconds: Floats = constants["start_seconds"] + np.maximum(arithmetic, fastest)
        return seconds

    return predict


def _search(error: Callable[[Constants], float], start: Constants, limits: dict[str, tuple[float, float]]) -> Constants:
    """The constants at which no step of one or two of them, up or down, lowers the error."""
    moves = [move for move in product((0, 1, -1), repeat=len(limits)) if 1 <= sum(map(abs, move)) <= 2]
    best = {name: min(max(start[name], low), high) for name, (low, high) in limits.items()}
    lowest, step = error(best), FIRST_STEP
    while step > LAST_STEP:
        improved = False
        for move in moves:
            trial = {
                name: min(max(best[name] * (1 + step) ** sign, low), high)
                for sign, (name, (low, high)) in zip(move, limits.items(), strict=True)
            }
            found = error(trial)
            if found < lowest - 1e-9:
                best, lowest, improved = trial, found, True
        if not improved:
            step /= 2
    return best

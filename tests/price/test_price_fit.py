"""Constants come back from times that they made, whatever one bad row says."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from autotp.errors import AutotpError
from autotp.price.accelerator import Gemm
from autotp.price.cluster import Cluster, load_cluster
from autotp.price.compute import gemm_seconds
from autotp.price.fit import GPU_TILES, fit_gemm

H100 = load_cluster("dgx-h100").accelerator
SHAPES = [(batch, m, n, k) for batch, m, n, k in product((1, 4), (256, 1024, 4096), (256, 1024, 4096), (256, 1024, 4096))]
TRUE = Gemm(100, GPU_TILES, 0.8, 0.75, 30.0, 150.0, 4e-6, 16, 0.69, 6e-6)


def times(gemm: Gemm, shapes: list[tuple[int, int, int, int]] = SHAPES) -> list[float]:
    cluster = Cluster("", replace(H100, gemm=gemm), ())
    return [gemm_seconds(cluster, m, n, k, "bfloat16", batch) for batch, m, n, k in shapes]


def fit(seconds: list[float], shapes: list[tuple[int, int, int, int]] = SHAPES, units: int = 100) -> Gemm:
    bandwidth = H100.bandwidth * H100.bandwidth_efficiency
    return fit_gemm(shapes, seconds, H100.peak_flops["bf16"], bandwidth, units=units, launch_seconds=H100.launch_seconds)


def worst(gemm: Gemm) -> float:
    return max(abs(found / true - 1) for found, true in zip(times(gemm), times(TRUE), strict=True))


def test_constants_that_made_the_times_are_found() -> None:
    found = fit(times(TRUE))
    assert worst(found) < 0.02
    assert found.efficiency == pytest.approx(0.8, rel=0.05) and found.start_seconds == pytest.approx(6e-6, rel=0.05)
    assert found.units == 100 and found.tiles == GPU_TILES


def test_one_bad_row_changes_nothing() -> None:
    seconds = times(TRUE)
    seconds[10] *= 5
    assert worst(fit(seconds)) < 0.02


def test_equal_times_give_equal_constants() -> None:
    assert fit(times(TRUE)) == fit(times(TRUE))


def test_misaligned_rows_are_left_out() -> None:
    ragged = [(1, 512, 513, 512), (1, 512, 512, 1023)]
    assert fit([*times(TRUE), 1.0, 1.0], SHAPES + ragged) == fit(times(TRUE))


def test_a_start_is_never_below_the_shortest_kernel() -> None:
    assert fit(times(replace(TRUE, start_seconds=0.0))).start_seconds >= H100.launch_seconds


def test_wrong_input() -> None:
    with pytest.raises(AutotpError, match=r"54 products to 1 times: give one time per product"):
        fit([1.0])
    with pytest.raises(AutotpError, match=r"every size and every time must be greater than 0"):
        fit([0.0], [(1, 8, 8, 8)])
    with pytest.raises(AutotpError, match=r"to 1 aligned shapes: measure at least 8"):
        fit([1.0], [(1, 8, 8, 8)])
    with pytest.raises(AutotpError, match=r"peak, bandwidth, units and itemsize"):
        fit(times(TRUE), units=0)

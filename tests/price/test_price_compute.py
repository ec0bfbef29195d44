"""Compute is never faster than the hardware allows, and as slow as its shape makes it."""

from __future__ import annotations

import random

import pytest

from autotp.errors import AutotpError
from autotp.price.cluster import cluster_names, load_cluster
from autotp.price.compute import DTYPES, attention_seconds, gemm_seconds, itemsize, memory_seconds, peak_flops

H100 = load_cluster("dgx-h100")
SIZES = (1, 2, 3, 7, 16, 64, 100, 128, 257, 1000, 1024, 4096, 10922, 16384, 50257)


def share_of_peak(m: int, n: int, k: int, batch: int = 1) -> float:
    return 2 * batch * m * n * k / gemm_seconds(H100, m, n, k, "bfloat16", batch) / 989e12


@pytest.mark.parametrize("name", cluster_names())
def test_gemm_never_beats_the_roofline(name: str) -> None:
    cluster, draw = load_cluster(name), random.Random(name)
    for _ in range(300):
        m, n, k, batch = draw.choice(SIZES), draw.choice(SIZES), draw.choice(SIZES), draw.choice((1, 2, 33))
        dtype = draw.choice(list(DTYPES))
        seconds = gemm_seconds(cluster, m, n, k, dtype, batch)
        traffic = batch * (m * k + k * n + m * n) * itemsize(dtype)
        assert seconds >= 2 * batch * m * n * k / peak_flops(cluster, dtype)
        assert seconds >= traffic / cluster.accelerator.bandwidth
        assert seconds >= cluster.accelerator.launch_seconds


@pytest.mark.parametrize("name", cluster_names())
def test_attention_never_beats_the_roofline(name: str) -> None:
    cluster, draw = load_cluster(name), random.Random(name)
    for _ in range(200):
        heads, s, t = draw.choice(SIZES), draw.choice(SIZES[:-2]), draw.choice(SIZES[:-2])
        e, f, causal, dtype = draw.choice((32, 64, 128)), draw.choice((64, 128)), draw.random() < 0.5, "bfloat16"
        seconds = attention_seconds(cluster, heads, s, t, e, f, causal, dtype)
        pairs = sum(min(i + 1, t) for i in range(s)) if causal else s * t
        assert seconds >= 2 * heads * pairs * (e + f) / peak_flops(cluster, dtype)
        assert seconds >= 2 * heads * (s * e + t * e + t * f + s * f) / cluster.accelerator.bandwidth


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((512, 512, 512), 0.04),
        ((1024, 1024, 1024), 0.26),
        ((2048, 2048, 2048), 0.65),
        ((4096, 4096, 4096), 0.79),
        ((4096, 4096, 512), 0.56),
        ((4096, 4096, 1024), 0.69),
        ((8192, 8192, 8192), 0.79),
    ],
)
def test_h100_shares_of_peak(shape: tuple[int, int, int], share: float) -> None:
    """Measured on H100 in bf16: OpenXLA's matmul table; 8192³ on an H200, the same chip."""
    assert share_of_peak(*shape) == pytest.approx(share, rel=0.1)


def test_splitting_k_eight_ways_costs_efficiency() -> None:
    """A row-parallel product loses before any communication (OpenXLA: 0.56 against 0.79 of peak)."""
    assert 0.6 < share_of_peak(4096, 4096, 512) / share_of_peak(4096, 4096, 4096) < 0.8


def test_misaligned_rows_are_slower() -> None:
    """ml-engineering, training/performance: 273 against 398 TFLOP/s at 10922 and 10944 columns on H100."""
    ratio = share_of_peak(4096, 10922, 4096) / share_of_peak(4096, 10944, 4096)
    assert ratio == pytest.approx(273 / 398, rel=0.05)


def test_a_few_rows_cost_as_much_as_the_weights_take_to_read() -> None:
    one = gemm_seconds(H100, 1, 8192, 8192, "bfloat16")
    assert one == pytest.approx(gemm_seconds(H100, 16, 8192, 8192, "bfloat16"), rel=0.1)
    assert one < 1.5 * 2 * 8192**2 / H100.accelerator.bandwidth


def test_waves() -> None:
    """132 SMs take one tile of 256 × 128 each; a few columns more cost part of a second wave."""
    full = gemm_seconds(H100, 256 * 12, 128 * 11, 8192, "bfloat16")
    assert gemm_seconds(H100, 256 * 12, 128 * 11 + 8, 8192, "bfloat16") > 1.2 * full


def test_batched_is_as_good_as_large() -> None:
    assert share_of_peak(1024, 1024, 4096, batch=16) == pytest.approx(share_of_peak(4096, 4096, 4096), rel=0.05)


def test_dtypes_without_a_peak_compute_in_fp32() -> None:
    cpu = load_cluster("cpu")
    assert peak_flops(cpu, "float16") == peak_flops(cpu, "int64") == cpu.accelerator.peak_flops["fp32"]
    assert peak_flops(H100, "complex64") == peak_flops(H100, "float32") / 4
    assert gemm_seconds(H100, 4096, 4096, 4096, "float32") > 5 * gemm_seconds(H100, 4096, 4096, 4096, "bfloat16")


def test_memory_seconds() -> None:
    hbm = load_cluster("hgx-h200")
    assert memory_seconds(hbm, 4.3e12) == pytest.approx(1.0, rel=0.01)
    assert memory_seconds(H100, 0) == H100.accelerator.launch_seconds
    assert memory_seconds(H100, 1000, kernels=3.0) > 3 * H100.accelerator.launch_seconds
    assert memory_seconds(H100, 1000, kernels=0) < 1e-9


def test_attention_halves_with_a_causal_mask_and_decoding_reads_the_cache() -> None:
    full = attention_seconds(H100, 64, 8192, 8192, 128, 128, False, "bfloat16")
    assert attention_seconds(H100, 64, 8192, 8192, 128, 128, True, "bfloat16") == pytest.approx(full / 2, rel=0.02)
    last_half = attention_seconds(H100, 64, 4096, 8192, 128, 128, True, "bfloat16", start=4096)
    assert last_half == pytest.approx(3 / 8 * full, rel=0.02)
    cache = 2 * 8 * 65536 * 256
    decode = attention_seconds(H100, 8, 1, 65536, 128, 128, False, "bfloat16")
    assert cache / H100.accelerator.bandwidth < decode < 2 * cache / H100.accelerator.bandwidth


def test_empty_tensors_cost_a_launch() -> None:
    launch = H100.accelerator.launch_seconds
    assert gemm_seconds(H100, 0, 0, 8, "bfloat16") == launch
    assert attention_seconds(H100, 0, 8, 8, 8, 8, True, "bfloat16") == launch


def test_wrong_input() -> None:
    with pytest.raises(AutotpError, match=r"unknown dtype 'bf16': use one of float64"):
        gemm_seconds(H100, 8, 8, 8, "bf16")
    with pytest.raises(AutotpError, match=r"matrix product of n = -1: sizes must be at least 0"):
        gemm_seconds(H100, 8, -1, 8, "bfloat16")
    with pytest.raises(AutotpError, match=r"attention of s = -8"):
        attention_seconds(H100, 8, -8, 8, 8, 8, True, "bfloat16")
    with pytest.raises(AutotpError, match=r"cannot price -1 bytes"):
        memory_seconds(H100, -1)

"""Accelerators' files: peaks are dense, optional times have defaults, mistakes are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotp.errors import AutotpError
from autotp.price.accelerator import Accelerator, accelerator_names, read_accelerator
from autotp.price.sections import cost_models_dir, open_section

FOLDER = cost_models_dir() / "accelerators"


def load(path: Path) -> Accelerator:
    return read_accelerator(open_section(path))


@pytest.mark.parametrize("name", accelerator_names())
def test_figures_are_plausible(name: str) -> None:
    device = load(FOLDER / f"{name}.yaml")
    peaks, gemm = device.peak_flops, device.gemm
    assert peaks.get("bf16", peaks["fp32"]) >= peaks["fp32"] >= peaks.get("fp64", 0.0)
    if "fp8" in peaks:
        assert peaks["fp8"] == pytest.approx(2 * peaks["bf16"], rel=0.02), "one of the two is not dense"
    assert gemm.max_efficiency <= 0.95 and device.attention_efficiency <= 0.95
    assert gemm.tiles[0][0] * gemm.tiles[0][1] == max(rows * columns for rows, columns in gemm.tiles)
    assert "source" in open_section(FOLDER / f"{name}.yaml").entries


@pytest.mark.parametrize(
    ("name", "tflops", "gigabytes"),
    [("h100-sxm", 989, 3350), ("h100-pcie", 756, 2000), ("l4", 121, 300), ("l40s", 362, 864), ("b200", 2250, 8000)],
)
def test_peaks_are_dense(name: str, tflops: float, gigabytes: float) -> None:
    """Tables in circulation give H100 1979 and L4 242 TFLOP/s, which is with sparsity, and L4 3350 GB/s."""
    device = load(FOLDER / f"{name}.yaml")
    assert device.peak_flops["bf16"] == tflops * 1e12 and device.bandwidth == gigabytes * 1e9


def test_start_and_host_launch_default_to_the_launch_time(tmp_path: Path) -> None:
    lines = (FOLDER / "h100-sxm.yaml").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(line for line in lines if "host_launch_us" not in line and "start_us" not in line), encoding="utf-8")
    device = load(path)
    assert device.gemm.start_seconds == device.host_launch_seconds == device.launch_seconds == 2e-6


def test_a_time_of_unknown_unit_is_refused(tmp_path: Path) -> None:
    text = (FOLDER / "h100-sxm.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("start_us", "start_s"), encoding="utf-8")
    with pytest.raises(AutotpError, match=r"mine.yaml, line \d+: 'start_s' has no known unit: give exactly one of start_us, "):
        load(path)

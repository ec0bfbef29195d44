"""`autotp calibrate`: timing, what follows from the times, the file, and ends before the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from autotp import calibrate as calibrate_module
from autotp import calibrate_clock, calibrate_device, cli
from autotp.calibrate import calibrate, ranks_per_node
from autotp.calibrate_clock import Alone, CudaClock, Timing, measure
from autotp.calibrate_collectives import Collectives, MeasuredSweep, Ranks, envelope, fit_links, groups_of
from autotp.calibrate_device import Device, grid, measure_device
from autotp.calibrate_file import fits, loaded, shipped_cluster, text_of
from autotp.errors import AutotpError
from autotp.plans import write_whole
from autotp.price.cluster import KINDS, load_cluster
from autotp.price.communication import Group, collective_seconds
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
SMALL_POOL = 1 << 24


class FlopClock:
    """A device that does `rate` FLOP/s, or writes 20 GB/s, after a launch of 2 µs."""

    def __init__(self, rate: float) -> None:
        self.device, self.rate = torch.device("cpu"), rate

    def sample(self, call: Callable[[], object], count: int) -> tuple[float, float]:
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            result = call()
        flops = counter.get_total_flops()
        assert isinstance(result, torch.Tensor)
        return 2e-6 + (flops / self.rate if flops else result.nbytes / 20e9), 5e-6


def _attention_flops(query: Sequence[int], *args: Any, **options: Any) -> int:
    """Of all pairs, whatever the mask."""
    batch, heads, length, width = query
    return 4 * batch * heads * length**2 * width


class ScriptedClock:
    """Gives the times of a list, one after the other."""

    device = torch.device("cpu")

    def __init__(self, times: Sequence[float]) -> None:
        self.times, self.counts = list(times), []

    def sample(self, call: Callable[[], object], count: int) -> tuple[float, float]:
        self.counts.append(count)
        return self.times.pop(0), 0.0


# ---- clocks ---------------------------------------------------------------------------------------------------------


def test_median_and_spread_of_repetitions() -> None:
    timing = measure(ScriptedClock([9.0, 1.0, 1.0, 2.0, 1.5, 40.0, 1.5]), lambda: None, seconds=5.0)
    assert timing.seconds == 1.5  # neither the warm-up nor the outlier counts
    assert timing.spread == pytest.approx((2.0 - 1.5) / 1.5)


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = ScriptedClock([1e-4] * 100)
    measure(clock, lambda: None, seconds=1e-6)
    assert clock.counts == [1, 1, 5, 5, 5]


def test_a_team_counts_its_slowest_rank_and_starts_together() -> None:
    class Two(Alone):
        starts = 0

        def start(self) -> None:
            self.starts += 1

        def slowest(self, values: Sequence[float]) -> list[float]:
            return [max(value, 3.0) for value in values]

    team = Two()
    assert measure(ScriptedClock([1.0] * 5), lambda: None, 1.0, team).seconds == 3.0
    assert team.starts == 4


class FakeCuda:
    """`torch.cuda` as the clock uses it; a kernel takes its time when the events around it have passed."""

    def __init__(self) -> None:
        self.now, self.synchronized = 0.0, False

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self, device: torch.device) -> None:
        self.synchronized = True


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at, self.passed = cuda, -1.0, False

    def record(self) -> None:
        assert self.cuda.synchronized
        self.at = self.cuda.now

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.passed, "the end has not been waited for"
        return 1e3 * (end.at - self.at)


def test_cuda_clock_times_the_device_and_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_clock, "PLUG_BYTES", 16)
    cuda, calls = FakeCuda(), []
    clock = CudaClock(torch.device("cpu"), cuda)
    assert clock.plugs > 0

    def kernel() -> None:
        calls.append(cuda.now)
        cuda.now += 7e-6

    device, host = clock.sample(kernel, 10)
    assert device == pytest.approx(7e-6)
    assert 0 < host < 1e-3
    assert len(calls) == 11  # one before the first event


# ---- one device -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device() -> Device:
    """What is measured of a device of 100 GFLOP/s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(calibrate_device.POOL_BYTES, "cpu", SMALL_POOL)
        return measure_device(FlopClock(1e11), 0.1)


def test_peaks_bandwidth_and_attention(device: Device) -> None:
    accelerator = device.accelerator
    assert accelerator.peak_flops["fp32"] == pytest.approx(1e11, rel=0.01)
    assert accelerator.peak_flops["bf16"] == pytest.approx(1e11, rel=0.01)
    assert accelerator.launch_seconds == pytest.approx(2e-6, rel=0.01)
    assert device.launch.host_seconds == 5e-6
    assert accelerator.bandwidth == pytest.approx(40e9, rel=0.01)
    assert accelerator.memory_bytes > 2**28
    assert 0.4 < accelerator.attention_efficiency < 0.9  # it did the masked half too


def test_prices_meet_the_measured_times(device: Device) -> None:
    cluster = loaded(text_of(device, (), "cpu", "measured in a test"))
    assert cluster.accelerator.peak_flops["fp32"] == pytest.approx(device.accelerator.peak_flops["fp32"], rel=1e-3)
    assert cluster.accelerator.gemm.tiles == device.accelerator.gemm.tiles
    found = {fit.what: fit for fit in fits(cluster, device, None)}
    assert found["attention"].median < 0.01 and found["copies"].median < 0.01 and found["matrix products"].median < 0.05
    assert found["matrix products"].count == len(device.products) >= 12
    assert [link.tier for link in cluster.links] == [link.tier for link in load_cluster("cpu").links]


def test_grid_has_all_families_and_pairs_for_misaligned_rows() -> None:
    shapes = grid(8)
    assert (1, 4096, 4096) in shapes and (1024, 1024, 64) in shapes and (4096, 4096, 4096) in shapes
    odd = [shape for shape in shapes if shape[1] % 8]
    assert odd and all((shape[0], shape[2], shape[2]) in shapes for shape in odd)
    assert len(set(shapes)) == len(shapes)
    assert not any(shape[1] % 4 for shape in grid(1))


@pytest.mark.parametrize(
    "label, gigabytes, name",
    [
        ("NVIDIA H200", 150, "h200"),
        ("NVIDIA H100 80GB HBM3", 85, "h100-sxm"),
        ("NVIDIA A100-SXM4-40GB", 42, "a100-40gb"),
        ("NVIDIA B200", 192, "b200"),
        ("AMD Instinct MI300X", 206, "mi300x"),
        ("cpu", 16, "cpu"),
    ],
)
def test_shipped_profile_of_the_same_device(label: str, gigabytes: int, name: str) -> None:
    found = shipped_cluster(label, gigabytes * 10**9)
    assert found is not None and found.accelerator.name == name


def test_no_shipped_profile_of_an_unknown_device() -> None:
    assert shipped_cluster("NVIDIA T1000", 4 * 10**9) is None
    load_cluster("pcie-workstation")  # whose links stand in


# ---- links ----------------------------------------------------------------------------------------------------------


def test_groups() -> None:
    assert groups_of(2, 2) == [(2, 1)]
    assert groups_of(6, 6) == [(2, 1), (4, 1), (6, 1)]
    assert groups_of(8, 4) == [(2, 1), (4, 1), (8, 1), (2, 4)]
    assert groups_of(3, 1) == [(2, 1), (3, 1)]


def _synthetic(world: int, per_node: int, launch: float, latency: float, bandwidth: float) -> Collectives:
    """Rings of these constants, alike on every tier."""
    steps = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 0.5}
    sweeps = []
    for ranks, stride in groups_of(world, per_node):
        for kind in KINDS:
            passes = 2 if kind == "all_reduce" else 1
            points = [
                (size, launch + steps[kind] * (ranks - 1) * latency + passes * (ranks - 1) / ranks * size / bandwidth)
                for size in (ranks << 10, ranks << 16, ranks << 22)
            ]
            sweeps.append(MeasuredSweep(kind, ranks, stride, tuple((size, Timing(time, time, 0.0)) for size, time in points)))
    return Collectives(world, per_node, tuple(sweeps))


def test_constants_of_links_are_found_again() -> None:
    (link,) = fit_links(_synthetic(4, 4, 2e-4, 5e-5, 1e9))
    assert (link.tier, link.devices) == ("node", 4)
    assert link.launch == pytest.approx(2e-4)
    assert link.latency == pytest.approx(5e-5)
    assert link.bandwidth * link.efficiency == pytest.approx(1e9, rel=1e-6) or link.efficiency == 1.0


def test_two_tiers_in_a_file_price_what_was_measured(device: Device) -> None:
    measured = _synthetic(8, 4, 2e-4, 5e-5, 1e9)
    links = fit_links(measured)
    assert [(link.tier, link.devices) for link in links] == [("node", 4), ("network", None)]
    cluster = loaded(text_of(device, links, "cpu", "measured in a test"))
    for sweep in measured.sweeps:
        for size, timing in sweep.points:
            seconds = collective_seconds(cluster, sweep.kind, size, Group(sweep.ranks, sweep.stride))
            assert seconds == pytest.approx(timing.seconds, rel=0.01)


def test_noise_of_small_messages_is_levelled() -> None:
    points = tuple((size, Timing(time, time, 0.0)) for size, time in ((1024, 5.0), (2048, 3.0), (4096, 4.0)))
    assert envelope(points) == ((1024.0, 3.0), (2048.0, 3.0), (4096.0, 4.0))


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_calibrated_file_loads_and_says_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrate_device.POOL_BYTES, "cpu", SMALL_POOL)
    output = tmp_path / "mine.yaml"
    said: list[str] = []
    found = calibrate(output, seconds=0.5, device="cpu", say=said.append)
    cluster = load_cluster(output)
    assert cluster.accelerator.peak_flops["fp32"] > 1e8
    assert {fit.what for fit in found.fits} == {"matrix products", "copies", "attention"}
    text = output.read_text()
    assert text == found.text
    assert f"torch {torch.__version__}" in text.replace("\n ", "") and "median" in text and "links not measured" in text
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4
    assert any("torchrun" in warning for warning in found.warnings)
    assert any(words.startswith("product ") for words in said)
    assert os.listdir(tmp_path) == ["mine.yaml"]


def _on_two_ranks(folder: str) -> None:
    calibrate_device.POOL_BYTES["cpu"] = SMALL_POOL
    output = Path(folder) / "two.yaml"
    found = calibrate(output, seconds=1.0, device="cpu")
    dist.barrier()
    cluster = load_cluster(output)
    assert cluster.max_devices == 2
    assert sorted({sweep.kind for sweep in cluster.links[0].sweeps}) == sorted(KINDS)
    assert found.collectives is not None
    times = [timing.seconds for sweep in found.collectives.sweeps for _, timing in sweep.points]
    assert Ranks().slowest(times) == times, "every rank has the same times"
    assert cluster.links[0].bandwidth > 0
    assert os.listdir(folder) == ["two.yaml"]


def test_two_ranks_measure_collectives(tmp_path: Path) -> None:
    run_ranks(_on_two_ranks, 2, str(tmp_path))


def _on_two_nodes(folder: str) -> None:
    calibrate_device.POOL_BYTES["cpu"] = SMALL_POOL
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    output = Path(folder) / "five.yaml"
    if dist.get_world_size() == 5:
        with pytest.raises(AutotpError, match="start as many on each"):
            calibrate(output, seconds=1.0, device="cpu")
        return
    calibrate(output, seconds=1.0, device="cpu")
    dist.barrier()
    node, network = load_cluster(output).links
    assert {(sweep.ranks, sweep.stride) for sweep in node.sweeps} == {(2, 1)}
    assert {(sweep.ranks, sweep.stride) for sweep in network.sweeps} == {(4, 1), (2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 5])
def test_two_nodes_make_two_tiers(tmp_path: Path, count: int) -> None:
    run_ranks(_on_two_nodes, count, str(tmp_path))


def _one_rank_fails(folder: str) -> None:
    def broken(*args: Any) -> None:
        if dist.get_rank() == 1:
            raise ValueError("no such kernel")

    calibrate_module.measure_device = broken  # type: ignore[assignment]
    with pytest.raises(AutotpError, match=r"no such kernel \(on rank 1\)"):
        calibrate(Path(folder) / "two.yaml", seconds=0.2, device="cpu")
    assert os.listdir(folder) == []


def test_a_failing_rank_ends_all_and_writes_nothing(tmp_path: Path) -> None:
    run_ranks(_one_rank_fails, 2, str(tmp_path))


def test_machines_with_different_numbers_of_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uneven(Alone):
        def slowest(self, values: Sequence[float]) -> list[float]:
            return [max(value, 4.0 if value > 0 else -1.0) for value in values]

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(AutotpError, match="1 to 4 ranks"):
        ranks_per_node(Uneven(), 5)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def autotp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def test_command_prints_a_table_and_warnings(autotp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrate_device.POOL_BYTES, "cpu", SMALL_POOL)
    output = tmp_path / "mine.yaml"
    output.write_text("old")
    code, out, err = autotp("calibrate", "--output", output, "--seconds", "0.5", "--device", "cpu", "--force")
    assert code == 0, err
    assert "peak fp32" in out and "memory bandwidth" in out and f"--cluster {output}" in out
    assert "GFLOP/s" in out or "TFLOP/s" in out
    assert "autotp: warning: links were not measured" in err
    assert load_cluster(output).accelerator.name == "mine"


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--output", "there-is-no/such.yaml"], "there is no directory there-is-no"),
        (["--output", "mine.txt"], "a cluster file ends in .yaml"),
        (["--output", "mine.yaml"], "mine.yaml exists: give --force"),
        (["--output", "new.yaml", "--seconds", "0"], "--seconds is 0"),
        (["--output", "new.yaml", "--seconds", "nan"], "--seconds is nan"),
        (["--output", "new.yaml", "--quick", "--seconds", "5"], "give one of them"),
        (["--output", "new.yaml", "--device", "tpu"], "--device is 'tpu'"),
        ([], "Missing option '--output'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    autotp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("old")
    monkeypatch.setattr(calibrate_module, "measure_device", lambda *args: pytest.fail("measured"))
    code, out, err = autotp("calibrate", *options)
    assert (code, out) == (2, "")
    assert sentence in err and err.count("\n") == 1
    assert Path("mine.yaml").read_text() == "old" and os.listdir() == ["mine.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(autotp: Any, tmp_path: Path) -> None:
    code, _, err = autotp("calibrate", "--output", tmp_path / "new.yaml", "--device", "cuda")
    assert code == 2 and "PyTorch sees no GPU" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_writes_nothing(autotp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr(calibrate_module, "measure_device", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, out, err = autotp("calibrate", "--output", tmp_path / "mine.yaml", "--device", "cpu")
    finally:
        signal.signal(signal.SIGINT, usual)
    assert (code, out) == (130, "")
    assert err == f"autotp: interrupted: {tmp_path / 'mine.yaml'} was not written\n"
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_interruption_of_the_last_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "mine.yaml"
    output.write_text("old")

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(output, "new")
    assert os.listdir(tmp_path) == ["mine.yaml"] and output.read_text() == "old"


@pytest.mark.slow
def test_under_torchrun_rank_0_alone_speaks(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "autotp", "calibrate", "--seconds", "4"]
    ran = subprocess.run(
        [sys.executable, *command, "--device", "cpu", "--output", tmp_path / "mine.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("peak fp32") == 1 and "all-to-all, 3 ranks" in ran.stdout
    assert {sweep.ranks for sweep in load_cluster(tmp_path / "mine.yaml").links[0].sweeps} == {2, 3}

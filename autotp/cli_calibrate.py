"""The command `autotp calibrate`: options, ranks, interruption, and the table of what was measured."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autotp.errors import AutotpError

if TYPE_CHECKING:
    from autotp.calibrate import Calibration

SECONDS, QUICK_SECONDS = 60.0, 10.0


def calibrate(
    output: Annotated[Path, typer.Option(metavar="FILE", help="The cluster file to write, e.g. my-cluster.yaml.")],
    seconds: Annotated[float | None, typer.Option(metavar="S", help=f"Time to spend (default {SECONDS:g}).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Spend {QUICK_SECONDS:g} seconds, on fewer sizes.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="cuda|cpu", help="What to measure (default cuda if there is a GPU).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Measure this machine and write a cluster file for --cluster; under torchrun, also the collectives between ranks."""
    if quick and seconds is not None:
        raise AutotpError("--quick and --seconds both say how long to measure: give one of them")
    budget = QUICK_SECONDS if quick else SECONDS if seconds is None else seconds
    if not (math.isfinite(budget) and budget > 0):
        raise AutotpError(f"--seconds is {budget:g}, but must be greater than 0")
    if device not in (None, "cpu", "cuda"):
        raise AutotpError(f"--device is {device!r}, but must be cuda or cpu")
    if output.suffix.lower() not in (".yaml", ".yml"):
        raise AutotpError(f"cannot write {output}: a cluster file ends in .yaml; give another --output")
    first, alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        with _stoppable(), nullcontext() if alone else _ranks(device):
            from autotp.cli_common import progress
            from autotp.runtime.agreement import together

            together(lambda: _check_output(output, force) if first else None)
            with progress() if first else _silent() as step:
                step("loading PyTorch")
                from autotp.calibrate import calibrate as run

                found = run(output, seconds=budget, device=device, say=step)
    except KeyboardInterrupt:
        if first:
            print(f"autotp: interrupted: {output} was not written", file=sys.stderr)
        raise typer.Exit(130) from None
    except AutotpError:
        if first:
            raise
        raise typer.Exit(2) from None  # rank 0 has the same sentence
    except RuntimeError as error:  # torch.distributed reports a rank that has gone as one
        if alone:
            raise
        if first:
            raise AutotpError(f"a rank has failed or gone, {output} was not written: {str(error)[:120]}") from error
        raise typer.Exit(2) from None
    if first:
        typer.echo(calibration_text(found, output))
        for warning in found.warnings:
            print(f"autotp: warning: {warning}", file=sys.stderr)


def _check_output(output: Path, force: bool) -> None:
    from autotp.cli_common import check_writable

    check_writable(output)
    if output.exists() and not force:
        raise AutotpError(f"{output} exists: give --force to replace it, or another --output")


@contextmanager
def _silent() -> Iterator[Any]:
    yield lambda words: None


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, which schedulers and torchrun send, ends the measurement as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ranks(device: str | None) -> Iterator[None]:
    """The process group of the ranks that torchrun started."""
    import torch
    import torch.distributed as dist

    on_cuda = device == "cuda" or (device is None and torch.cuda.is_available())
    if on_cuda and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda and torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: a rank that has gone would be waited for


# ---- the table ------------------------------------------------------------------------------------------------------


def calibration_text(found: Calibration, output: Path) -> str:
    """What was measured, beside the shipped profile of the same device, if there is one."""
    from rich import box
    from rich.table import Table

    from autotp.cli_common import screen
    from autotp.report import to_text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("what")
    table.add_column("measured", justify="right")
    if found.shipped:
        table.add_column(found.shipped.name, justify="right")
    table.add_column("fit: median, p90", justify="right")
    fits = {fit.what: f"{fit.median:.0%}, {fit.p90:.0%}" for fit in found.fits}
    for what, measured, shipped, fitted in _rows(found):
        table.add_row(what, measured, *([shipped] if found.shipped else []), fits.get(fitted, ""))
    width, color = screen()
    table.title, table.title_style, table.title_justify = found.device.label, "bold", "left"
    return f"{to_text(table, width, color)}\nwritten to {output}; plan with --cluster {output}"


def _rows(found: Calibration) -> Iterator[tuple[str, str, str, str]]:
    """(what, measured, in the shipped profile, whose fit stands beside it)."""
    from autotp.price.communication import Group, collective_seconds

    ours, theirs = found.device.accelerator, found.shipped and found.shipped.accelerator
    for key, rate in ours.peak_flops.items():
        shipped = theirs.peak_flops.get(key) if theirs else None
        fitted = "matrix products" if key == found.device.dtype else ""
        yield f"peak {key}", _flops(rate), _flops(shipped * theirs.gemm.max_efficiency) if theirs and shipped else "–", fitted
    best = theirs and theirs.bandwidth * theirs.bandwidth_efficiency
    yield "memory bandwidth", f"{ours.bandwidth / 1e9:.4g} GB/s", f"{best / 1e9:.4g} GB/s" if best else "–", "copies"
    yield "shortest kernel", f"{1e6 * ours.launch_seconds:.3g} µs", f"{1e6 * theirs.launch_seconds:.3g} µs" if theirs else "–", ""
    if found.device.launch.host_seconds != found.device.launch.seconds:
        host = f"{1e6 * theirs.host_launch_seconds:.3g} µs" if theirs else "–"
        yield "host time of a launch", f"{1e6 * found.device.launch.host_seconds:.3g} µs", host, ""
    reached = theirs and theirs.attention_efficiency
    yield "attention, share of peak", f"{ours.attention_efficiency:.0%}", f"{reached:.0%}" if reached else "–", "attention"
    yield "memory", f"{ours.memory_bytes / 1e9:.4g} GB", f"{theirs.memory_bytes / 1e9:.4g} GB" if theirs else "–", ""
    for sweep in found.collectives.sweeps if found.collectives else ():
        group = Group(sweep.ranks, sweep.stride)
        size, timing = sweep.points[-1]
        try:
            shipped = collective_seconds(found.shipped, sweep.kind, size, group) if found.shipped else None
        except AutotpError:  # the shipped cluster is smaller
            shipped = None
        name = f"{sweep.kind.replace('_', '-')}, {sweep.ranks} ranks" + (f", {sweep.stride} apart" if sweep.stride > 1 else "")
        yield (
            f"{name}, {_bytes(size)}",
            f"{1e3 * timing.seconds:.4g} ms",
            f"{1e3 * shipped:.4g} ms" if shipped else "–",
            sweep.kind.replace("_", "-"),
        )
    for link in found.cluster.links if found.collectives else ():
        usable = link.bandwidth * link.efficiency / 1e9
        yield f"{link.tier}: launch, step, bandwidth", f"{1e6 * link.launch:.3g} µs, {1e6 * link.latency:.3g} µs, {usable:.3g} GB/s", "", ""


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.4g} GFLOP/s"


def _bytes(size: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.3g} {unit}"
    return f"{size} B"

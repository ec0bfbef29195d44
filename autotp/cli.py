"""The command line: `autotp plan`, `recommend`, `scale`, `verify`, `calibrate` and `clusters`.

The result goes to stdout and nothing else does; progress and errors go to stderr. Options are checked before PyTorch is
imported, which takes seconds. Exit codes: 0 done, 1 a check failed (or a bug in autotp), 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotp.cli_calibrate import calibrate
from autotp.cli_common import FORMATS, SUFFIXES, calm_collector, check_writable, guest, parse_pins, parse_size, progress, screen, unit_of
from autotp.cli_recommend import recommend
from autotp.cli_scale import scale
from autotp.errors import AutotpError
from autotp.price.cluster import DEFAULT_CLUSTER

if TYPE_CHECKING:
    from autotp.plans import Plan
    from autotp.price.cluster import Cluster
    from autotp.verify import VerifyReport

DEFAULT_MESH = "8"
MODEL = "hf:ID, a Hugging Face config.json or its directory, file.py:callable, or package.module:callable."

app = typer.Typer(
    name="autotp",
    help="Plan how to run an ordinary PyTorch model on many devices, and check that it still computes the same.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `arguments` are those of the process by default."""
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's errors: unknown options, missing arguments
        if isinstance(error, AutotpError) or usage:
            sentence, code = str(usage() if usage else error), 2
        else:
            if os.environ.get("AUTOTP_DEBUG") == "1":
                raise
            words = " ".join(str(error).split())
            sentence, code = (
                (
                    f"this is a bug in autotp: {type(error).__name__}{f' ({words[:200]})' if words else ''}; please report it with "
                    "your command and what it prints when run again with AUTOTP_DEBUG=1"
                ),
                1,
            )
        print(f"autotp: error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Plan how to run an ordinary PyTorch model on many devices, and check that it still computes the same."""
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            number = installed("autotp")
        except PackageNotFoundError:
            number = "(not installed)"
        typer.echo(f"autotp {number}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    cluster: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Cluster to price for (default dgx-h100).")
    ] = None,
    mesh: Annotated[str | None, typer.Option(metavar="MESH", help="Devices: 8, 2x4 or dp=2,tp=4 (default 8).")] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="In place of a mesh: the fastest mesh of N devices; dp splits the batch.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences per step (default 1; with --gpus one per device).")] = None,
    local_batch: Annotated[
        str | None,
        typer.Option(metavar="AXIS,…", help="Mesh axes over which each rank has its own rows of inputs and outputs (default none)."),
    ] = None,
    seq: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens per sequence (default the model's maximum, at most 4096).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="bf16, fp16, fp32 or fp64 (default the model's).")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="train|inference", help="With backward and update, or forward alone (default train)."),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(metavar="prefill|decode", help="A step of generation with a key/value cache: the prompt, or one token."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of each sequence that the key/value cache holds (default as --seq).")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Peak memory allowed per device, e.g. 80GB (default none; with --gpus 95 % of the device's)."),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=WORD", help="Fix a choice, e.g. '*.q_proj=column'; may be repeated."),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help="adamw, adamw-master (float32 copies), adafactor, momentum or sgd.")
    ] = "adamw",
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Let compute hide gathers of weights and reductions of gradients (default none are).")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Price operators as torch.compile fuses them (default eager).")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(metavar="|".join(FORMATS), help="What to write (default as FILE's suffix says, else table)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write to this file instead of to the screen.")
    ] = None,
) -> None:
    """Decide how to split MODEL over a mesh of devices, and say what that costs. Needs no GPU and no weights."""
    from autotp.loading import check_options, check_phase, config_path, dtype_name, is_callable_spec
    from autotp.price.cluster import load_cluster

    check_phase(phase, mode=mode, seq=seq, context=context)
    mode = mode or ("train" if phase is None else "inference")
    check_options(batch=batch, seq=seq, mode=mode)
    if dtype is not None:
        dtype_name(dtype)
    if format is None:
        format = "table" if output is None else SUFFIXES.get(output.suffix.lower(), "table")
    if format not in FORMATS:
        raise AutotpError(f"unknown format {format!r}; choose {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    limit = None if memory is None else parse_size(memory)
    pins = parse_pins(pin or [])
    if output is not None:
        check_writable(output)
    if not model.startswith("hf:") and not is_callable_spec(model):
        config_path(model)
    priced = load_cluster(DEFAULT_CLUSTER if cluster is None else cluster)
    if gpus is not None:
        from autotp.mesh_shapes import check_devices
        from autotp.recommendation import USABLE

        if mesh is not None:
            raise AutotpError(f"--mesh {mesh} and --gpus {gpus} are both given: keep one; --gpus searches the mesh")
        check_devices(priced, gpus)
        limit = USABLE * priced.accelerator.memory_bytes if limit is None else limit
    axes = {"tp": 1} if gpus is not None else _axes(DEFAULT_MESH if mesh is None else mesh, priced)
    local_axes = [] if local_batch is None else [name.strip() for name in local_batch.split(",")]
    for name in local_axes:
        if name not in axes or gpus is not None:
            raise AutotpError(f"--local-batch names {name!r}, which is no axis of the mesh: name one of --mesh, such as dp of dp=2,tp=4")
    with progress() as step, calm_collector(), guest(model):
        step("loading PyTorch")
        from autotp.batch_axes import batch_border, batch_size
        from autotp.kpi import rates
        from autotp.mesh_choice import does_not_fit, plan_on
        from autotp.mesh_search import MeshSearch, Traced
        from autotp.models import load_model, takes_batch
        from autotp.planning import Request, make_plan
        from autotp.solve import OutOfMemoryError
        from autotp.trace import trace

        request = Request(axes, mode, limit, pins, optimizer=optimizer, compiled=compiled, overlap=overlap)
        of_each = gpus is not None and batch is None and takes_batch(model)
        batch = gpus if of_each else batch
        step(f"building {model}")
        loaded = load_model(model, batch=batch, seq=context or seq, dtype=dtype, mode=mode, fake=True)
        if phase is not None:
            from autotp.key_value_cache import in_phase

            loaded = in_phase(loaded, "prefill" if phase == "prefill" else "decode", seq=seq)
        step(f"tracing {loaded.name}")
        program = trace(loaded.model, loaded.args, loaded.kwargs, dynamic=False)
        if local_axes:
            inputs, outputs = batch_border(program, local_axes)
            request = replace(request, inputs=inputs, outputs=outputs)
        traced = Traced(program, loaded.batch or batch_size(program), loaded.seq)
        search = MeshSearch(traced, request, priced, loaded.name, by_batch=gpus is not None, progress=step)
        unit = "GiB" if memory is None else unit_of(memory)
        try:
            if gpus is not None:
                found = plan_on(search, gpus, unit)
            else:
                step(f"planning {loaded.name} on {' × '.join(f'{name}={size}' for name, size in axes.items())}")
                found = make_plan(program, request, priced, loaded.name)
        except OutOfMemoryError as error:
            raise error if gpus is not None else does_not_fit(search, axes, error.least, unit) from None
    size = found.batch if loaded.batch is None else loaded.batch
    found = replace(
        found,
        batch=size,
        sequence=loaded.seq,
        kpi={**found.kpi, **rates(size, loaded.seq, found.time.step_s)},
        notes=(*loaded.notes, *found.notes),
    )
    defaults = [f"--cluster {DEFAULT_CLUSTER}"] * (cluster is None)
    defaults += [f"--mesh {DEFAULT_MESH}"] * (mesh is None and gpus is None) + [f"--batch {batch}"] * of_each
    text = plan_text(found, format, defaults, to_screen=output is None)
    if output is None:
        typer.echo(text)
    else:
        from autotp.plans import write_whole

        write_whole(output, text + "\n")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    ranks: Annotated[int | None, typer.Option(metavar="N", help="Ranks to simulate (default 2).")] = None,
    mesh: Annotated[str | None, typer.Option(metavar="MESH", help="Their mesh: 4, 2x2 or dp=2,tp=2.")] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences per step (default 2).")] = None,
    seq: Annotated[int | None, typer.Option(metavar="N", help="Tokens per sequence (default 16).")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random plans and gradients.")] = 0,
    plans: Annotated[int, typer.Option(metavar="K", help="Random legal plans to try.")] = 3,
) -> None:
    """Shrink MODEL, then compare the eager model with its trace, and one device with simulated ranks."""
    from autotp.loading import check_options

    check_options(batch=batch, seq=seq, mode="train")
    if ranks is not None and ranks < 1:
        raise AutotpError(f"--ranks is {ranks}, but must be at least 1")
    if plans < 0:
        raise AutotpError(f"--plans is {plans}, but must be at least 0")
    axes = _axes(mesh if mesh is not None else str(ranks or 2))
    if ranks is not None and prod(axes.values()) != ranks:
        raise AutotpError(
            f"the mesh {mesh} has {prod(axes.values())} places, but --ranks is {ranks}: the two must be equal"
        )
    with progress() as step, guest(model):
        step("loading PyTorch")
        from autotp.verify import verify as run

        step(f"verifying {model}")
        report = run(model, axes=axes, batch=batch, seq=seq, seed=seed, plans=plans)
    typer.echo(verify_text(report))
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def clusters() -> None:
    """List the clusters that --cluster takes."""
    from rich import box
    from rich.table import Table

    from autotp.price.cluster import cluster_names, load_cluster
    from autotp.report import to_text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    for title in ("name", "accelerator", "per node", "links, innermost first", "peak bf16", "memory"):
        table.add_column(title, justify="right" if title in ("per node", "peak bf16", "memory") else "left")
    for name in cluster_names():
        cluster = load_cluster(name)
        peak = cluster.accelerator.peak_flops.get("bf16")
        links = [
            f"{link.tier} {f'{link.ports} × ' if link.ports else ''}{link.bandwidth / 1e9:.4g} GB/s"
            + (f" (up to {link.devices})" if link.devices else "")
            for link in cluster.links
        ]
        table.add_row(
            name + (" (default)" if name == DEFAULT_CLUSTER else ""),
            cluster.accelerator.name,
            str(cluster.devices_per_node),
            ", ".join(links),
            "–" if peak is None else f"{peak / 1e12:.4g} TFLOP/s",
            f"{cluster.accelerator.memory_bytes / 1e9:.4g} GB",
        )
    width, color = screen()
    typer.echo(to_text(table, width, color), color=color)


app.command()(calibrate)
app.command()(recommend)
app.command()(scale)


# ---- options --------------------------------------------------------------------------------------------------------


def _axes(mesh: str, cluster: Cluster | None = None) -> dict[str, int]:
    from autotp.mesh import parse_mesh

    axes = parse_mesh(mesh)
    if cluster is not None and cluster.max_devices is not None and prod(axes.values()) > cluster.max_devices:
        raise AutotpError(
            f"the mesh {mesh} needs {prod(axes.values())} devices, but {cluster.name} has {cluster.max_devices}; "
            "take a smaller mesh or another cluster (`autotp clusters`)"
        )
    return axes


# ---- output ---------------------------------------------------------------------------------------------------------


def plan_text(plan: Plan, format: str, defaults: Sequence[str], to_screen: bool) -> str:
    """A plan in one of the formats, without a newline at its end; `defaults` are the options that were not given."""
    if format == "json":
        import json

        from autotp.report import to_json

        return json.dumps(to_json(plan), indent=2)
    if format == "yaml":
        import yaml

        return str(yaml.safe_dump(plan.to_dict(), sort_keys=False, width=140, allow_unicode=True)).rstrip("\n")
    from autotp.report import render

    width, color = screen() if to_screen else (None, False)
    text = render(plan, width and min(max(width, 100), 140), color)
    return f"{text}\nby default: {' '.join(defaults)}" if defaults else text


def verify_text(report: VerifyReport) -> str:
    """The report as a table, failures in red."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from autotp.report import to_text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    for title in ("check", "worst error", "where", ""):
        table.add_column(title, overflow="fold")
    for check in report.checks:
        passes = report.passes(check)
        verdict = (
            Text("–") if check.error is None else Text("equal", "green") if passes else Text("DIFFERS", "bold red")
        )
        error = "–" if check.error is None else f"{check.error:.1e}"
        table.add_row(check.name, error, check.where, verdict, style="" if passes else "red")
    mesh = " × ".join(f"{name}={size}" for name, size in report.mesh.items())
    sizes = " × ".join(
        f"{name} {size}" for name, size in (("batch", report.batch), ("sequence", report.sequence)) if size is not None
    )
    header = Text.assemble((report.model, "bold"), f" · shrunk to {report.parameters:,} parameters · mesh {mesh}")
    header.append(f" · {sizes}" if sizes else "")
    held = f"float64; tolerance {report.tolerance:.0e}"
    if report.precision != "float64":
        held = f"float64, but the model computes in {report.precision} in places; tolerance {report.tolerance:.0e}"
    verdict = Text("all equal", "bold green") if report.passed else Text("NOT EQUAL", "bold red")
    if report.refused:
        verdict.append(f", but {len(report.refused)} of {len(report.checks)} checks could not be made", "bold yellow")
    last = verdict.append(f" (worst error {report.worst:.1e}; {held})", "default")
    notes = [Text.assemble(("note: ", "yellow"), note) for note in report.notes]
    width, color = screen()
    return to_text(Group(header, table, last, *notes), width, color)



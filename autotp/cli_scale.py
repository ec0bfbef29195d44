"""`autotp scale`: a scaling study on paper. Options are checked before PyTorch is imported."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from autotp.cli_common import calm_collector, check_writable, guest, parse_size, progress, screen, unit_of
from autotp.errors import AutotpError
from autotp.price.cluster import DEFAULT_CLUSTER


def scale(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `autotp plan`.")],
    cluster: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="Cluster to price for (default dgx-h100).")] = None,
    gpus: Annotated[str, typer.Option(metavar="N,N,…", help="Numbers of devices.")] = "8,64,512",
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences per step on any number of devices: strong scaling.")] = None,
    batch_per_gpu: Annotated[
        str | None, typer.Option(metavar="N", help="Sequences per step and device, such as 2 or 1/8: weak scaling (default 1).")
    ] = None,
    seq: Annotated[int | None, typer.Option(metavar="N", help="Tokens per sequence (default the model's maximum, at most 4096).")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="bf16, fp16, fp32 or fp64 (default the model's).")] = None,
    mode: Annotated[str, typer.Option(metavar="train|inference", help="With backward and update, or forward alone.")] = "train",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Peak memory allowed per device (default 95 % of the device's).")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help="adamw, adamw-master (float32 copies), adafactor, momentum or sgd.")
    ] = "adamw",
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Let compute hide gathers of weights and reductions of gradients (default none are).")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Price operators as torch.compile fuses them (default eager).")] = False,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Of the solver, for each mesh.")] = 60.0,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write .png, .svg, .pdf (a plot), .html (plot and table), .json or .yaml.")
    ] = None,
) -> None:
    """Plan MODEL on more and more devices: the fastest mesh, time per step, memory and communication of each. Needs no GPU."""
    from autotp.loading import check_options, config_path, dtype_name, is_callable_spec
    from autotp.mesh_shapes import check_devices
    from autotp.price.cluster import load_cluster
    from autotp.recommendation import USABLE
    from autotp.report_scaling import PLOTS, check_plotting, render, write
    from autotp.scaling import ScalingStudy, batch_at, parse_counts, parse_share, points_of

    check_options(batch=batch, seq=seq, mode=mode)
    if dtype is not None:
        dtype_name(dtype)
    if not time_limit > 0:
        raise AutotpError(f"--time-limit is {time_limit:g}, but must be a positive number of seconds")
    if batch is not None and batch_per_gpu is not None:
        raise AutotpError("--batch (strong scaling) and --batch-per-gpu (weak scaling) are both given: keep one")
    counts = parse_counts(gpus)
    share = None if batch is not None else parse_share(batch_per_gpu or "1")
    priced = load_cluster(DEFAULT_CLUSTER if cluster is None else cluster)
    for count in counts:
        check_devices(priced, count)
        batch_at(count, batch, share)
    if output is not None:
        check_writable(output)
        if output.suffix.lower() in (*PLOTS, ".html"):
            check_plotting()
    if not model.startswith("hf:") and not is_callable_spec(model):
        config_path(model)
    limit = USABLE * priced.accelerator.memory_bytes if memory is None else parse_size(memory)
    with progress() as step, calm_collector(), guest(model):
        step("loading PyTorch")
        from autotp.batch_axes import batch_size
        from autotp.mesh_choice import fastest_mesh
        from autotp.mesh_search import MeshSearch, Traced
        from autotp.models import load_model, takes_batch
        from autotp.planning import Request
        from autotp.trace import trace

        request = Request({"tp": 1}, mode, limit, optimizer=optimizer, compiled=compiled, overlap=overlap)
        if not takes_batch(model):
            raise AutotpError(f"{model} takes no argument `batch`, by which a study scales the work: add it to the callable")

        @cache
        def traced_at(size: int | None) -> tuple[str, Traced]:
            step(f"building and tracing {model} at batch {size}")
            loaded = load_model(model, batch=size, seq=seq, dtype=dtype, mode=mode, fake=True)
            program = trace(loaded.model, loaded.args, loaded.kwargs, dynamic=False)
            return loaded.name, Traced(program, loaded.batch or batch_size(program), loaded.seq, loaded.notes)

        def search_at(count: int) -> MeshSearch:
            name, traced = traced_at(batch_at(count, batch, share))
            return MeshSearch(traced, request, priced, name, time_limit=time_limit, progress=step)

        points = points_of(counts, search_at, fastest_mesh)
        name, traced = traced_at(batch_at(counts[0], batch, share))
    parameters = sum(node.outputs[0].numel for node in traced.program.nodes if node.kind == "parameter")
    device = float(priced.accelerator.memory_bytes)
    unit = "GiB" if memory is None else unit_of(memory)
    notes = (*traced.notes, *traced.program.notes)
    study = ScalingStudy(name, parameters, mode, priced.name, share, traced.sequence, limit, device, points, notes, unit)
    width, color = screen()
    typer.echo(render(study, min(max(width, 100), 140), color), color=color)
    if output is not None:
        write(study, output)

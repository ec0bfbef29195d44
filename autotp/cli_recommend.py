"""`autotp recommend`: which mesh of a cluster to run a model on. Options are checked before PyTorch is imported."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autotp.cli_common import FORMATS, SUFFIXES, calm_collector, check_writable, guest, parse_size, progress, screen, unit_of
from autotp.errors import AutotpError
from autotp.price.cluster import DEFAULT_CLUSTER

if TYPE_CHECKING:
    from autotp.price.cluster import Cluster
    from autotp.recommendation import Recommendation


def recommend(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `autotp plan`.")],
    cluster: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="Cluster to price for (default dgx-h100).")] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="Most devices to use (default one node).")] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences per step over all devices (default the fastest that fits).")
    ] = None,
    seq: Annotated[int | None, typer.Option(metavar="N", help="Tokens per sequence (default the model's maximum, at most 4096).")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="bf16, fp16, fp32 or fp64 (default the model's).")] = None,
    mode: Annotated[str, typer.Option(metavar="train|inference", help="With backward and update, or forward alone.")] = "train",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Peak memory allowed per device (default 95 % of the device's).")
    ] = None,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Of the solver, for each mesh.")] = 60.0,
    format: Annotated[
        str | None, typer.Option(metavar="table|yaml|json", help="What to write (default as FILE's suffix says, else table).")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write to this file instead of to the screen.")] = None,
) -> None:
    """Rank the meshes of a cluster for MODEL: data parallel, tensor parallel, both; and say what to use. Needs no GPU."""
    from autotp.loading import check_options, config_path, dtype_name, is_callable_spec
    from autotp.price.cluster import load_cluster

    check_options(batch=batch, seq=seq, mode=mode)
    if dtype is not None:
        dtype_name(dtype)
    if not time_limit > 0:
        raise AutotpError(f"--time-limit is {time_limit:g}, but must be a positive number of seconds")
    if format is None:
        format = "table" if output is None else SUFFIXES.get(output.suffix.lower(), "table")
    if format not in FORMATS:
        raise AutotpError(f"unknown format {format!r}; choose {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    limit = None if memory is None else parse_size(memory)
    if output is not None:
        check_writable(output)
    if not model.startswith("hf:") and not is_callable_spec(model):
        config_path(model)
    priced = load_cluster(DEFAULT_CLUSTER if cluster is None else cluster)
    count = priced.devices_per_node if gpus is None else gpus
    from autotp.mesh_shapes import check_devices  # beside the options, so that nothing is built for a wrong one

    check_devices(priced, count)
    with progress() as step, calm_collector(), guest(model):
        step("loading PyTorch")
        unit = "GiB" if memory is None else unit_of(memory)
        found = _recommend(model, priced, count, batch, seq, dtype, mode, limit, time_limit, step, unit)
    defaults = [f"--cluster {DEFAULT_CLUSTER}"] * (cluster is None) + [f"--gpus {count}"] * (gpus is None)
    text = recommendation_text(found, format, defaults, to_screen=output is None)
    if output is None:
        typer.echo(text)
    else:
        from autotp.plans import write_whole

        write_whole(output, text + "\n")


def _recommend(
    model: str,
    cluster: Cluster,
    gpus: int,
    batch: int | None,
    seq: int | None,
    dtype: str | None,
    mode: str,
    memory: float | None,
    time_limit: float,
    step: Any,
    unit: str,
) -> Recommendation:
    from autotp.advice import Search
    from autotp.batch_axes import batch_size
    from autotp.mesh_search import Traced
    from autotp.models import load_model, takes_batch
    from autotp.trace import trace

    @cache
    def traced_at(size: int | None) -> tuple[str, Traced]:
        step(f"building and tracing {model}" + (f" at batch {size}" if size else ""))
        loaded = load_model(model, batch=size, seq=seq, dtype=dtype, mode=mode, fake=True)
        program = trace(loaded.model, loaded.args, loaded.kwargs, dynamic=False)
        return loaded.name, Traced(program, loaded.batch or batch_size(program), loaded.seq, loaded.notes)

    varies = takes_batch(model)
    name, traced = traced_at(batch or (gpus if varies else None))
    search = Search(name, gpus, cluster, mode, memory, time_limit, step, unit)
    return search.run(traced, (lambda size: traced_at(size)[1]) if varies else None, choose_batch=batch is None)


def recommendation_text(found: Recommendation, format: str, defaults: list[str], to_screen: bool) -> str:
    """A recommendation in one of the formats, without a newline at its end; `defaults` are the options that were not given."""
    from autotp.report_recommend import render, to_data

    if format == "json":
        import json

        return json.dumps(to_data(found), indent=2)
    if format == "yaml":
        import yaml

        return str(yaml.safe_dump(to_data(found), sort_keys=False, width=140, allow_unicode=True)).rstrip("\n")
    width, color = screen() if to_screen else (None, False)
    text = render(found, width and min(max(width, 100), 140), color)
    return f"{text}\nby default: {' '.join(defaults)}" if defaults else text

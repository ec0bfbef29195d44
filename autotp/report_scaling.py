"""A scaling study as a table, as plain data, as a plot, and as a page with both."""

from __future__ import annotations

from html import escape
from io import StringIO
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from autotp.errors import AutotpError
from autotp.mesh_shapes import mesh_name
from autotp.report import rate, to_text
from autotp.report_recommend import words
from autotp.report_rows import duration, size
from autotp.scaling import ScalingPoint, ScalingStudy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = (".png", ".svg", ".pdf")
"""Suffixes of files that a plot is written to."""


def check_plotting() -> None:
    """Refuse plots where matplotlib is missing, before minutes are spent on what they show.

    Raises:
        AutotpError: it is.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AutotpError(
            "plots need matplotlib, which is not installed: run `pip install 'autotp[plot]'`, or write --output to a .json file"
        ) from None


def to_data(study: ScalingStudy) -> dict[str, Any]:
    """The study as plain data, with keys that stay the same; what a number of devices that is too small has no value for is null."""
    return {
        "model": study.model,
        "parameters": study.parameters,
        "mode": study.mode,
        "cluster": study.cluster,
        "scaling": "strong" if study.per_gpu is None else "weak",
        "batch_per_gpu": None if study.per_gpu is None else float(study.per_gpu),
        "sequence": study.sequence,
        "memory_limit_bytes": study.memory_limit,
        "points": [_point_data(study, point) for point in study.points],
        "notes": list(study.notes),
    }


def _point_data(study: ScalingStudy, point: ScalingPoint) -> dict[str, Any]:
    best = point.best
    plan, kpi = best.plan, best.plan.kpi if best.plan else {}
    return {
        "gpus": point.gpus,
        "batch": point.batch,
        "fits": plan is not None,
        "mesh": dict(best.mesh),
        "step_s": plan.time.step_s if plan else None,
        "samples_per_s": kpi.get("samples_per_s"),
        "tokens_per_s": kpi.get("tokens_per_s"),
        "efficiency": study.efficiency(point),
        "memory_bytes": plan.memory.total if plan else best.least_bytes,
        "exposed_communication_share": _share(point),
        "model_flops_utilisation": kpi.get("model_flops_utilisation"),
        "strategies": words(best) if plan else None,
        "meshes_tried": [dict(candidate.mesh) for candidate in point.candidates],
    }


def _share(point: ScalingPoint) -> float | None:
    """The share of the step in which communication is not hidden behind compute."""
    plan = point.best.plan
    if plan is None or not plan.time.step_s:
        return None
    return plan.kpi.get("exposed_communication_s", plan.time.communication_s) / plan.time.step_s


def _title(study: ScalingStudy) -> str:
    letter, scale = next((pair for pair in (("T", 1e12), ("B", 1e9)) if study.parameters >= 0.99 * pair[1]), ("M", 1e6))
    said = f"{study.model} ({study.parameters / scale:.3g}{letter} parameters) · {study.mode} · {study.cluster}"
    work = "weak" if study.per_gpu is not None else "strong"
    said += f" · {work} scaling" + (f", {study.per_gpu} per GPU" if study.per_gpu is not None else "")
    return said + (f" · sequence {study.sequence}" if study.sequence is not None else "")


def _cells(study: ScalingStudy) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table."""
    unit = "tokens" if study.sequence else "samples"
    titles = ["GPUs", "mesh", "batch", "step", f"{unit}/s", "per GPU", "efficiency", "memory", "of it", "commun.", "MFU", "strategies"]
    rows = []
    for point in study.points:
        best = point.best
        start = [f"{point.gpus:,}", mesh_name(best.mesh), str(point.batch or "–")]
        if best.plan is None:
            need = "no plan found in time" if best.least_bytes is None else f"≥ {size(best.least_bytes, study.unit)}"
            part = "–" if best.least_bytes is None else f"{best.least_bytes / study.device_bytes:.0%}"
            rows.append([*start, *["–"] * 4, need, part, "–", "–", "does not fit"])
            continue
        speed = best.plan.kpi.get(f"{unit}_per_s", 0.0)
        held = best.plan.memory.total
        rows.append(
            [
                *start,
                duration(best.step_s),
                rate(speed),
                rate(speed / point.gpus),
                f"{study.efficiency(point) or 0.0:.0%}",
                size(held, study.unit),
                f"{held / study.device_bytes:.0%}",
                f"{_share(point) or 0.0:.0%}",
                f"{best.plan.kpi['model_flops_utilisation']:.0%}",
                words(best),
            ]
        )
    return titles, rows


def render(study: ScalingStudy, width: int | None = None, color: bool = False) -> str:
    """The table and the notes.

    Args:
        width: columns; by default the terminal's, within 100 to 140.
        color: with ANSI colours.
    """
    width = width or min(max(get_terminal_size((140, 0)).columns, 100), 140)
    titles, rows = _cells(study)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    for title in titles:
        of_words = title in ("mesh", "strategies")
        table.add_column(title, justify="left" if of_words else "right", no_wrap=title != "strategies", overflow="fold")
    for point, row in zip(study.points, rows, strict=True):
        table.add_row(*row, style="" if point.best.plan else "bright_black")
    notes = [Text.assemble(("note: ", "yellow"), note) for note in study.notes]
    return to_text(Group(Text(_title(study), "bold"), table, *notes), width, color)


def figure(study: ScalingStudy) -> Figure:
    """Time per step, memory per device and exposed communication against the number of devices; the axes are logarithmic.

    Raises:
        AutotpError: matplotlib is missing, or nothing fits, so that there is nothing to show.
    """
    check_plotting()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    fitting = [point for point in study.points if point.best.plan]
    if not fitting:
        raise AutotpError(f"{study.model} fits on none of these numbers of GPUs, so there is no plot: take more, or less work per GPU")
    counts = [point.gpus for point in fitting]
    base, name = (2**30, "GiB") if "i" in study.unit else (1e9, "GB")
    page = Figure(figsize=(12, 4.2), layout="constrained")
    page.suptitle(_title(study), fontsize=10)
    step, memory, share = page.subplots(1, 3)
    step.loglog(counts, [point.best.step_s for point in fitting], "o-", label="planned")
    ideal = [_ideal(study, fitting[0], point) for point in fitting]
    step.loglog(counts, ideal, "--", color="gray", label="without any loss")
    step.set_ylabel("time per step, s")
    step.legend(frameon=False)
    memory.semilogx(counts, [point.best.plan.memory.total / base for point in fitting if point.best.plan], "o-")
    memory.axhline(study.device_bytes / base, linestyle="--", color="gray")
    memory.annotate("device", (counts[0], study.device_bytes / base), xytext=(0, 3), textcoords="offset points", color="gray")
    memory.set_ylabel(f"peak memory per device, {name}")
    memory.set_ylim(bottom=0)
    share.semilogx(counts, [100 * (_share(point) or 0.0) for point in fitting], "o-")
    share.set_ylabel("exposed communication, % of the step")
    share.set_ylim(0, 100)
    for axes in (step, memory, share):
        axes.set_xlabel("GPUs")
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(True, alpha=0.3)
    for point in fitting:
        step.annotate(
            mesh_name(point.best.mesh), (point.gpus, point.best.step_s), xytext=(4, 5), textcoords="offset points", fontsize=7
        )
    return page


def _ideal(study: ScalingStudy, first: ScalingPoint, point: ScalingPoint) -> float:
    """Seconds of a step if every device did as much per second as on the smallest number of them."""
    return (point.batch or 1) / (first.samples_per_s * point.gpus / first.gpus)


def write(study: ScalingStudy, path: Path) -> None:
    """Write the study: data to .json, .yaml or .yml, a plot to .png, .svg or .pdf, a page with plot and table to .html, else the table.

    Raises:
        AutotpError: as `figure`, where a plot is asked for.
    """
    from autotp.plans import write_whole

    suffix = path.suffix.lower()
    if suffix in PLOTS:
        figure(study).savefig(path, dpi=150)
    elif suffix == ".html":
        write_whole(path, page_of(study))
    elif suffix == ".json":
        import json

        write_whole(path, json.dumps(to_data(study), indent=2) + "\n")
    elif suffix in (".yaml", ".yml"):
        import yaml

        write_whole(path, yaml.safe_dump(to_data(study), sort_keys=False, width=140, allow_unicode=True))
    else:
        write_whole(path, render(study, 140) + "\n")


def page_of(study: ScalingStudy) -> str:
    """One HTML page with plot and table; it needs no other file."""
    drawn = StringIO()
    figure(study).savefig(drawn, format="svg")
    image = drawn.getvalue()
    titles, rows = _cells(study)
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    notes = "".join(f"<p>note: {escape(note)}</p>" for note in study.notes)
    style = "body{font-family:sans-serif} td,th{padding:.2em .8em;text-align:right} svg{max-width:100%;height:auto}"
    title = escape(_title(study))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>\n'
        f"<body><h1>{title}</h1>\n{image[image.index('<svg') :]}\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n{notes}</body></html>\n"
    )

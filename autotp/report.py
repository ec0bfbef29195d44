"""A plan for people (a table) and for programs (JSON).

The table has one row per distinct module, in the order in which they run; equal layers share a row, as in
`model.layers.0-31.mlp.up_proj`. Both read nothing but the `Plan`, so a loaded plan prints like a new one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autotp.report_rows import Row, duration, operator_name, recomputed_rows, rows, size

if TYPE_CHECKING:  # it brings torch, which a table of clusters does not need
    from autotp.plans import Plan

WIDTHS = (100, 140)
"""Least and greatest width of the table, in columns."""

COLORS = {
    "column": "cyan",
    "row": "magenta",
    "batch": "green",
    "sequence": "yellow",
    "heads": "bright_blue",
    "vocab": "bright_magenta",
    "expert": "bright_green",
    "replicate": "bright_black",
}


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan's results as plain data, with keys that stay the same from version to version.

    Times are in seconds per step, memory in bytes per device; `strategies` maps every module path to its word. What is `recomputed` is part
    of compute and communication; its bytes are those that it would hold otherwise.
    """
    return {
        "model": plan.model,
        "mode": plan.mode,
        "cluster": plan.cluster,
        "mesh": dict(plan.mesh),
        "batch": plan.batch,
        "sequence": plan.sequence,
        "strategies": dict(plan.strategies),
        "collectives": {way: dict(plan.collectives.get(way, {})) for way in ("forward", "backward")},
        "time": {
            "step_s": plan.time.step_s,
            "compute_s": plan.time.compute_s,
            "communication_s": plan.time.communication_s,
            "recomputation_s": sum(entry.seconds for entry in plan.recomputed),
        },
        "memory": _memory(plan),
        "solver": {"status": plan.solver.status, "gap": plan.solver.gap, "seconds": plan.solver.seconds,
                   "unlimited_gap": plan.solver.unlimited_gap},
        "kpi": dict(plan.kpi),
        "recomputed": [
            {"tensor": entry.node, "output": entry.output, "layout": entry.shows, "copies": entry.copies, "seconds": entry.seconds,
             "bytes": entry.bytes}
            for entry in plan.recomputed
        ],
        "notes": [*_without_rule(plan), *plan.notes],
    }


def render(plan: Plan, width: int | None = None, color: bool = False) -> str:
    """The plan as a table.

    Args:
        width: columns; by default the terminal's, within 100 to 140.
        color: with ANSI colours.
    """
    width = width or min(max(get_terminal_size((WIDTHS[1], 0)).columns, WIDTHS[0]), WIDTHS[1])
    parts: list[RenderableType] = [_header(plan), _modules(plan, width), *_summary(plan, width), *_recomputed(plan, width), _solver(plan)]
    parts.extend(_marked("no rule", sentence) for sentence in _without_rule(plan))
    parts.extend(_marked("note", sentence) for sentence in plan.notes)
    return to_text(Group(*parts), width, color)


def to_text(content: RenderableType, width: int, color: bool) -> str:
    """What rich would print, as text without trailing blanks, and without blank lines around it or one after another."""
    console = Console(
        file=StringIO(),
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        emoji=False,
        markup=False,
    )
    with console.capture() as captured:
        console.print(content)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


# ---- parts of the page ----------------------------------------------------------------------------------------------


def _header(plan: Plan) -> Text:
    mesh = " × ".join(f"{name}={count}" for name, count in plan.mesh.items())
    words = Text.assemble((plan.model, "bold"), f" · {plan.mode} · mesh {mesh} · cluster {plan.cluster}")
    if plan.batch is not None:
        words.append(f" · batch {plan.batch}" + (f" × sequence {plan.sequence}" if plan.sequence is not None else ""))
    return words


def _modules(plan: Plan, width: int) -> Table:
    """One line per row and conversion; operators and reasons get a column of their own where there is room."""
    shown = rows(plan)
    roomy, brief = _room(shown, width)
    axes = ", ".join(plan.mesh) if len(plan.mesh) > 1 else ""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold", width=width)
    table.add_column("module", overflow="fold", min_width=22)
    if roomy:
        table.add_column("operator", overflow="fold")
    table.add_column("strategy", overflow="fold")
    table.add_column(f"weight\n{axes}".strip(), overflow="fold")
    table.add_column(f"output\n{axes}".strip(), overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    title = "collectives after it\nforward / backward"
    if roomy or brief:
        longest = max((len(line) for row in shown for line, _ in row.traffic), default=0)
        table.add_column(title, overflow="fold", min_width=min(longest, 27))
    else:
        table.add_column(f"{title}, and why", overflow="fold", ratio=1)
    if roomy:
        table.add_column("why", overflow="fold", min_width=20, ratio=1)
    for row in shown:
        share = row.seconds / plan.time.step_s if plan.time.step_s else 0.0
        cells: list[RenderableType] = [
            row.path or "(model)",
            *([row.operator] if roomy else []),
            colored(row.strategy),
            row.weight or "–",
            row.output or "–",
            f"{share:.1%}" if share >= 0.0005 else "<0.1%",
        ]
        traffic = dict.fromkeys((shown, "") for shown, _ in row.traffic) if brief else row.traffic
        for line, why in traffic:  # a second conversion gets a line of its own
            reason = Text(why, style="" if line and roomy else "bright_black")
            joint = Text(line + ("  " if line and why else "")).append(reason)
            table.add_row(*cells, *([line, reason] if roomy else [joint]))
            cells = [""] * len(cells)
    return table


def _room(shown: Sequence[Row], width: int) -> tuple[bool, bool]:
    """Whether operators and reasons fit in columns of their own, and whether reasons do not fit at all."""

    def longest(*texts: Iterable[str]) -> int:
        return sum(max((len(text) for text in column), default=0) + 2 for column in texts)

    lines = [line for row in shown for line in row.traffic]
    fixed = longest(*([getattr(row, name) for row in shown] for name in ("path", "strategy", "weight", "output"))) + 12
    whys = [why for line, why in lines if line] or ["whole on every rank"]
    separate = longest([row.operator for row in shown], [line for line, _ in lines], whys)
    return fixed + separate <= width, fixed + 47 > width


def colored(strategy: str) -> Text:
    """The strategy's words, each in its colour."""
    return Text("+").join(Text(word, style=COLORS.get(word, "")) for word in strategy.split("+"))


def _summary(plan: Plan, width: int) -> list[RenderableType]:
    """Collectives, time and memory, side by side where there is room."""
    kinds = sorted({*plan.collectives.get("forward", {}), *plan.collectives.get("backward", {})})
    counted = _grid("collectives", "forward", "backward")
    for kind in kinds:
        numbers = (plan.collectives.get(way, {}).get(kind, 0) for way in ("forward", "backward"))
        counted.add_row(kind.replace("_", "-"), *map(str, numbers))
    if not kinds:
        counted.add_row("none", "", "")
    step = plan.time.step_s or 1.0
    timed = _grid("time per step", "", "")
    timed.add_row("step", duration(plan.time.step_s), "")
    timed.add_row("compute", duration(plan.time.compute_s), f"{plan.time.compute_s / step:.0%}")
    timed.add_row("communication", duration(plan.time.communication_s), f"{plan.time.communication_s / step:.0%}")
    if plan.recomputed:
        spent = sum(entry.seconds for entry in plan.recomputed)
        timed.add_row("of these, recomputed", duration(spent), f"{spent / step:.0%}")
    for name, shown in key_figures(plan):
        timed.add_row(name, shown, "")
    held = _grid("peak memory per device", "", "")
    memory = _memory(plan)
    for part, count in memory.items():
        if part == "cache" and not count:
            continue
        style = "bold" if part == "total" else ""
        held.add_row(part, size(count), f"{count / memory['total']:.0%}" if memory["total"] else "", style=style)
    if plan.recomputed:
        held.add_row("not kept, recomputed", size(sum(entry.bytes for entry in plan.recomputed)), "", style="bright_black")
    page = Table.grid(padding=(0, 4))
    page.add_row(*([counted, timed, held] if width >= 118 else [counted, timed]))
    return [page] if width >= 118 else [page, held]


def _recomputed(plan: Plan, width: int) -> list[RenderableType]:
    """What backward makes again, if anything."""
    if not plan.recomputed:
        return []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold", width=width)
    table.add_column("recomputed in backward", overflow="fold")
    table.add_column("tensors", overflow="fold", ratio=1)
    for title in ("copies", "not kept", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for module, tensors, copies, count, seconds in recomputed_rows(plan):
        table.add_row(module, tensors, copies, size(count), duration(seconds))
    return [table]


def key_figures(plan: Plan) -> list[tuple[str, str]]:
    """Names and values of the plan's key figures as people read them; those that an older plan lacks are left out."""
    forms: dict[str, tuple[str, Callable[[float], str]]] = {
        "exposed_communication_s": ("exposed communication", duration),
        "communication_to_computation": ("communication : compute", lambda value: f"{value:.2f}"),
        "shard_efficiency": ("shard efficiency", lambda value: f"{value:.0%}"),
        "model_flops_utilisation": ("model FLOPs utilisation", lambda value: f"{value:.0%}"),
        "memory_fraction": ("memory of the device", lambda value: f"{value:.0%}"),
        "tokens_per_s": ("tokens per second", rate),
        "samples_per_s": ("samples per second", rate),
    }
    shown = {name for name in forms if name in plan.kpi} - ({"samples_per_s"} if "tokens_per_s" in plan.kpi else set())
    return [(title, form(plan.kpi[name])) for name, (title, form) in forms.items() if name in shown]


def rate(value: float) -> str:
    """A number per second with three digits, e.g. `0.42`, `83.1`, `12,300`."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def _grid(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left", no_wrap=True)
    return table


def _solver(plan: Plan) -> Text:
    solver = plan.solver
    gap = "" if solver.gap == 0 else f", at most {_percent(solver.gap)} % above the optimum"
    if solver.unlimited_gap is not None:
        gap += f" within the estimate of memory, and {_percent(solver.unlimited_gap)} % above the fastest plan without a limit"
    return Text.assemble(
        "solver: ",
        (solver.status, "green" if solver.status == "optimal" else "bold red"),
        f"{gap} ({solver.name}, {solver.seconds:.2f} s)",
    )


def _percent(share: float) -> str:
    """One digit of small shares, whole percents of large ones."""
    return f"{100 * share:.0f}" if share >= 0.01 else f"{100 * share:.1g}"


def _without_rule(plan: Plan) -> list[str]:
    return [
        f"{operator_name(name)} is replicated on every rank, which costs {duration(seconds)} per step; autotp.rule gives it one"
        for name, seconds in plan.replicated.items()
    ]


def _marked(mark: str, sentence: str) -> Text:
    return Text.assemble((f"{mark}: ", "yellow"), sentence)


def _memory(plan: Plan) -> Mapping[str, float]:
    memory = plan.memory
    names = ("parameters", "cache", "gradients", "optimizer", "activations", "transient", "total")
    return {name: float(getattr(memory, name)) for name in names}

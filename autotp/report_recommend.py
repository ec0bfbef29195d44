"""A recommendation for people (a ranked table and one sentence) and for programs (plain data)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from shutil import get_terminal_size
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from autotp.plans import Plan
from autotp.recommendation import Candidate, Recommendation, mesh_name
from autotp.report import rate, to_text
from autotp.report_rows import duration, size

WORDS = 4
"""Strategies that a row names, the most frequent first."""


def to_data(found: Recommendation) -> dict[str, Any]:
    """The recommendation as plain data, with keys that stay the same; what a mesh that does not fit has no value for is null."""
    return {
        "model": found.model,
        "mode": found.mode,
        "cluster": found.cluster,
        "gpus": found.gpus,
        "batch": found.batch,
        "sequence": found.sequence,
        "memory_limit_bytes": found.memory_limit,
        "verdict": found.verdict,
        "remedies": list(found.remedies),
        "candidates": [_candidate_data(candidate) for candidate in found.candidates],
        "notes": list(found.notes),
    }


def _candidate_data(candidate: Candidate) -> dict[str, Any]:
    plan = candidate.plan
    kpi = plan.kpi if plan else {}
    return {
        "mesh": dict(candidate.mesh),
        "gpus": candidate.gpus,
        "fits": plan is not None,
        "step_s": plan.time.step_s if plan else None,
        "samples_per_s": kpi.get("samples_per_s"),
        "tokens_per_s": kpi.get("tokens_per_s"),
        "memory_bytes": plan.memory.total if plan else candidate.least_bytes,
        "communication_share": _share(plan) if plan else None,
        "model_flops_utilisation": kpi.get("model_flops_utilisation"),
        "solver_status": plan.solver.status if plan else None,
        "strategies": words(candidate) if plan else None,
    }


def render(found: Recommendation, width: int | None = None, color: bool = False) -> str:
    """The ranked table, then the verdict and the notes.

    Args:
        width: columns; by default the terminal's, within 100 to 140.
        color: with ANSI colours.
    """
    width = width or min(max(get_terminal_size((140, 0)).columns, 100), 140)
    header = Text.assemble((found.model, "bold"), f" · {found.mode} · up to {found.gpus} GPUs of {found.cluster}")
    if found.batch is not None:
        header.append(f" · batch {found.batch}" + (f" × sequence {found.sequence}" if found.sequence is not None else ""))
    header.append(f" · at most {size(found.memory_limit)} of each device's {size(found.device_bytes)}")
    notes = [Text.assemble(("note: ", "yellow"), note) for note in (*found.notes, *_unproven(found))]
    return to_text(Group(header, _table(found), Text(found.verdict, "bold"), *notes), width, color)


def _table(found: Recommendation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    unit = "tokens" if found.sequence else "samples"
    for place, title in enumerate(
        ["", "mesh", "GPUs", "batch", "step", f"{unit}/s", "per GPU", "memory", "of it", "commun.", "MFU", "strategies"]
    ):
        table.add_column(title, justify="left" if place in (1, 11) else "right", no_wrap=place != 11, overflow="fold")
    for number, candidate in enumerate(found.candidates, start=1):
        plan = candidate.plan
        start = [str(number) if plan else "–", mesh_name(candidate.mesh), str(candidate.gpus), str(found.batch or "–")]
        if plan is None:
            table.add_row(*start, *["–"] * 3, *_missing(candidate, found), style="bright_black")
            continue
        speed = plan.kpi.get(f"{unit}_per_s", 0.0)
        table.add_row(
            *start,
            duration(plan.time.step_s),
            rate(speed),
            rate(speed / candidate.gpus),
            size(plan.memory.total),
            f"{plan.memory.total / found.device_bytes:.0%}",
            f"{_share(plan):.0%}",
            f"{plan.kpi['model_flops_utilisation']:.0%}",
            words(candidate),
        )
    return table


def _missing(candidate: Candidate, found: Recommendation) -> list[str]:
    """Memory, its share, and why there is no plan."""
    least = candidate.least_bytes
    if least is None:
        return ["–", "–", "–", "–", "no plan found in time"]
    over = f"does not fit: at least {size(least - found.memory_limit)} too much"
    return [f"≥ {size(least)}", f"{least / found.device_bytes:.0%}", "–", "–", over]


def _share(plan: Plan) -> float:
    return plan.time.communication_s / plan.time.step_s if plan.time.step_s else 0.0


def words(candidate: Candidate) -> str:
    """What a candidate's plan does, in a few words: `batch, state sharded; column, row, heads`."""
    plan = candidate.plan
    if plan is None or candidate.gpus == 1:
        return "one device" if plan else ""
    parts = []
    if "dp" in candidate.mesh:
        axis = list(candidate.mesh).index("dp")
        resting = Counter[bool]()
        for node in plan.nodes:
            if node.op == "parameter" and plan.mode == "train":
                resting[node.outputs[0].split("|")[axis].startswith("S")] += node.copies
        parts.append("batch, state sharded" if resting[True] > resting[False] else "batch")
    counted = Counter(word for joined in plan.strategies.values() for word in joined.split("+") if word not in ("batch", "replicate"))
    if candidate.tensor_parallel > 1:
        parts.append(", ".join(word for word, _ in counted.most_common(WORDS)) or "replicated")
    return "; ".join(parts)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def verdict(found: Recommendation) -> str:
    """One sentence: what to use and how the other kinds of mesh compare, or that nothing fits and what would."""
    best = found.best
    if best is None:
        return _nothing_fits(found)
    if found.gpus == 1:
        return "One GPU: the model fits."
    spare = found.gpus - best.gpus
    idle = f"; the other {'GPU' if spare == 1 else f'{spare} GPUs'} would not help" if spare and best.gpus > 1 else ""
    return f"{_advice(found, best)}: {', '.join(_comparisons(found, best))}{idle}."


def _advice(found: Recommendation, best: Candidate) -> str:
    if best.gpus == 1:
        return "One GPU is best"
    if best.tensor_parallel == 1:
        return f"No tensor parallelism is best, but data parallelism over {best.gpus} GPUs"
    where = "inside a node" if best.tensor_parallel <= found.node else "across nodes"
    copies = f" and data parallelism over {best.mesh['dp']} such groups are" if "dp" in best.mesh else " is"
    return f"Tensor parallelism over {best.tensor_parallel} GPUs {where}{copies} best"


def _comparisons(found: Recommendation, best: Candidate) -> list[str]:
    """How much longer a step takes on the fastest mesh of each other kind, or that it does not fit there."""
    kinds = {
        "data parallelism alone": [c for c in found.candidates if c.tensor_parallel == 1 and c.gpus > 1],
        "tensor parallelism inside a node": [c for c in found.candidates if 1 < c.tensor_parallel <= found.node],
        "tensor parallelism across nodes": [c for c in found.candidates if c.tensor_parallel > found.node],
        "one GPU": [c for c in found.candidates if c.gpus == 1],
    }
    said = []
    for kind, members in kinds.items():
        if not members or best in members:
            continue
        nearest = _fastest(members)
        name = f" ({mesh_name(nearest.mesh)})" if nearest and nearest.gpus > 1 else ""
        if nearest is None:
            need = [member.least_bytes for member in members if member.least_bytes is not None]
            said.append(f"{kind} {'does not fit' if need else 'was not planned in time'}")
        else:
            said.append(f"{kind}{name} takes {nearest.step_s / best.step_s:.2f}× the time per step")
    return said


def _fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    return min((candidate for candidate in candidates if candidate.plan), key=lambda candidate: candidate.step_s, default=None)


def _nothing_fits(found: Recommendation) -> str:
    at = f" at batch {found.batch}" if found.batch is not None else ""
    nearest = next((candidate for candidate in found.candidates if candidate.least_bytes is not None), None)
    if nearest is None or nearest.least_bytes is None:
        return f"No plan was found in time on up to {found.gpus} GPUs{at}: raise the time limit."
    need = f"it needs at least {size(nearest.least_bytes)} per device on {nearest.gpus} GPUs"
    over = f"{size(nearest.least_bytes - found.memory_limit)} too much"
    would = f"what would fit: {', or '.join(found.remedies)}" if found.remedies else "nor on anything else that was tried"
    return f"It does not fit on up to {found.gpus} GPUs of {found.cluster}{at}: {need}, {over}; {would}."


def _unproven(found: Recommendation) -> list[str]:
    """Which plans the solver did not prove to be best."""
    open_ends = [mesh_name(c.mesh) for c in found.candidates if c.plan and c.plan.solver.status != "optimal"]
    return [f"The time limit came before the proof that these plans are the fastest: {', '.join(open_ends)}."] if open_ends else []

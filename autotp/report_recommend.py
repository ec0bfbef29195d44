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

from autotp.mesh_shapes import DATA, mesh_name
from autotp.plans import Plan
from autotp.recommendation import MODEL_ERROR, Candidate, Recommendation
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
        "tried_in_vain": list(found.tried),
        "left_out": found.left_out,
        "candidates": [_candidate_data(candidate) for candidate in found.candidates],
        "notes": [*found.notes, *_left_out(found), *_unproven(found)],
    }


def _candidate_data(candidate: Candidate) -> dict[str, Any]:
    plan = candidate.plan
    kpi = plan.kpi if plan else {}
    return {
        "mesh": dict(candidate.mesh),
        "gpus": candidate.gpus,
        "fits": plan is not None,
        "step_s": plan.time.step_s if plan else None,
        "step_at_least_s": None if plan else candidate.bound_s,
        "samples_per_s": kpi.get("samples_per_s"),
        "tokens_per_s": kpi.get("tokens_per_s"),
        "memory_bytes": plan.memory.total if plan else candidate.least_bytes,
        "communication_share": _share(plan) if plan else None,
        "model_flops_utilisation": kpi.get("model_flops_utilisation"),
        "solver_status": plan.solver.status if plan else None,
        "strategies": words(candidate) if plan else None,
        "notes": list(plan.notes) if plan else [],
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
    header.append(f" · at most {size(found.memory_limit, found.unit)} of each device's {size(found.device_bytes, found.unit)}")
    notes = [Text.assemble(("note: ", "yellow"), note) for note in (*found.notes, *_left_out(found), *_unproven(found))]
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
            table.add_row(*start, *_missing(candidate, found), style="bright_black")
            continue
        speed = plan.kpi.get(f"{unit}_per_s", 0.0)
        table.add_row(
            *start,
            duration(plan.time.step_s),
            rate(speed),
            rate(speed / candidate.gpus),
            size(plan.memory.total, found.unit),
            f"{plan.memory.total / found.device_bytes:.0%}",
            f"{_share(plan):.0%}",
            f"{plan.kpi['model_flops_utilisation']:.0%}",
            words(candidate),
        )
    return table


def _missing(candidate: Candidate, found: Recommendation) -> list[str]:
    """The cells of a mesh without a plan, from its step time on: what is known, and why there is none."""
    least = candidate.least_bytes
    if candidate.bound_s is not None:
        return [f"≥ {duration(candidate.bound_s)}", *["–"] * 6, _slower(candidate, found)]
    if least is None:
        return [*["–"] * 7, "no plan found in time"]
    over = f"does not fit: at least {size(least - found.memory_limit, found.unit)} too much"
    return [*["–"] * 3, f"≥ {size(least, found.unit)}", f"{least / found.device_bytes:.0%}", "–", "–", over]


def _slower(candidate: Candidate, found: Recommendation) -> str:
    """Why a mesh was not solved within the memory limit."""
    best = found.best.step_s if found.best else 0.0
    return "slower even without a memory limit" if (candidate.bound_s or 0.0) > best else "another shape of it is faster without a limit"


def _share(plan: Plan) -> float:
    return plan.time.communication_s / plan.time.step_s if plan.time.step_s else 0.0


def words(candidate: Candidate) -> str:
    """What a candidate's plan does, in a few words: `batch, state sharded; column, row, heads`."""
    plan = candidate.plan
    if plan is None or candidate.gpus == 1:
        return "one device" if plan else ""
    parts = []
    axes = [place for place, name in enumerate(candidate.mesh) if name in DATA]
    if axes:
        resting = Counter[str]()
        for node in plan.nodes:
            if node.op == "parameter" and plan.mode == "train":
                kinds = node.outputs[0].split("|")
                resting[", ".join(list(plan.mesh)[axis] for axis in axes if kinds[axis].startswith("S"))] += node.copies
        split = Counter({where: count for where, count in resting.items() if where})
        some = "" if split.total() > resting[""] else "some "
        over = f" over {split.most_common(1)[0][0]}" if split and len(axes) > 1 else ""
        parts.append(f"batch, {some}state sharded{over}" if split else "batch")
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


KINDS = {"tensor parallelism": {"column", "row", "heads", "vocab"}, "expert parallelism": {"expert"}, "sequence parallelism": {"sequence"}}
"""What a plan does beside splitting the batch, by the words of its strategies; the first that applies."""


def kind_of(candidate: Candidate) -> str:
    """`tensor parallelism`, or what the plan does in its place; `splitting` if that has no name, or nothing is known."""
    said = {word for joined in (candidate.plan.strategies.values() if candidate.plan else ()) for word in joined.split("+")}
    return next((kind for kind, words in KINDS.items() if said & words), "tensor parallelism" if not said else "splitting")


def _advice(found: Recommendation, best: Candidate) -> str:
    if best.gpus == 1:
        return "One GPU is best"
    if best.tensor_parallel == 1:
        return f"No tensor parallelism is best, but data parallelism over {best.gpus} GPUs"
    where = "inside a node" if best.tensor_span <= found.node else "across nodes"
    groups = best.gpus // best.tensor_parallel
    copies = f" and data parallelism over {groups} such groups are" if groups > 1 else " is"
    return f"{kind_of(best).capitalize()} over {best.tensor_parallel} GPUs {where}{copies} best"


def _comparisons(found: Recommendation, best: Candidate) -> list[str]:
    """How much longer a step takes on the fastest mesh of each other kind, or that it does not fit there."""
    kinds = {
        "data parallelism alone": [c for c in found.candidates if c.tensor_parallel == 1 and c.gpus > 1],
        "inside a node": [c for c in found.candidates if c.tensor_parallel > 1 and c.tensor_span <= found.node],
        "across nodes": [c for c in found.candidates if c.tensor_parallel > 1 and c.tensor_span > found.node],
        "one GPU": [c for c in found.candidates if c.gpus == 1],
    }
    said = []
    for name, members in kinds.items():
        if not members or best in members:
            continue
        nearest = _fastest(members)
        kind = f"{kind_of(nearest or members[0])} {name}" if name.endswith(("node", "nodes")) else name
        if nearest is not None:
            mesh = f" ({mesh_name(nearest.mesh)})" if nearest.gpus > 1 else ""
            ratio = nearest.step_s / best.step_s
            unsure = " (within the model's error)" if abs(ratio - 1) < MODEL_ERROR else ""
            said.append(f"{kind}{mesh} takes {ratio:.2f}× the time per step{unsure}")
            continue
        bound = min((member.bound_s for member in members if member.bound_s is not None), default=None)
        if bound is not None:
            said.append(f"{kind} takes at least {bound / best.step_s:.2f}× the time per step")
        elif any(member.least_bytes is not None for member in members):
            said.append(f"{kind} does not fit" + (f" at batch {found.batch}" if found.batch is not None else ""))
        else:
            said.append(f"{kind} was not planned in time")
    return said


def _fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    return min((candidate for candidate in candidates if candidate.plan), key=lambda candidate: candidate.step_s, default=None)


def _nothing_fits(found: Recommendation) -> str:
    at = f" at batch {found.batch}" if found.batch is not None else ""
    nearest = next((candidate for candidate in found.candidates if candidate.least_bytes is not None), None)
    if nearest is None or nearest.least_bytes is None:
        return f"No plan was found in time on up to {found.gpus} GPUs{at}: raise the time limit."
    tried = f"of {len(found.candidates)} meshes {mesh_name(nearest.mesh)} needs least," if len(found.candidates) > 1 else "it needs"
    need = f"{tried} at least {size(nearest.least_bytes, found.unit)} per device on {nearest.gpus} GPUs"
    over = f"{size(nearest.least_bytes - found.memory_limit, found.unit)} too much"
    vain = f"tried in vain: {', '.join(found.tried)}" if found.tried else ""
    would = f"what would fit: {', or '.join(found.remedies)}" if found.remedies else "no remedy was found"
    rest = "; ".join(part for part in (would, vain) if part)
    return f"It does not fit on up to {found.gpus} GPUs of {found.cluster}{at}: {need}, {over}; {rest}."


def _left_out(found: Recommendation) -> list[str]:
    """That meshes are missing, and why."""
    if not found.left_out:
        return []
    return [f"{found.left_out} meshes are left out: they have too few devices to win, or like ones need several times the memory."]


def _unproven(found: Recommendation) -> list[str]:
    """Which plans the solver did not prove to be best."""
    open_ends = [mesh_name(c.mesh) for c in found.candidates if c.plan and c.plan.solver.status != "optimal"]
    return [f"The time limit came before the proof that these plans are the fastest: {', '.join(open_ends)}."] if open_ends else []

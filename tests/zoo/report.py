"""What a run of the zoo found: a table for the terminal, and `docs/zoo.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tests.zoo.catalogue import GROUPED, Case
from tests.zoo.trial import Result

CHECKOUT = Path(__file__).resolve().parents[2]
TARGET = 0.95
TARGET_BYTES = 0.9

Found = Sequence[tuple[Case, Result]]


def ran(found: Found) -> list[tuple[Case, Result]]:
    """The models that run eagerly: the denominator of every share."""
    return [(case, result) for case, result in found if result.ran]


def families(found: Found) -> dict[str, list[tuple[Case, Result]]]:
    """Head → its results, the largest family first."""
    grouped: dict[str, list[tuple[Case, Result]]] = {}
    for case, result in found:
        grouped.setdefault(case.head.replace("_", " "), []).append((case, result))
    return dict(sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0])))


def counts(found: Found) -> tuple[int, int, int, int]:
    """Of some cases: all, those that run eagerly, those equal at every number of ranks, those of them with the bytes split."""
    running = [result for _, result in ran(found)]
    equal = [result for result in running if result.ok]
    return len(found), len(running), len(equal), sum(result.bytes >= TARGET_BYTES for result in equal)


def summary_table(found: Found, ranks: Sequence[int]) -> Table:
    """One row per family."""
    words = " and ".join(map(str, ranks))
    table = Table(title=f"The zoo at {words} ranks")
    for name in ("family", "models", "run eagerly", "equal", f"≥ {TARGET_BYTES:.0%} of weights split"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for family, members in families(found).items():
        table.add_row(family, *map(str, counts(members)))
    table.add_section()
    table.add_row("all", *map(str, counts(found)))
    return table


def markdown(found: Found, ranks: Sequence[int], missing: int = 0) -> str:
    """The whole page; `missing` cases of the catalogue have not been run yet."""
    every, running, equal, split = counts(found)
    words = " and at ".join(map(str, ranks))
    share = equal / running if running else 0.0
    lines = [
        "# The zoo",
        "",
        "Written by `python -m tests.zoo --out docs/zoo.md`; do not edit.",
        "",
        "Every model is a tiny random copy of its architecture, in train mode without dropout, made from the library's default",
        "configuration. It is run, traced, planned with splitting forced (no weight may be gathered, and a weight that is read whole",
        f"costs more than any collective), checked, and simulated at {words} ranks. Outputs, buffer updates and the gradient of every",
        "parameter are compared: the trace with the eager model, and the ranks with one device. Errors are absolute differences,",
        "divided by the largest reference value of the tensor where that exceeds 1; 1e-9 passes where all is computed in float64,",
        "1e-5 where the model computes anything in float32.",
        "",
        f"- {every} models; {running} of them run eagerly as built here, and count below.",
        *([f"- {missing} more models of the catalogue have not been run."] if missing else []),
        f"- **{equal} of {running} ({share:.1%})** are equal at {words} ranks. The target is {TARGET:.0%}.",
        f"- {split} of these {equal} consume at least {TARGET_BYTES:.0%} of their weight bytes split.",
        "",
        "| family | models | run eagerly | equal | weights split |",
        "|---|--:|--:|--:|--:|",
        *(f"| {family} | {' | '.join(map(str, counts(members)))} |" for family, members in families(found).items()),
        "",
        *_failures(found),
        *_ruleless(found),
        *_models(found),
    ]
    return "\n".join(lines) + "\n"


def _failures(found: Found) -> list[str]:
    wrong = [(case, result) for case, result in ran(found) if not result.ok]
    if not wrong:
        return []
    rows = [f"| {case.name} | {result.stage} | {_cell(result.reason)} |" for case, result in sorted(wrong, key=lambda f: f[1].stage)]
    return ["## What fails", "", "| model | stage | reason |", "|---|---|---|", *rows, ""]


def _ruleless(found: Found) -> list[str]:
    seen = Counter(op for _, result in ran(found) for op in result.ruleless)
    if not seen:
        return []
    rows = [f"| `{op}` | {number} |" for op, number in seen.most_common()]
    head = ["## Operators without a rule", "", "They are run whole on every rank.", "", "| operator | models |", "|---|--:|"]
    return [*head, *rows, ""]


def _models(found: Found) -> list[str]:
    lines = [
        "## Every model",
        "",
        "Split operators: of those that depend on a parameter. Split weights: share of parameter bytes that every consumer reads",
        "split. Both are the least of all numbers of ranks. A name that ends in `" + GROUPED + "` is a mixture of experts in float32",
        "with the library's default implementation.",
        "",
    ]
    for family, members in families(found).items():
        lines += [f"### {family}", "", "| model | result | operators | split | weights split | precision | worst error |"]
        lines.append("|---|---|--:|--:|--:|---|--:|")
        lines += [_row(case, result) for case, result in sorted(members, key=lambda item: item[0].name.lower())]
        lines.append("")
    return lines


def _row(case: Case, result: Result) -> str:
    if not result.ran:
        return f"| {case.name} | not run: {_cell(result.reason)} | | | | | |"
    word = "ok" if result.ok else f"fails: {result.stage}"
    if not result.ok and not result.bytes:
        return f"| {case.name} | {word} | {result.nodes or ''} | | | {result.precision} | |"
    worst = max((result.errors or {}).values(), default=0.0)
    return (
        f"| {case.name} | {word} | {result.nodes} | {result.operators:.0%} | {result.bytes:.1%} | {result.precision} | {worst:.0e} |"
    )


def _cell(reason: str) -> str:
    """One line without the path of an installation or of this checkout, at most 200 characters, safe inside a table."""
    words = [word.rpartition("site-packages/")[2] if "site-packages/" in word else word for word in reason.split()]
    words = [word.replace(f"{CHECKOUT}/", "") for word in words]
    text = " ".join(words).replace("|", "\\|")
    return text if len(text) <= 200 else text[:199] + "…"

"""`python -m tests.zoo`: run the zoo, print a table, write docs/zoo.md."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.zoo.catalogue import cases
from tests.zoo.report import markdown, summary_table
from tests.zoo.sweep import read_cache, sweep

CACHE = Path(".zoo.jsonl")


def main(
    patterns: Annotated[list[str] | None, typer.Argument(help="Names or patterns of cases, e.g. 'Llama*'; all by default.")] = None,
    ranks: Annotated[list[int], typer.Option(help="Mesh sizes to simulate; repeat the option.")] = [2, 3],  # noqa: B006
    processes: Annotated[int, typer.Option(help="Cases at a time.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds per case.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Write the report to this file, e.g. docs/zoo.md.")] = None,
    cache: Annotated[Path, typer.Option(help="Results so far, one line of JSON each; what is in it is not run again.")] = CACHE,
    again: Annotated[str, typer.Option(help="Run again what failed in a stage that matches, e.g. 'build' or '*'.")] = "",
    report: Annotated[bool, typer.Option("--report", help="Run nothing: report what the cache holds.")] = False,
    every_head: Annotated[bool, typer.Option(help="Also heads that are one linear layer on a body that another head covers.")] = False,
) -> None:
    """Prove that models of many architectures can be split: each against one device, at every number of ranks."""
    console = Console()
    wanted = [
        case for case in cases(every_head) if not patterns or any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
    ]
    done = read_cache(cache)
    todo = [] if report else [
        case for case in wanted
        if case.name not in done or (again and not done[case.name].ok and fnmatch.fnmatch(done[case.name].stage, again))
    ]  # fmt: skip
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with bar, cache.open("a") as file:
        task = bar.add_task("zoo", total=len(todo))
        for result in sweep(
            todo, processes=processes, ranks=ranks, timeout=timeout, started=lambda name: bar.update(task, description=name)
        ):
            done[result.name] = result
            file.write(result.line + "\n")
            file.flush()
            bar.advance(task)
            if not result.ok:
                bar.console.print(f"{result.name}: {result.stage}: {result.reason}", highlight=False, soft_wrap=True, markup=False)
    found = [(case, done[case.name]) for case in wanted if case.name in done]
    console.print(summary_table(found, ranks))
    if out is not None:
        out.write_text(markdown(found, ranks, len(wanted) - len(found)))


if __name__ == "__main__":
    typer.run(main)

"""Plans within a memory limit: what the integer program estimates, corrected by what a walk through the plan's own graph finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autotp.decisions import Decisions
from autotp.describe import chosen_of, conversions
from autotp.formulate import Border, Formulation
from autotp.liveness import peak_memory
from autotp.plans import MemoryUse
from autotp.price.conversion import ConversionPrices
from autotp.problem import Problem
from autotp.program import Ref
from autotp.rewrite import rewrite
from autotp.solve import OutOfMemoryError, OutOfTimeError, Solution, least_plan, out_of_memory, solve
from autotp.strategies import Space

ATTEMPTS = 4
"""How often the estimate is corrected before plans with small estimates are taken."""
SHARES = (0.0, 0.1, 0.4)
"""Where the estimates of these lie between the least and that of the fastest plan."""


def memory_of(space: Space, prices: ConversionPrices, border: Border, formulation: Formulation, solution: Solution) -> MemoryUse:
    """Peak bytes per device of a solution: its graph for the first rank, which never has less than another, walked through a step."""
    chosen = chosen_of(space, formulation, solution)
    paths = {
        (Ref(space.folding.representative[found.ref.node], found.ref.output), found.target): found.path
        for found in conversions(space, chosen, border, prices)
    }
    decisions = Decisions(chosen, paths, dict(border.inputs), dict(border.outputs))
    first = (0,) * len(space.mesh)
    sharded = rewrite(space, decisions, first, gradient=prices.train, device="meta")
    on_cpu = prices.cluster.accelerator.name.startswith("cpu")
    return peak_memory(sharded, prices.symbols, prices.optimizer if prices.train else None, on_cpu)


def solve_within(problem: Problem, walk: Callable[[Solution], MemoryUse], *, time_limit: float, gap: float) -> tuple[Solution, MemoryUse]:
    """The best plan whose peak keeps the problem's limit, and that peak.

    The problem's bytes are a linear estimate of the peak. Solved without a limit first, it is then solved under limits that are lowered
    (or raised) by what the estimate of the last plan missed.

    Raises:
        OutOfMemoryError: no plan was found that keeps the limit; it names a peak that one does reach.
    """
    limit = problem.limit
    best = solve(replace(problem, limit=None), time_limit=time_limit, gap=gap)
    memory = walk(best)
    tried = [(best, memory)]
    if limit is None or memory.total <= limit:
        return best, memory
    missed = memory.total - best.bytes
    for _ in range(ATTEMPTS):
        if limit <= missed:
            break
        try:
            found = solve(replace(problem, limit=limit - missed), time_limit=time_limit / ATTEMPTS, gap=gap)
        except (OutOfMemoryError, OutOfTimeError):
            break
        memory = walk(found)
        if memory.total <= limit:
            return _judged(found, best), memory
        tried.append((found, memory))
        missed = memory.total - found.bytes
    smallest = _smallest(problem, best, walk, time_limit=time_limit, gap=gap)
    fitting = [(found, memory) for found, memory in smallest if memory.total <= limit]
    if not fitting:
        raise out_of_memory(limit, min(memory.total for _, memory in [*smallest, *tried]))
    found, memory = min(fitting, key=lambda pair: pair[0].seconds)
    return _judged(found, best), memory


def _judged(found: Solution, free: Solution) -> Solution:
    """A plan within the limit, with what is really proved of it: how far it is from the bound of plans without a limit.

    That it is the best within an estimated limit proves nothing about the limit itself.
    """
    gap = max(0.0, 1 - free.seconds * (1 - free.gap) / found.seconds)
    return found if gap <= found.gap else replace(found, status="feasible", gap=gap)


def _smallest(
    problem: Problem, best: Solution, walk: Callable[[Solution], MemoryUse], *, time_limit: float, gap: float
) -> list[tuple[Solution, MemoryUse]]:
    """Plans with small peaks: the one with the least estimate, and the fastest ones with estimates somewhat above that.

    The least estimate need not be the least peak.
    """
    found = [least_plan(problem, time_limit=time_limit)]
    least = found[0].bytes
    for share in SHARES:
        allowed = replace(problem, limit=least + share * max(best.bytes - least, 0.0))
        try:
            found.append(solve(allowed, time_limit=time_limit / ATTEMPTS, gap=max(gap, 1e-2)))
        except (OutOfMemoryError, OutOfTimeError):
            continue
    return [(one, walk(one)) for one in found]

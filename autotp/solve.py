"""Solve a planning problem: `presolve` bounds, plans and reduces it; what is then open is an integer linear program (`integer`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pulp

from autotp.errors import AutotpError
from autotp.integer import MICROSECONDS, bound_of, chosen_of, engine_of, integer_program
from autotp.presolve import Presolved, most, presolve, smallest
from autotp.problem import Problem, bytes_of, seconds_of

LARGE, ENOUGH = 30_000, 1e-3
"""Above so many conversions a solver takes minutes to say what `presolve` says in seconds: this gap is then enough."""
BRANCHES = 10, 1000
"""How many branches `presolve` may try of problems below that, and above."""


class OutOfMemoryError(AutotpError):
    """No plan keeps the memory limit; `least` is the smallest peak, in bytes per device, that any plan reaches."""

    def __init__(self, sentence: str, least: float) -> None:
        super().__init__(sentence)
        self.least = least


class OutOfTimeError(AutotpError):
    """The solver found no plan within its time limit, though there may be one."""


@dataclass(frozen=True)
class Solution:
    """The chosen strategy of every choice, and how the solver ended.

    Attributes:
        chosen: strategy number per choice.
        seconds: recomputed from the choices, never read from the solver.
        bytes: peak bytes per device, recomputed likewise.
        status: "optimal", or "feasible" if the time limit came first.
        gap: proven distance from the optimum, relative.
        solver: its name; elapsed: seconds of building and solving.
    """

    chosen: tuple[int, ...]
    seconds: float
    bytes: float
    status: str
    gap: float
    solver: str
    elapsed: float


def solve(problem: Problem, *, solver: str | None = None, time_limit: float = 300.0, gap: float = 1e-4) -> Solution:
    """The choice with the least time within the memory limit.

    Args:
        solver: "HiGHS" or "CBC"; by default HiGHS where it is installed.
        time_limit: seconds for the solver.
        gap: relative distance from the optimum at which it may stop.

    Raises:
        OutOfMemoryError: the memory limit cannot be kept; the message says the least that would do.
        OutOfTimeError: no plan was found in time.
    """
    start = time.perf_counter()
    if _large(problem):
        gap = max(gap, ENOUGH)
    found = presolve(problem, gap, time_limit / 2, BRANCHES[_large(problem)])
    proven = _gap(problem, found.chosen, found.bound)
    if solver is None and found.chosen is not None and proven <= gap:
        return _solution(problem, found.chosen, "optimal", proven, "dual ascent", start)
    return _integer(problem, found, solver, time_limit - (time.perf_counter() - start), gap, start)


def _integer(problem: Problem, known: Presolved, solver: str | None, seconds: float, gap: float, start: float) -> Solution:
    """The integer program of what is left; its plan, or the one already known if that is better."""
    engine, name = engine_of(solver, max(seconds, 1.0), gap)
    program = pulp.LpProblem()
    solved = False
    if known.bound <= most(problem):
        program, strategies = integer_program(known.problem, minimise_memory=False)
        program.solve(engine)
        solved = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    plans = [chosen_of(problem, strategies)] if solved else []
    plans += [known.chosen] if known.chosen is not None else []
    if not plans:
        if problem.limit is not None:
            least = least_memory(problem, time_limit=max(seconds, 1.0))
            if least > problem.limit:
                raise out_of_memory(problem.limit, least)
        raise OutOfTimeError(f"the solver {name} found no plan within {seconds:.0f} s: raise the time limit")
    chosen = min(plans, key=lambda plan: seconds_of(problem, plan))
    optimal = solved and program.sol_status == pulp.LpSolutionOptimal
    bound = bound_of(program) if solved else None
    proven = _gap(problem, chosen, max(known.bound, (bound or 0.0) / MICROSECONDS))
    return _solution(problem, chosen, "optimal" if optimal else "feasible", min(proven, gap) if optimal else proven, name, start)


def _large(problem: Problem) -> bool:
    """Whether a solver would take minutes."""
    return sum(len(set(link.made)) * len({one for _, wanted in link.consumers for one in wanted}) for link in problem.links) > LARGE


def _solution(problem: Problem, chosen: tuple[int, ...], status: str, gap: float, name: str, start: float) -> Solution:
    return Solution(chosen, seconds_of(problem, chosen), bytes_of(problem, chosen), status, gap, name, time.perf_counter() - start)


def _gap(problem: Problem, chosen: tuple[int, ...] | None, bound: float) -> float:
    """The relative distance of a plan from a bound of all plans."""
    seconds = seconds_of(problem, chosen) if chosen is not None else 0.0
    return max(0.0, 1 - bound / seconds) if seconds else 0.0


def _size(size: float) -> str:
    """Bytes with four digits, e.g. `1.234 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} bytes"


def out_of_memory(limit: float, least: float) -> OutOfMemoryError:
    """That `limit` bytes cannot be kept, and `least` is the smallest peak."""
    return OutOfMemoryError(
        f"the memory limit of {_size(limit)} per device cannot be kept: the least that would do on this mesh "
        f"is {_size(least * 1.0005)}; raise the limit, use more devices, or a smaller batch",
        least,
    )


def least_memory(problem: Problem, *, time_limit: float = 300.0) -> float:
    """The smallest peak bytes per device that any choice reaches."""
    return least_plan(problem, time_limit=time_limit).bytes


def least_plan(problem: Problem, *, time_limit: float = 300.0) -> Solution:
    """The choice with the smallest peak, however long it takes; its gap is that of its time, which nothing bounds here."""
    start = time.perf_counter()
    if _large(problem):
        return _solution(replace(problem, limit=0.0), smallest(problem), "feasible", 1.0, "dual ascent", start)
    engine, name = engine_of(None, time_limit, 1e-4)
    program, strategies = integer_program(problem, minimise_memory=True)
    program.solve(engine)
    return _solution(replace(problem, limit=0.0), chosen_of(problem, strategies), "feasible", 1.0, name, start)

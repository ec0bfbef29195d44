"""Solve a planning problem: `presolve` bounds, plans and reduces it; what is then open is an integer linear program.

PuLP writes the program, HiGHS solves it when it is installed, else the bundled CBC.
One binary variable per strategy; one flow per (tensor, consumer, layout made, layout wanted); one variable per shared
conversion. All but the strategies may be continuous: once those are fixed, the rest follows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pulp

from autotp.errors import AutotpError
from autotp.presolve import Presolved, presolve
from autotp.problem import Link, Problem, bytes_of, seconds_of

MICROSECONDS = 1e6
"""The objective is scaled so that solver tolerances are far below any price."""

TIE = 1e-7
"""Microseconds added per strategy number, so that equal optima are always resolved in favour of the first listed."""


LARGE, ENOUGH = 30_000, 1e-3
"""Above so many conversions a solver takes minutes to say what `presolve` says in seconds: this gap is then enough."""


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
    if sum(len(link.seconds) for link in problem.links) > LARGE:
        gap = max(gap, ENOUGH)
    found = presolve(problem, gap, time_limit / 2)
    proven = _gap(problem, found.chosen, found.bound)
    if solver is None and found.chosen is not None and proven <= gap:
        return _solution(problem, found.chosen, "optimal", proven, "dual ascent", start)
    return _integer(problem, found, solver, time_limit - (time.perf_counter() - start), gap, start)


def _integer(problem: Problem, known: Presolved, solver: str | None, seconds: float, gap: float, start: float) -> Solution:
    """The integer program of what is left; its plan, or the one already known if that is better."""
    engine, name = _engine(solver, max(seconds, 1.0), gap)
    program = pulp.LpProblem()
    solved = False
    if known.bound <= _most(problem):
        program, strategies = _formulate(known.problem, minimise_memory=False)
        program.solve(engine)
        solved = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    plans = [_chosen(problem, strategies)] if solved else []
    plans += [known.chosen] if known.chosen is not None else []
    if not plans:
        if problem.limit is not None:
            least = least_memory(problem, time_limit=max(seconds, 1.0))
            if least > problem.limit:
                raise out_of_memory(problem.limit, least)
        raise OutOfTimeError(f"the solver {name} found no plan within {seconds:.0f} s: raise the time limit")
    chosen = min(plans, key=lambda plan: seconds_of(problem, plan))
    optimal = solved and program.sol_status == pulp.LpSolutionOptimal
    bound = _bound(program) if solved else None
    proven = _gap(problem, chosen, max(known.bound, (bound or 0.0) / MICROSECONDS))
    return _solution(problem, chosen, "optimal" if optimal else "feasible", min(proven, gap) if optimal else proven, name, start)


def _solution(problem: Problem, chosen: tuple[int, ...], status: str, gap: float, name: str, start: float) -> Solution:
    return Solution(chosen, seconds_of(problem, chosen), bytes_of(problem, chosen), status, gap, name, time.perf_counter() - start)


def _gap(problem: Problem, chosen: tuple[int, ...] | None, bound: float) -> float:
    """The relative distance of a plan from a bound of all plans."""
    seconds = seconds_of(problem, chosen) if chosen is not None else 0.0
    return max(0.0, 1 - bound / seconds) if seconds else 0.0


def _most(problem: Problem) -> float:
    """Seconds that no plan exceeds: a higher bound means that there is none."""
    conversions = sum(max(link.seconds.values(), default=0.0) * len(link.consumers) for link in problem.links)
    return sum(max(choice.seconds) for choice in problem.choices) + conversions + sum(bucket.seconds for bucket in problem.buckets)


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
    engine, name = _engine(None, time_limit, 1e-4)
    program, strategies = _formulate(problem, minimise_memory=True)
    program.solve(engine)
    return _solution(problem, _chosen(problem, strategies), "feasible", 1.0, name, start)


def _engine(solver: str | None, time_limit: float, gap: float) -> tuple[pulp.LpSolver, str]:
    if solver == "HiGHS" or (solver is None and pulp.HiGHS().available()):
        return pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=gap, threads=1), "HiGHS"
    return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=gap, threads=1), "CBC"


def _bound(program: pulp.LpProblem) -> float | None:
    """The solver's lower bound of the objective, where it tells one (HiGHS does)."""
    model = getattr(program, "solverModel", None)
    if model is None or not hasattr(model, "getInfo"):
        return None
    return float(model.getInfo().mip_dual_bound)


def _chosen(problem: Problem, strategies: Sequence[dict[int, pulp.LpVariable | int]]) -> tuple[int, ...]:
    chosen = []
    for variables in strategies:
        values = {number: v if isinstance(v, int) else v.varValue or 0.0 for number, v in variables.items()}
        chosen.append(max(values, key=lambda number: (values[number], -number)))
    return tuple(chosen)


def _formulate(
    problem: Problem, minimise_memory: bool
) -> tuple[pulp.LpProblem, list[dict[int, pulp.LpVariable | int]]]:
    program = pulp.LpProblem("plan", pulp.LpMinimize)
    strategies: list[dict[int, pulp.LpVariable | int]] = []
    costs: list[tuple[pulp.LpVariable, float]] = []
    for number, choice in enumerate(problem.choices):
        if len(choice.allowed) == 1:
            strategies.append({choice.allowed[0]: 1})
            continue
        variables: dict[int, pulp.LpVariable | int] = {}
        for strategy in choice.allowed:
            variable = pulp.LpVariable(f"x{number}_{strategy}", cat=pulp.LpBinary)
            variables[strategy] = variable
            costs.append((variable, choice.seconds[strategy] * MICROSECONDS + TIE * strategy))
        strategies.append(variables)
        program.addConstraint(_sum(list(variables.values())) == 1)
    used: dict[tuple[int, int, int], pulp.LpVariable] = {}
    for number, link in enumerate(problem.links):
        _add_link(program, number, link, strategies, used, costs)
    for number, bucket in enumerate(problem.buckets):
        members = [used[member] for member in bucket.members if member in used]
        if members:
            paid = pulp.LpVariable(f"b{number}", 0, 1)
            costs.append((paid, bucket.seconds * MICROSECONDS))
            for member in members:
                program.addConstraint(paid >= member)
    if problem.limit is not None or minimise_memory:
        held = _memory(program, problem, strategies, used)
        if minimise_memory:
            program.setObjective(held / 1e6)
            return program, strategies
        assert problem.limit is not None
        program.addConstraint(held / 1e6 <= problem.limit / 1e6)
    program.setObjective(pulp.LpAffineExpression(costs))
    return program, strategies


def _sum(terms: list[pulp.LpVariable | int]) -> pulp.LpAffineExpression:
    constant = sum(term for term in terms if isinstance(term, int))
    return pulp.LpAffineExpression([(term, 1) for term in terms if not isinstance(term, int)], constant)


def _add_link(
    program: pulp.LpProblem,
    number: int,
    link: Link,
    strategies: list[dict[int, pulp.LpVariable | int]],
    used: dict[tuple[int, int, int], pulp.LpVariable],
    costs: list[tuple[pulp.LpVariable, float]],
) -> None:
    """Flows from the layout that is made to the layouts that are wanted, and what their conversions cost."""

    def by_layout(choice: int, layouts: tuple[int, ...]) -> dict[int, list[pulp.LpVariable | int]]:
        found: dict[int, list[pulp.LpVariable | int]] = {}
        for strategy, variable in strategies[choice].items():
            found.setdefault(layouts[strategy], []).append(variable)
        return found

    made = by_layout(link.producer, link.made)
    wanted = [by_layout(choice, layouts) for choice, layouts in link.consumers]
    flows: dict[tuple[int, int], list[pulp.LpVariable]] = {}
    for place, targets in enumerate(wanted):
        if len(made) == 1 and len(targets) == 1 and made.keys() == targets.keys():
            continue
        from_source: dict[int, list[pulp.LpVariable]] = {source: [] for source in made}
        to_target: dict[int, list[pulp.LpVariable]] = {target: [] for target in targets}
        for source in made:
            for target in targets:
                if source != target and (source, target) not in link.seconds:
                    continue
                flow = pulp.LpVariable(f"f{number}_{place}_{source}_{target}", 0, 1)
                from_source[source].append(flow)
                to_target[target].append(flow)
                if source != target:
                    flows.setdefault((source, target), []).append(flow)
        for source, variables in made.items():
            program.addConstraint(pulp.lpSum(from_source[source]) == _sum(variables))
        for target, variables in targets.items():
            program.addConstraint(pulp.lpSum(to_target[target]) == _sum(variables))
    for (source, target), alike in flows.items():
        seconds = link.seconds[source, target] * MICROSECONDS
        conversion = alike[0]
        if len(alike) > 1:
            conversion = pulp.LpVariable(f"c{number}_{source}_{target}", 0, 1)
            for flow in alike:
                program.addConstraint(conversion >= flow)
        used[number, source, target] = conversion
        costs.append((conversion, seconds))


def _memory(
    program: pulp.LpProblem,
    problem: Problem,
    strategies: list[dict[int, pulp.LpVariable | int]],
    used: dict[tuple[int, int, int], pulp.LpVariable],
) -> pulp.LpAffineExpression:
    """Peak bytes per device."""
    total = [(used[key], size) for key, size in problem.memory.converted.items() if key in used]
    constant = 0.0
    peak = pulp.LpVariable("working", 0)
    total.append((peak, 1e6))
    for variables, held, working in zip(strategies, problem.memory.held, problem.memory.working, strict=True):
        needs: list[tuple[pulp.LpVariable, float]] = []
        fixed = 0.0
        for strategy, variable in variables.items():
            if isinstance(variable, int):
                constant += held[strategy]
                fixed += working[strategy]
            else:
                total.append((variable, held[strategy]))
                needs.append((variable, working[strategy] / 1e6))
        if fixed or any(need for _, need in needs):
            program.addConstraint(peak >= pulp.LpAffineExpression(needs, fixed / 1e6))
    for number, keep in enumerate(problem.memory.keeps):
        kept = pulp.LpVariable(f"k{number}", 0, 1)
        total.append((kept, keep.bytes))
        for choice, wanted in keep.wanted:
            terms = [strategies[choice][strategy] for strategy in wanted if strategy in strategies[choice]]
            if terms:
                program.addConstraint(kept >= _sum(terms))
    return pulp.LpAffineExpression(total, constant)

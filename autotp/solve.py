"""Solve a planning problem exactly, as an integer linear program (PuLP; HiGHS when it is installed, else the bundled CBC).

One binary variable per strategy; one flow per (tensor, consumer, layout made, layout wanted); one variable per shared
conversion. All but the strategies may be continuous: once those are fixed, the rest follows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pulp

from autotp.errors import AutotpError
from autotp.problem import Link, Problem, bytes_of, seconds_of

MICROSECONDS = 1e6
"""The objective is scaled so that solver tolerances are far below any price."""

TIE = 1e-7
"""Microseconds added per strategy number, so that equal optima are always resolved in favour of the first listed."""


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
        AutotpError: the memory limit cannot be kept (the message says the least that would do), or no solution was found.
    """
    start = time.perf_counter()
    program, strategies = _formulate(problem, minimise_memory=False)
    engine, name = _engine(solver, time_limit, gap)
    program.solve(engine)
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        if problem.limit is not None:
            least = least_memory(problem, time_limit=time_limit)
            raise AutotpError(
                f"the memory limit of {_size(problem.limit)} per device cannot be kept: the least that would do on this mesh "
                f"is {_size(least * 1.0005)}; raise the limit, use more devices, or a smaller batch"
            )
        raise AutotpError(f"the solver {name} found no plan within {time_limit:.0f} s: raise the time limit")
    chosen = _chosen(problem, strategies)
    found = seconds_of(problem, chosen)
    optimal = program.sol_status == pulp.LpSolutionOptimal
    bound = _bound(program)
    proven = max(0.0, 1 - bound / (found * MICROSECONDS)) if bound is not None and found else (0.0 if optimal else 1.0)
    return Solution(
        chosen,
        found,
        bytes_of(problem, chosen),
        "optimal" if optimal else "feasible",
        min(proven, gap) if optimal else proven,
        name,
        time.perf_counter() - start,
    )


def _size(size: float) -> str:
    """Bytes with four digits, e.g. `1.234 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} bytes"


def least_memory(problem: Problem, *, time_limit: float = 300.0) -> float:
    """The smallest peak bytes per device that any choice reaches."""
    program, strategies = _formulate(problem, minimise_memory=True)
    program.solve(_engine(None, time_limit, 1e-4)[0])
    return bytes_of(problem, _chosen(problem, strategies))


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

"""A planning problem as an integer linear program. PuLP writes it; HiGHS solves it when it is installed, else the bundled CBC.

One binary variable per strategy; one flow per (tensor, consumer, layout made, layout wanted); one variable per shared
conversion, and of what is saved the shares that are kept and made again. All but the strategies may be continuous: once those are
fixed, the rest follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TypeAlias

import numpy
import pulp

from autotp.problem import Overlap, Problem, Saved


def _forget_tracebacks(solver: type[pulp.LpSolver]) -> None:
    """PuLP keeps why a solver is not installed: with the traceback, the frames of whoever imported it first, and a model in them."""
    for kind in solver.__subclasses__():
        error = vars(kind).get("err")
        if isinstance(error, BaseException):
            error.__traceback__ = None
        _forget_tracebacks(kind)


_forget_tracebacks(pulp.LpSolver)

MICROSECONDS = 1e6
"""The objective is scaled so that solver tolerances are far below any price."""

TIE = 1e-7
"""Microseconds added per strategy number, so that equal optima are always resolved in favour of the first listed."""

Term: TypeAlias = "pulp.LpVariable | int"
"""A variable, or 1 where there is no choice."""


def engine_of(solver: str | None, time_limit: float, gap: float) -> tuple[pulp.LpSolver, str]:
    if solver == "HiGHS" or (solver is None and pulp.HiGHS().available()):
        return pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=gap, threads=1), "HiGHS"
    return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=gap, threads=1), "CBC"


def bound_of(program: pulp.LpProblem) -> float | None:
    """The solver's lower bound of the objective, where it tells one (HiGHS does)."""
    model = getattr(program, "solverModel", None)
    if model is None or not hasattr(model, "getInfo"):
        return None
    return float(model.getInfo().mip_dual_bound)


def chosen_of(problem: Problem, strategies: Sequence[Mapping[int, Term]]) -> tuple[int, ...]:
    chosen = []
    for variables in strategies:
        values = {number: v if isinstance(v, int) else v.varValue or 0.0 for number, v in variables.items()}
        chosen.append(max(values, key=lambda number: (values[number], -number)))
    return tuple(chosen)


def integer_program(problem: Problem, minimise_memory: bool) -> tuple[pulp.LpProblem, list[dict[int, Term]]]:
    program = pulp.LpProblem("plan", pulp.LpMinimize)
    strategies: list[dict[int, Term]] = []
    costs: list[tuple[pulp.LpVariable, float]] = []
    for number, choice in enumerate(problem.choices):
        if len(choice.allowed) == 1:
            strategies.append({choice.allowed[0]: 1})
            continue
        variables: dict[int, Term] = {}
        for strategy in choice.allowed:
            variable = pulp.LpVariable(f"x{number}_{strategy}", cat=pulp.LpBinary)
            variables[strategy] = variable
            costs.append((variable, choice.seconds[strategy] * MICROSECONDS + TIE * strategy))
        strategies.append(variables)
        program.addConstraint(_sum(list(variables.values())) == 1)
    flows = [_flows(program, problem, number, strategies) for number in range(len(problem.links))]
    used: dict[tuple[int, int, int], Term] = {}
    for number, link in enumerate(problem.links):
        for (source, target), by_consumer in flows[number].items():
            if source != target:
                conversion = used[number, source, target] = _any(program, f"c{number}_{source}_{target}", list(by_consumer.values()))
                if not isinstance(conversion, int):
                    costs.append((conversion, float(link.seconds[source, target]) * MICROSECONDS))
    for number, bucket in enumerate(problem.buckets):
        paid = _any(program, f"b{number}", [used[member] for member in bucket.members if member in used])
        if not isinstance(paid, int):
            costs.append((paid, bucket.seconds * MICROSECONDS))
    for number, overlap in enumerate(problem.overlaps):
        hidden = pulp.LpVariable(f"h{number}", 0)
        costs.append((hidden, -1.0))
        for side in _sides(overlap, strategies, used):
            program.addConstraint(hidden <= side)
    if problem.limit is not None or minimise_memory:
        total = _memory(program, problem, strategies)
        for saved in problem.memory.saved:
            total += _kept(program, problem, saved, strategies, flows[saved.link], costs)
        if minimise_memory:
            program.setObjective(total / 1e6)
            return program, strategies
        assert problem.limit is not None
        program.addConstraint(total / 1e6 <= problem.limit / 1e6)
    program.setObjective(_total(costs))
    return program, strategies


def _total(costs: Sequence[tuple[pulp.LpVariable, float]]) -> pulp.LpAffineExpression:
    """What all cost; a variable may have several prices, as a conversion that is alone in its bucket has."""
    total: dict[pulp.LpVariable, float] = {}
    for variable, price in costs:
        total[variable] = total.get(variable, 0.0) + price
    return pulp.LpAffineExpression(total)


def _sum(terms: Sequence[Term]) -> pulp.LpAffineExpression:
    constant = sum(term for term in terms if isinstance(term, int))
    return pulp.LpAffineExpression([(term, 1) for term in terms if not isinstance(term, int)], constant)


def _sides(
    overlap: Overlap, strategies: Sequence[Mapping[int, Term]], used: Mapping[tuple[int, int, int], Term]
) -> tuple[pulp.LpAffineExpression, pulp.LpAffineExpression]:
    """Microseconds of compute, and of conversions, that may run at the same time."""
    compute = [(variable, seconds[s]) for choice, seconds in overlap.compute.items() for s, variable in strategies[choice].items()]
    moved = [
        (term, float(overlap.conversions[link][source, target]))
        for (link, source, target), term in used.items()
        if link in overlap.conversions
    ]
    return _weighted(compute), _weighted(moved)


def _weighted(terms: Sequence[tuple[Term, float]]) -> pulp.LpAffineExpression:
    constant = sum(term * seconds for term, seconds in terms if isinstance(term, int)) * MICROSECONDS
    return _total([(term, seconds * MICROSECONDS) for term, seconds in terms if not isinstance(term, int)]) + constant


def _any(program: pulp.LpProblem, name: str, terms: Sequence[Term]) -> Term:
    """A variable that is 1 if any of some terms is."""
    if not terms or any(isinstance(term, int) for term in terms):
        return 1 if terms else 0
    if len(terms) == 1:
        return terms[0]
    found = pulp.LpVariable(name, 0, 1)
    for term in terms:
        program.addConstraint(found >= term)
    return found


Flows = dict[tuple[int, int], dict[int, Term]]
"""(layout made, layout wanted) → place of a consumer among the ends → its flow."""


def _flows(program: pulp.LpProblem, problem: Problem, number: int, strategies: Sequence[Mapping[int, Term]]) -> Flows:
    """Flows from the layout that is made to the layouts that are wanted."""
    link = problem.links[number]

    def by_layout(choice: int, layouts: tuple[int, ...]) -> dict[int, list[Term]]:
        found: dict[int, list[Term]] = {}
        for strategy, variable in strategies[choice].items():
            found.setdefault(layouts[strategy], []).append(variable)
        return found

    made = by_layout(link.producer, link.made)
    flows: Flows = {}
    for place, (choice, layouts) in enumerate(link.consumers, 1):
        targets = by_layout(choice, layouts)
        if len(made) == 1 and len(targets) == 1 and numpy.isfinite(link.seconds[next(iter(made)), next(iter(targets))]):
            flows.setdefault((next(iter(made)), next(iter(targets))), {})[place] = 1
            continue
        from_source: dict[int, list[pulp.LpVariable]] = {source: [] for source in made}
        to_target: dict[int, list[pulp.LpVariable]] = {target: [] for target in targets}
        for source, target in product(made, targets):
            if numpy.isfinite(link.seconds[source, target]):
                flow = pulp.LpVariable(f"f{number}_{place}_{source}_{target}", 0, 1)
                from_source[source].append(flow)
                to_target[target].append(flow)
                flows.setdefault((source, target), {})[place] = flow
        for source, variables in made.items():
            program.addConstraint(pulp.lpSum(from_source[source]) == _sum(variables))
        for target, variables in targets.items():
            program.addConstraint(pulp.lpSum(to_target[target]) == _sum(variables))
    return flows


def _memory(program: pulp.LpProblem, problem: Problem, strategies: Sequence[Mapping[int, Term]]) -> pulp.LpAffineExpression:
    """Bytes of what is held for good and of what is in work."""
    peak = pulp.LpVariable("working", 0)
    total: list[tuple[pulp.LpVariable, float]] = [(peak, 1e6)]
    constant = 0.0
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
    return pulp.LpAffineExpression(total, constant)


def _kept(
    program: pulp.LpProblem,
    problem: Problem,
    saved: Saved,
    strategies: Sequence[Mapping[int, Term]],
    flows: Flows,
    costs: list[tuple[pulp.LpVariable, float]],
) -> pulp.LpAffineExpression:
    """Bytes of what is kept of a tensor; what of it is made again is added to the costs."""
    link = problem.links[saved.link]
    wanting: dict[tuple[int, int], list[pulp.LpAffineExpression]] = {}
    for pair, by_consumer in flows.items():
        wanting.setdefault(pair, []).extend(_sum([flow]) for place, flow in by_consumer.items() if place in saved.savers)
    if 0 in saved.savers:
        for layout in {link.made[strategy] for strategy in strategies[link.producer]}:
            makers = [variable for strategy, variable in strategies[link.producer].items() if link.made[strategy] == layout]
            wanting.setdefault((layout, layout), []).append(_sum(makers))
    total: list[tuple[pulp.LpVariable, float]] = []
    for (made, layout), terms in wanting.items():
        size, again = float(saved.bytes[made, layout]), float(saved.again[made, layout])
        if not size or not terms:
            continue
        name = f"{saved.link}_{made}_{layout}"
        kept, anew = pulp.LpVariable(f"k{name}", 0, 1), pulp.LpVariable(f"r{name}", 0, 1 if numpy.isfinite(again) else 0)
        total.append((kept, size))
        if numpy.isfinite(again):
            costs.append((anew, again * MICROSECONDS))
        for term in terms:
            program.addConstraint(kept + anew >= term)
    return pulp.LpAffineExpression(total)

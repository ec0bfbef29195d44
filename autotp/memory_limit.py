"""Plans within a memory limit: other layouts, or tensors made again in backward, whichever is faster.

What the integer program estimates is corrected by what a walk through the plan's own graph finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from autotp.decisions import Decisions, Recomputed
from autotp.describe import chosen_of, conversions
from autotp.formulate import Border, Formulation
from autotp.ladders import ladders
from autotp.layouts import Layout
from autotp.liveness import observe
from autotp.observed import Observed
from autotp.plans import MemoryUse
from autotp.price.again import again
from autotp.price.conversion import ConversionPrices
from autotp.problem import Problem, bytes_of, seconds_of
from autotp.program import Ref
from autotp.recompute import Ladder, Recomputation, recomputation
from autotp.rewrite import rewrite
from autotp.solve import OutOfMemoryError, OutOfTimeError, Solution, least_plan, out_of_memory, solve
from autotp.strategies import Space

ATTEMPTS = 4
"""How often the estimate is corrected before plans with small estimates are taken."""
SHARES = (0.0, 0.1, 0.4)
"""Where the estimates of these lie between the least and that of the fastest plan."""
WALKS = 3
"""How often the bytes to save are corrected before everything is made again."""


@dataclass(frozen=True)
class Walked:
    """A plan in which nothing is made again, walked.

    Attributes:
        memory: its peak.
        ladders: what each repeated block can make again; none in inference, nor where `torch.compile` decides what is kept.
        again: the peak if this is made again.
    """

    memory: MemoryUse
    ladders: tuple[Ladder, ...]
    again: Callable[[tuple[Recomputed, ...]], MemoryUse]

    @property
    def spare(self) -> float:
        """Bytes that are made again in no time: the estimate need not count them."""
        free = ((ladder.copies * rung.bytes for rung in ladder.rungs if not rung.seconds) for ladder in self.ladders)
        return float(sum(max(sizes, default=0) for sizes in free))


@dataclass(frozen=True)
class Fitted:
    """A solution with what is made again in backward; its peak, and the seconds of a step.

    Under a limit, the gap of the solution is the proven distance from the best plan whose ESTIMATED bytes keep the limit, corrected by what
    the estimate missed; `unlimited_gap` is that from the fastest plan without a limit, which needs no estimate. None without a limit.
    """

    solution: Solution
    recomputation: Recomputation
    memory: MemoryUse
    seconds: float
    unlimited_gap: float | None = None


Walk = Callable[[Solution], Walked]


def decisions_of(
    space: Space, prices: ConversionPrices, border: Border, formulation: Formulation, solution: Solution
) -> Decisions:
    """What a solution decides, with nothing made again."""
    chosen = chosen_of(space, formulation, solution)
    paths = {
        (Ref(space.folding.representative[found.ref.node], found.ref.output), found.target): found.path
        for found in conversions(space, chosen, border, prices)
    }
    return Decisions(chosen, paths, dict(border.inputs), dict(border.outputs))


def walk(space: Space, prices: ConversionPrices, border: Border, formulation: Formulation, solution: Solution) -> Walked:
    """Walk a solution's graph for the first rank, which never has less than another, through a step."""
    decisions = decisions_of(space, prices, border, formulation, solution)
    first = (0,) * len(space.mesh)
    optimizer = prices.optimizer if prices.train else None
    on_cpu = prices.cluster.accelerator.name.startswith("cpu")

    def observed(recomputed: tuple[Recomputed, ...]) -> Observed:
        sharded = rewrite(space, replace(decisions, recomputed=recomputed), first, gradient=prices.train, device="meta")
        return observe(sharded, prices.symbols, optimizer, on_cpu)

    def seconds(version: tuple[Ref, Layout]) -> float:
        return again(space, prices, decisions.chosen, decisions.paths, version).total

    plain = observed(())
    options = ladders(plain, seconds) if prices.train and not prices.compiled else ()
    return Walked(plain.memory, options, lambda recomputed: observed(recomputed).memory)


def solve_within(problem: Problem, walk: Walk, *, time_limit: float, gap: float) -> Fitted:
    """The best plan whose peak keeps the problem's limit.

    Solved without a limit first, the fastest layouts keep the limit by making tensors again. Then the problem is solved under limits, each
    corrected by what the estimate of bytes missed; those layouts may make again what little is still too much. The fastest of all is taken.

    Raises:
        OutOfMemoryError: no plan was found that keeps the limit; it names a peak that one does reach.
    """
    limit = problem.limit
    free = replace(problem, limit=None)
    fastest = solve(free, time_limit=time_limit, gap=gap)
    walked = walk(fastest)
    if limit is None or walked.memory.total <= limit:
        return Fitted(fastest, Recomputation(), walked.memory, fastest.seconds)
    fitted = _fit(free, fastest, walked, limit)
    best = fitted if fitted.memory.total <= limit else None
    bound = unlimited = fastest.seconds * (1 - fastest.gap)
    enough = max(gap, fastest.gap)
    missed = walked.memory.total - walked.spare - fastest.bytes
    walks = {fastest.chosen: walked}
    for _ in range(ATTEMPTS):
        if limit <= missed or (best is not None and best.seconds * (1 - gap) <= bound):
            break
        try:
            found = solve(replace(problem, limit=limit - missed), time_limit=time_limit / ATTEMPTS, gap=gap)
        except (OutOfMemoryError, OutOfTimeError):
            break
        bound = max(unlimited, found.seconds * (1 - found.gap))
        enough = max(enough, found.gap if found.status == "optimal" else 0.0)
        if found.chosen in walks:
            break
        walks[found.chosen] = walked = walk(found)
        other = _fit(free, found, walked, limit)
        if other.memory.total <= limit and (best is None or other.seconds < best.seconds):
            best = other
        missed = other.memory.total + max(other.recomputation.bytes - walked.spare, 0) - bytes_of(free, found.chosen)
    if best is None:
        smallest = [fitted, *(_fit(free, one, walk(one), limit) for one in _smallest(problem, fastest, time_limit=time_limit, gap=gap))]
        fitting = [other for other in smallest if other.memory.total <= limit]
        if not fitting:
            raise out_of_memory(limit, min(other.memory.total for other in smallest))
        best = min(fitting, key=lambda other: other.seconds)
    proven = max(0.0, 1 - bound / best.seconds)
    status = "optimal" if proven <= enough * (1 + 1e-6) else "feasible"
    solution = replace(best.solution, status=status, gap=proven)
    return replace(best, solution=solution, unlimited_gap=max(0.0, 1 - unlimited / best.seconds))


def _fit(free: Problem, solution: Solution, walked: Walked, limit: float) -> Fitted:
    """A solution that makes as little again as keeps its walked peak within the limit; the smaller peak of none and all if that cannot be.

    Bytes that are not kept do not all come off the peak: what is made again is there for a while, and the highest moment may be another.
    """
    seconds = seconds_of(free, solution.chosen)
    nothing = Fitted(solution, Recomputation(), walked.memory, seconds)
    if walked.memory.total <= limit or not walked.ladders:
        return nothing
    everything = recomputation(walked.ladders, float("inf"))
    saved, before, wanted = 0, walked.memory.total, walked.memory.total - limit
    for _ in range(WALKS):
        choice = recomputation(walked.ladders, wanted)
        if choice.bytes >= everything.bytes:
            break
        memory = walked.again(choice.recomputed)
        if memory.total <= limit:
            return Fitted(solution, choice, memory, seconds + choice.seconds)
        share = (before - memory.total) / max(choice.bytes - saved, 1)
        saved, before = choice.bytes, memory.total
        wanted = saved + (memory.total - limit) / min(max(share, 0.2), 1.0)
    memory = walked.again(everything.recomputed)
    return min(Fitted(solution, everything, memory, seconds + everything.seconds), nothing, key=lambda fitted: fitted.memory.total)


def smallest_peak(walked: Walked) -> float:
    """Peak bytes of a plan that makes again nothing, or everything that it can: the smaller one."""
    everything = recomputation(walked.ladders, float("inf"))
    return min(walked.memory.total, walked.again(everything.recomputed).total if everything.recomputed else float("inf"))


def _smallest(problem: Problem, fastest: Solution, *, time_limit: float, gap: float) -> list[Solution]:
    """Solutions with small peaks: the one with the least estimate, and the fastest ones with estimates somewhat above that.

    The least estimate need not be the least peak.
    """
    found = [least_plan(problem, time_limit=time_limit)]
    least = found[0].bytes
    for share in SHARES:
        allowed = replace(problem, limit=least + share * max(fastest.bytes - least, 0.0))
        try:
            found.append(solve(allowed, time_limit=time_limit / ATTEMPTS, gap=max(gap, 1e-2)))
        except (OutOfMemoryError, OutOfTimeError):
            continue
    return found

"""Plans within a limit, where the problem's estimate is not what a walk through the plan finds."""

from __future__ import annotations

import pytest

from autotp.memory_limit import Fitted, Walked, solve_within
from autotp.plans import MemoryUse
from autotp.problem import Problem, bytes_of, everything_kept, seconds_of
from autotp.solve import OutOfMemoryError, Solution
from tests import test_solve
from tests.test_solve import every_choice


def random_problem(seed: int, limit: float | None = None) -> Problem:
    """Without tensors that could be made again: the walks below know of none."""
    return everything_kept(test_solve.random_problem(seed, limit))


def peak(problem: Problem, chosen: tuple[int, ...], factor: float) -> float:
    """What a walk finds: `factor` times the estimate, and now and then some more."""
    return factor * bytes_of(problem, chosen) + 1e7 * (sum(chosen) % 3)


def use(total: float) -> MemoryUse:
    return MemoryUse(total, 0.0, 0.0, 0.0, 0.0)


def run(problem: Problem, factor: float) -> Fitted:
    def walk(found: Solution) -> Walked:
        memory = use(peak(problem, found.chosen, factor))
        return Walked(memory, (), lambda _: memory)

    return solve_within(problem, walk, time_limit=60.0, gap=1e-6)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("seed", range(4))
def test_the_walked_peak_keeps_the_limit(seed: int, factor: float) -> None:
    free = random_problem(seed)
    sizes = sorted(peak(free, chosen, factor) for chosen in every_choice(free))
    limit = sizes[len(sizes) // 3]
    found = run(random_problem(seed, limit), factor)
    assert found.memory.total == peak(free, found.solution.chosen, factor) <= limit
    assert found.seconds == seconds_of(free, found.solution.chosen)


@pytest.mark.parametrize("seed", range(8))
def test_no_more_is_claimed_than_is_proved(seed: int) -> None:
    """Where the estimate is far off, the plan need not be the best within the limit, and must not be called so."""

    def far(chosen: tuple[int, ...]) -> float:
        return bytes_of(free, chosen) + 1e9 * (sum(chosen) % 3)

    free = random_problem(seed)
    limit = sorted(map(far, every_choice(free)))[len(every_choice(free)) // 4]

    def walk(one: Solution) -> Walked:
        return Walked(use(far(one.chosen)), (), lambda _: use(far(one.chosen)))

    found = solve_within(random_problem(seed, limit), walk, time_limit=60.0, gap=1e-6)
    optimum = min(seconds_of(free, chosen) for chosen in every_choice(free) if far(chosen) <= limit)
    assert optimum >= found.seconds * (1 - (found.unlimited_gap or 0.0)) * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_the_gap_is_that_within_the_estimate_where_it_misses_a_constant(seed: int) -> None:
    free = random_problem(seed)
    limit = sorted(bytes_of(free, chosen) for chosen in every_choice(free))[len(every_choice(free)) // 4] + 1e9 + 1e3

    def walk(one: Solution) -> Walked:
        return Walked(use(bytes_of(free, one.chosen) + 1e9), (), lambda _: use(0.0))

    found = solve_within(random_problem(seed, limit), walk, time_limit=60.0, gap=1e-6)
    optimum = min(seconds_of(free, chosen) for chosen in every_choice(free) if bytes_of(free, chosen) + 1e9 <= limit)
    assert optimum >= found.seconds * (1 - found.solution.gap) * (1 - 1e-9)
    assert found.solution.status == "optimal" and found.seconds == pytest.approx(optimum, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_least_that_is_named_is_the_peak_of_a_plan_and_accepted(seed: int) -> None:
    free = random_problem(seed)
    sizes = sorted(peak(free, chosen, 1.4) for chosen in every_choice(free))
    with pytest.raises(OutOfMemoryError) as error:
        run(random_problem(seed, 0.9 * sizes[0]), 1.4)
    assert any(error.value.least == pytest.approx(size) for size in sizes)
    assert run(random_problem(seed, 1.0005 * error.value.least), 1.4).memory.total <= 1.0005 * error.value.least


def test_without_a_limit_the_fastest_plan_is_taken() -> None:
    free = random_problem(1)
    found = run(free, 2.0)
    assert found.seconds == pytest.approx(min(seconds_of(free, chosen) for chosen in every_choice(free)), rel=1e-5)

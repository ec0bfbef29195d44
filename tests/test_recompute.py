"""What is kept and what is made again: the cut against all sets, the ladder against all ways, and what the literature does."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from autotp.layouts import uniform
from autotp.program import Ref
from autotp.recompute import (
    Block,
    Ladder,
    Maker,
    Rung,
    Stored,
    asked_for,
    bytes_freed,
    bytes_kept,
    cheapest,
    recomputation,
    rungs,
    seconds_again,
)


def random_block(seed: int, size: int = 11) -> Block:
    """Calls in a row, each with one or two results, that read what came before; the first memory comes from outside."""
    draw = random.Random(seed)
    stored, makers = [Stored(draw.randint(0, 20), False, None)], []
    while len(stored) < size:
        reads = draw.sample(range(len(stored)), min(len(stored), draw.randint(1, 3)))
        makers.append(Maker(draw.randint(0, 9) / 1e15, tuple(reads)))
        maker = None if draw.random() < 0.15 else len(makers) - 1
        stored += [Stored(draw.randint(0, 20), draw.random() < 0.5, maker) for _ in range(draw.choice((1, 1, 1, 2)))]
    return Block(tuple(stored), tuple(makers))


def every_set(block: Block) -> list[frozenset[int]]:
    """Every set of calls that can run again and are asked for."""
    numbers = range(len(block.makers))
    sets = (frozenset(chosen) for count in range(len(numbers) + 1) for chosen in combinations(numbers, count))
    return [chosen for chosen in sets if asked_for(block, chosen) == chosen]


def time(block: Block, running: frozenset[int]) -> int:
    return round(seconds_again(block, running) * 1e15)


@pytest.mark.parametrize("seed", range(40))
def test_the_cut_is_the_best_of_all_sets(seed: int) -> None:
    block = random_block(seed)
    for per_byte in (1, 2, 5, 11):
        for per_femtosecond in (1, 3, 20):
            least = min(per_byte * bytes_kept(block, made) + per_femtosecond * time(block, made) for made in every_set(block))
            found = cheapest(block, per_byte, per_femtosecond)
            assert found in every_set(block)
            assert per_byte * bytes_kept(block, found) + per_femtosecond * time(block, found) == least


@pytest.mark.parametrize("seed", range(40))
def test_the_ladder_is_the_lower_hull_of_all_sets_and_nested(seed: int) -> None:
    block = random_block(seed)
    ladder = rungs(block)
    points = [(bytes_kept(block, made), time(block, made)) for made in ladder]
    assert ladder[0] == frozenset()
    assert all(low < high for low, high in pairwise(ladder))
    assert all(low[0] > high[0] for low, high in pairwise(points))
    everything = [(bytes_kept(block, made), time(block, made)) for made in every_set(block)]
    assert points[-1] == min(everything)
    for (most, short), (fewest, long) in pairwise(points):  # nothing lies below a line of the hull
        assert all((size - most) * (long - short) + (spent - short) * (most - fewest) >= 0 for size, spent in everything)


@pytest.mark.parametrize("seed", range(40))
def test_what_each_call_spares_adds_up(seed: int) -> None:
    block = random_block(seed)
    for running in every_set(block):
        spared = bytes_freed(block, running)
        whole = bytes_kept(block, frozenset()) - bytes_kept(block, running)
        assert spared.keys() == running
        assert sum(spared.values()) == whole or whole < 0
        assert all(size >= 0 for size in spared.values())


def ladder(repeat: int, copies: int, steps: list[tuple[int, float]]) -> Ladder:
    """Rungs of these steps in bytes and seconds; the tensors are made up."""
    tensors, found, seconds = {}, [], 0.0
    for number, (saved, more) in enumerate(steps):
        tensors[Ref(number), uniform("I", 1)] = saved
        seconds += more
        found.append(Rung(dict(tensors), seconds))
    return Ladder(repeat, copies, tuple(found))


LADDERS = (ladder(0, 4, [(50, 1.0), (20, 2.0), (5, 9.0)]), ladder(2, 3, [(10, 0.1), (100, 8.0)]))


def ways(place: int) -> list[tuple[float, int]]:
    """(seconds, bytes) of every way in which the copies of a repeat can stand on its rungs."""
    found = [(0.0, 0)]
    for _ in range(LADDERS[place].copies):
        options = [(0.0, 0), *((rung.seconds, rung.bytes) for rung in LADDERS[place].rungs)]
        found = sorted({(a + c, b + d) for a, b in found for c, d in options})
    return found


@pytest.mark.parametrize("wanted", [1, 10, 29, 30, 31, 80, 200, 230, 260, 310, 333, 400, 600, 610, 630])
def test_so_many_copies_climb_as_the_bytes_ask_for(wanted: int) -> None:
    found = recomputation(LADDERS, wanted)
    assert found.bytes >= wanted
    best = min(a + c for a, b in ways(0) for c, d in ways(1) if b + d >= wanted)
    assert best - 1e-9 <= found.seconds <= best + (0 if wanted in (10, 30, 80, 230, 310, 610, 630) else 9.0) + 1e-9  # points of the hull
    for held in LADDERS:
        entries = [entry for entry in found.recomputed if entry.repeat == held.repeat]
        assert sum(entry.copies for entry in entries) <= held.copies
        assert all(strong.versions > weak.versions for strong, weak in pairwise(entries))


def test_nothing_runs_again_without_need_and_all_if_that_is_not_enough() -> None:
    assert recomputation(LADDERS, 0).recomputed == recomputation(LADDERS, -5).recomputed == ()
    most = recomputation(LADDERS, float("inf"))
    assert most.bytes == 4 * 75 + 3 * 110
    assert [(entry.repeat, entry.copies) for entry in most.recomputed] == [(0, 4), (2, 3)]

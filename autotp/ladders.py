"""What the copies of each repeated block could make again in backward: from a walked step to the ladders of `recompute.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from autotp.layouts import Layout
from autotp.liveness import Copy, Observed, Seen, Storage
from autotp.program import Ref
from autotp.recompute import Block, Ladder, Maker, Rung, Stored, bytes_kept, rungs, seconds_again

Version = tuple[Ref, Layout]


def ladders(observed: Observed, seconds: Callable[[Version], float]) -> tuple[Ladder, ...]:
    """One ladder for each repeated block of which anything can be made again.

    Args:
        observed: the step in which nothing is made again.
        seconds: what it costs to make a tensor of the first copy again.
    """
    repeats: dict[int, list[Copy]] = {}
    for copy in observed.copies:
        repeats.setdefault(copy.repeat, []).append(copy)
    found = []
    for number, copies in repeats.items():
        block, versions = block_of(observed, copies, seconds)
        whole = bytes_kept(block, frozenset())
        steps = tuple(
            Rung(frozenset(versions[place] for place in made), seconds_again(block, made), whole - bytes_kept(block, made))
            for made in rungs(block)[1:]
        )
        if steps:
            found.append(Ladder(number, len(copies), steps))
    return tuple(found)


def block_of(
    observed: Observed, copies: list[Copy], seconds: Callable[[Version], float]
) -> tuple[Block, dict[int, Version]]:
    """The second copy of a repeated block (the first may stand behind other layouts), and the tensor behind each memory that a call makes.

    Free to keep is what is there anyway: parameters, what all copies read, what others keep. What the block gives to the outside can
    only be kept; so can integers, which say where rows go and how many there are, and what only autograd sees (masks of dropout).
    """
    copy, first = copies[1], copies[0]
    elsewhere = [call for other in observed.copies if other is not copy for call in other.calls] + list(observed.calls)
    free = _all(call.kept for call in elsewhere) | (_outside(first).keys() & _outside(copy).keys())
    saved = _all(call.kept for call in copy.calls)
    number: dict[Storage, int] = {storage: place for place, storage in enumerate(_outside(copy))}
    made_by: dict[int, int] = {}
    versions: dict[int, Version] = {}
    makers: list[Maker] = []
    for call in copy.calls:
        results = [(place, storage) for place, storage in enumerate(call.made) if storage is not None and storage not in number]
        able = [(place, storage) for place, storage in results if storage not in copy.given and _can_run_again(call, place)]
        for _, storage in results:
            number.setdefault(storage, len(number))
        for storage in call.kept:
            number.setdefault(storage, len(number))
        for place, storage in able:
            made_by[number[storage]] = len(makers)
            versions[number[storage]] = call.node.meta["versions"][place]
        if able:
            makers.append(Maker(seconds(versions[number[able[0][1]]]), tuple(number[storage] for storage in dict.fromkeys(call.reads))))
    stored = tuple(
        Stored(0 if storage.rests or storage in free else storage.bytes, storage in saved, made_by.get(place))
        for storage, place in number.items()
    )
    return Block(stored, tuple(makers)), versions


def _outside(copy: Copy) -> dict[Storage, None]:
    """What a copy reads and does not make."""
    made: set[Storage] = set()
    found: dict[Storage, None] = {}
    for call in copy.calls:
        found.update((storage, None) for storage in call.reads if storage not in made)
        made.update(storage for storage in call.made if storage is not None)
    return found


def _can_run_again(call: Seen, place: int) -> bool:
    types = call.node.meta.get("local", ())
    if "versions" not in call.node.meta or place >= len(types):
        return False
    dtype: torch.dtype = types[place][0].dtype
    return dtype.is_floating_point or dtype.is_complex or dtype is torch.bool


def _all(groups: Iterable[tuple[Storage, ...]]) -> set[Storage]:
    return {storage for group in groups for storage in group}

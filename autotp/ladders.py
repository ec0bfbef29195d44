"""What the copies of each repeated block could make again in backward: from a walked step to the ladders of `recompute.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from autotp.layouts import Layout
from autotp.ledger import Storage
from autotp.observed import Copy, Observed, Seen
from autotp.program import Ref
from autotp.recompute import Block, Ladder, Maker, Rung, Stored, bytes_freed, bytes_kept, rungs, seconds_again

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
        steps = [Rung(_spared(block, versions, running), seconds_again(block, running)) for running in rungs(block)[1:]]
        if steps:
            found.append(Ladder(number, len(copies), tuple(steps), bytes_kept(block, frozenset())))
    return tuple(found)


def _spared(block: Block, versions: Sequence[tuple[Version, ...]], running: frozenset[int]) -> dict[Version, int]:
    """The tensors that these calls make, with the bytes that they spare; of several results of a call the first bears them."""
    freed = bytes_freed(block, running)
    return {version: freed[call] if place == 0 else 0 for call in freed for place, version in enumerate(versions[call])}


def block_of(
    observed: Observed, copies: Sequence[Copy], seconds: Callable[[Version], float]
) -> tuple[Block, list[tuple[Version, ...]]]:
    """The second copy of a repeated block (the first may stand behind other layouts), and the tensors that each call makes.

    Free to keep is what is there anyway: parameters, what all copies read, what others keep. Integers can only be kept: they say how many
    rows there are, and where they go. What autograd alone sees of a call (a mask of dropout) is made again with the call's results.
    """
    copy, first = copies[1], copies[0]
    elsewhere = [call for other in observed.copies if other is not copy for call in other.calls] + list(observed.calls)
    free = _all(call.kept for call in elsewhere) | (_outside(first).keys() & _outside(copy).keys())
    saved = _all(call.kept for call in copy.calls)
    number = {storage: place for place, storage in enumerate(_outside(copy))}
    maker_of: dict[int, int] = {}
    versions: list[tuple[Version, ...]] = []
    makers: list[Maker] = []
    for call in copy.calls:
        able = _made_again(call)
        for place, storage in enumerate((*call.made, *call.kept)):
            if storage is not None and storage not in number:
                number[storage] = len(number)
                if able and (place in able or place >= len(call.made)):
                    maker_of[number[storage]] = len(makers)
        if len(makers) in maker_of.values():
            versions.append(tuple(able.values()))
            makers.append(Maker(seconds(versions[-1][0]), tuple(number[storage] for storage in dict.fromkeys(call.reads))))
    stored = tuple(
        Stored(0 if storage.rests or storage in free else storage.bytes, storage in saved, maker_of.get(place))
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


def _made_again(call: Seen) -> dict[int, Version]:
    """Number of a result → the tensor of the program that it is, of those that can be made again."""
    versions, types = call.node.meta.get("versions", ()), call.node.meta.get("local", ())
    dtypes = [tensor.dtype for tensor, _ in types]
    return {
        place: version
        for place, (version, dtype) in enumerate(zip(versions, dtypes, strict=True))
        if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool
    }


def _all(groups: Iterable[tuple[Storage, ...]]) -> set[Storage]:
    return {storage for group in groups for storage in group}

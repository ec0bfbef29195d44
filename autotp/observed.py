"""What a walk through a step saw: which memory every call reads, makes and keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autotp.ledger import Storage
from autotp.plans import MemoryUse


@dataclass(frozen=True)
class Seen:
    """One call of the forward.

    Attributes:
        node: where it stands in its graph.
        reads: the storage of each tensor that it takes; made: of each of its results, which may be one that it takes.
        kept: what autograd needs of it in backward.
    """

    node: fx.Node
    reads: tuple[Storage, ...]
    made: tuple[Storage | None, ...]
    kept: tuple[Storage, ...]


@dataclass(frozen=True)
class Copy:
    """One copy of a repeated block: the number of its repeat, and its calls."""

    repeat: int
    calls: tuple[Seen, ...]


@dataclass(frozen=True)
class Observed:
    """A step: bytes by part at the highest moment, the calls outside repeated blocks, and the copies of these in execution order."""

    memory: MemoryUse
    calls: tuple[Seen, ...]
    copies: tuple[Copy, ...]

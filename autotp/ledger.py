"""Bytes by part of memory, and what keeps each storage alive: counted by reference, as a running module does.

A storage lives while the graph at work, autograd or the rank itself refers to it. In its place autograd may hold a `Remade`, which stands
for a tensor that backward makes again (`runtime/recompute.py`): it refers to the call that makes it until that is done, the call to its
operands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from autotp.footprint import Call, Spec

PARTS = ("parameters", "cache", "gradients", "optimizer", "activations", "transient")


@dataclass(eq=False)
class Storage:
    """Memory that lives while anything holds it: the graph at work (`held`), autograd (`kept`), or the rank itself (`rests`)."""

    bytes: int
    held: int = 0
    kept: int = 0
    rests: str = ""
    remade: Remade | None = None
    """While its block runs: what is held in its place for backward."""

    @property
    def part(self) -> str:
        """Which part of memory it counts to; empty when it is free."""
        return self.rests or ("activations" if self.kept else "transient" if self.held else "")


@dataclass(eq=False)
class Again:
    """A call that is made again if anything refers to one of its results: by number, call, key and operands of its observation."""

    number: int
    call: Call
    key: object
    specs: tuple[Spec, ...]
    operands: tuple[Storage | Remade, ...]
    results: dict[int, Remade] = field(default_factory=dict)
    """By the storage's number in the call's footprint."""
    references: int = 0


@dataclass(eq=False)
class Remade:
    """A storage that a call makes again when it is asked for: `storage` then."""

    again: Again
    bytes: int
    references: int = 0
    storage: Storage | None = None


@dataclass
class Ledger:
    """Bytes by part, now and at the highest moment."""

    now: Counter[str] = field(default_factory=Counter)
    total: int = 0
    highest: int = -1
    peak: Counter[str] = field(default_factory=Counter)

    def change(self, storage: Storage, held: int = 0, kept: int = 0, rests: str | None = None) -> None:
        """Something begins or ends to hold a storage."""
        before = storage.part
        storage.held += held
        storage.kept += kept
        storage.rests = storage.rests if rests is None else rests
        after = storage.part
        if before != after:
            self.now[before] -= storage.bytes
            self.now[after] += storage.bytes
            self.total += storage.bytes * (bool(after) - bool(before))
            if not after:
                self.forget(storage)

    def look(self, more: int = 0, gradients: int = 0) -> None:
        """Is this the highest moment? With `more` bytes that are not yet written down, `gradients` of them of parameters."""
        if self.total + more > self.highest:
            self.highest = self.total + more
            self.peak = Counter({part: self.now[part] for part in PARTS})
            self.peak["gradients"] += gradients
            self.peak["transient"] += more - gradients

    # ---- tensors that are made again ----

    def promise(self, storage: Storage, remade: Remade) -> None:
        """From now on `remade` is held for backward where `storage` would be."""
        storage.remade = remade
        self.refer(remade)

    def forget(self, storage: Storage) -> None:
        """End a promise: the storage is free, or its block has run."""
        if storage.remade is not None:
            remade, storage.remade = storage.remade, None
            self.unrefer(remade)

    def refer(self, to: Storage | Remade) -> None:
        """Something that backward needs refers to a tensor."""
        if isinstance(to, Storage):
            self.change(to, kept=1)
            return
        to.references += 1
        if to.references == 1:
            self.refer_call(to.again)

    def refer_call(self, again: Again) -> None:
        """Something refers to a call."""
        again.references += 1
        if again.references == 1:
            for operand in again.operands:
                self.refer(operand)

    def unrefer(self, *to: Storage | Remade) -> None:
        """The inverse of `refer`."""
        stack = list(to)
        while stack:
            item = stack.pop()
            if isinstance(item, Storage):
                self.change(item, kept=-1)
                continue
            item.references -= 1
            if item.references == 0 and item.storage is None:
                stack += self._left_by(item.again)
            elif item.references == 0:
                assert item.storage is not None
                self.change(item.storage, held=-1)

    def unrefer_call(self, again: Again) -> None:
        """The inverse of `refer_call`."""
        self.unrefer(*self._left_by(again))

    def _left_by(self, again: Again) -> Iterable[Storage | Remade]:
        """What a call no longer refers to, now that one less refers to it."""
        again.references -= 1
        return () if again.references else again.operands

    def fill(self, again: Again) -> None:
        """The call is made again: those of its results that anything refers to are there."""
        waiting = [remade for remade in again.results.values() if remade.references and remade.storage is None]
        for remade in waiting:
            remade.storage = Storage(remade.bytes)
            self.change(remade.storage, held=1)
        for _ in waiting:
            self.unrefer_call(again)

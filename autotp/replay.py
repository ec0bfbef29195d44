"""An initialiser run as on one device, in the memory of one tensor at a time.

It runs once on fake tensors, which records every operator. When it is known what the rank holds, the operators run for real in the same
order, and so draw the same random numbers; each parameter is cut as soon as nothing writes to it any more. Values that are overwritten
unread, as by a library that initialises a layer anew, are drawn and given up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp import _torch
from autotp.errors import AutotpError

ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
OVERWRITES = ("normal_", "uniform_", "zero_", "fill_", "copy_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_")
"""Operators on a tensor that do not read what it held."""


@dataclass(frozen=True)
class Place:
    """A tensor as a view of a numbered storage."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """An operator with its arguments, tensors as places, the places of its results and every storage that it touches.

    `overwrites` is a storage of which it reads nothing, and writes everything.
    """

    target: Any
    args: Any
    kwargs: Any
    results: tuple[Place | None, ...]
    touches: frozenset[int]
    overwrites: int | None


@dataclass(frozen=True)
class Recording:
    """What an initialiser does.

    Attributes:
        model: what it builds, on fake tensors.
        calls: its operators, in order.
        sizes: bytes of each storage.
        places: of every parameter and buffer, by its first name.
    """

    model: nn.Module
    calls: tuple[Call, ...]
    sizes: tuple[int, ...]
    places: Mapping[str, Place]

    def replay(self, seed: int, take: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """Run it for real on the CPU, and give what `take` makes of each parameter and buffer, given its name and its whole value."""
        named: dict[int, list[str]] = {}
        for name, place in self.places.items():
            named.setdefault(place.storage, []).append(name)
        uses: dict[int, list[int]] = {}
        for number, call in enumerate(self.calls):
            for storage in call.touches:
                uses.setdefault(storage, []).append(number)
        memory = _Memory(self.sizes)
        found: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for call in self.calls:
                memory.run(call)
                for storage in call.touches:
                    later = uses[storage]
                    later.pop(0)
                    if not later:
                        found.update({name: take(name, memory.view(self.places[name])) for name in named.pop(storage, ())})
                    if not later or self.calls[later[0]].overwrites == storage:
                        memory.free(storage)
            found.update({name: take(name, memory.view(self.places[name])) for names in named.values() for name in names})
        return found


class _Memory:
    """The storages that have memory now. What is given up is used again for the next of its size, before the heap is broken up by it."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes, self.held = sizes, dict[int, torch.UntypedStorage]()
        self.spare: dict[int, torch.UntypedStorage] = {}

    def view(self, place: Place) -> Tensor:
        if place.storage not in self.held:
            size = self.sizes[place.storage]
            self.held[place.storage] = self.spare.pop(size) if size in self.spare else torch.UntypedStorage(size)
        return torch.empty(0, dtype=place.dtype).set_(self.held[place.storage], place.offset, place.shape, place.stride)

    def free(self, storage: int) -> None:
        if storage in self.held:
            memory = self.held.pop(storage)
            self.spare[memory.nbytes()] = memory

    def run(self, call: Call) -> None:
        args, kwargs = _torch.tree_map_only(Place, self.view, (call.args, call.kwargs))
        results = [leaf for leaf in _torch.tree_flatten(call.target(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
        for place, result in zip(call.results, results, strict=True):
            if place is not None and place.storage not in self.held:
                if (tuple(result.shape), result.stride(), result.storage_offset()) != (place.shape, place.stride, place.offset):
                    result = torch.empty_strided(place.shape, place.stride, dtype=place.dtype).copy_(result)
                self.held[place.storage] = result.untyped_storage()


def record(build: Callable[[], Any]) -> Recording | None:
    """Run an initialiser on fake tensors; None if it needs values, or keeps tensors that are neither parameters nor buffers."""
    recorder = _Recorder()
    try:
        with _torch.new_fake_mode(), recorder:
            model = build()
    except AutotpError:
        raise
    except Exception:  # whatever it is, the initialiser itself will say it when it runs for real
        return None
    if not isinstance(model, nn.Module):
        return None
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not all(_torch.fake_mode_of([tensor]) is not None for tensor in state.values()):
        return None
    places = {name: recorder.place(tensor) for name, tensor in state.items()}
    kept = {place.storage for place in places.values()}
    if any(tensor is not None and recorder.place(tensor).storage not in kept for tensor in (made() for made in recorder.made)):
        return None
    return Recording(model, tuple(recorder.calls), tuple(recorder.sizes), places)


class _Recorder(_torch.DispatchMode):
    """Notes every operator that makes or changes memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[Any, int] = {}
        self.sizes: list[int] = []
        self.storages: list[Any] = []  # alive, so that no other gets their keys
        self.calls: list[Call] = []
        self.made: list[weakref.ref[Tensor]] = []

    def place(self, tensor: Tensor) -> Place:
        """The tensor's storage, numbered when it is first seen."""
        key = _torch.storage_key(tensor)
        if key not in self.numbers:
            self.numbers[key] = len(self.sizes)
            self.sizes.append(tensor.untyped_storage().nbytes())
            self.storages.append(tensor.untyped_storage())
        return Place(self.numbers[key], tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator on fake tensors, and note it."""
        kwargs = kwargs or {}
        given = _torch.tree_map_only(Tensor, self._operand, (args, kwargs))
        operands = [leaf for leaf in _torch.tree_flatten(given)[0] if isinstance(leaf, Place)]
        before = len(self.sizes)
        result = func(*args, **kwargs)
        made = [leaf for leaf in _torch.tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        results = tuple(self.place(tensor) if _torch.fake_mode_of([tensor]) is not None else None for tensor in made)
        self.made += [weakref.ref(tensor) for tensor in made]
        word = func.name().partition("::")[2].partition(".")[0]
        new = any(place is not None and place.storage >= before for place in results)
        if (func._schema.is_mutable or new) and word not in ALLOCATIONS:
            touches = frozenset(place.storage for place in (*operands, *results) if place is not None)
            over = operands[0] if operands and word in OVERWRITES else None
            pure = over is not None and self._covers(over) and all(place.storage != over.storage for place in operands[1:])
            overwrites = over.storage if over is not None and pure else None
            self.calls.append(Call(func, given[0], given[1], results, touches, overwrites))
        return result

    def _operand(self, tensor: Tensor) -> Any:
        return tensor if _torch.fake_mode_of([tensor]) is None else self.place(tensor)

    def _covers(self, place: Place) -> bool:
        count = 1
        for size in place.shape:
            count *= size
        return place.offset == 0 and count * place.dtype.itemsize == self.sizes[place.storage]

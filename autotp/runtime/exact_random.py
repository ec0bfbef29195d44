"""Random operators as one device draws them: every rank draws the numbers of the whole tensor, and uses those of its piece.

All ranks draw from PyTorch's own generator of their device, operator by operator in the order of the forward. So a rank whose generator
starts where that of a single device does draws the same numbers, whatever the layouts are. The price is time and memory: each call
makes a tensor of the global size for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from operator import index
from typing import Any

import sympy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.errors import AutotpError
from autotp.layouts import Coordinate, Layout, SortedCut, at_sizes
from autotp.runtime.random import RandomCall, device_of, generator_of
from autotp.runtime.state import local_part


@dataclass(frozen=True)
class Whole:
    """The tensor as one device has it.

    Attributes:
        sizes: its shape.
        order: its dims as they stand in memory, the one of the largest stride first: numbers are drawn in the order of memory.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def filled(self, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of this kind."""
        laid = torch.full([self.sizes[dim] for dim in self.order], value, dtype=dtype, device=device)
        return laid.permute([self.order.index(dim) for dim in range(len(self.order))])


@dataclass(frozen=True)
class Piece:
    """Where the numbers of a rank stand in the whole tensor of numbers.

    Attributes:
        draw: from a `Whole` and the arguments of the call to the whole tensor of numbers.
        order: as in `Whole`.
        layout: what splits it; its cuts may name `symbols`.
        mesh, coordinate: size of each mesh axis, and this rank's place.
    """

    draw: Callable[..., Tensor]
    order: tuple[int, ...]
    layout: Layout
    symbols: tuple[sympy.Symbol, ...]
    mesh: tuple[int, ...]
    coordinate: Coordinate

    def of(self, numbers: Tensor, sizes: Sequence[int], held: Sequence[Tensor]) -> Tensor:
        """This rank's numbers; `held` are its rows of the dims that are sorted, dim by dim."""
        layout = at_sizes(self.layout, dict(zip(self.symbols, map(index, sizes), strict=True)))
        plain = tuple(split for split in layout.splits if not isinstance(split.cut, SortedCut))
        part = local_part(numbers, Layout(("I",) * len(self.mesh), plain), self.mesh, self.coordinate) if plain else numbers
        rows = (split.dim for split in layout.splits if split not in plain)
        for dim, places in zip(rows, held, strict=True):
            part = part.index_select(dim, places)
        return part


class ExactCall(RandomCall):
    """A random operator as one device draws it.

    Args:
        target: the operator, which draws; with `piece`, a function of the drawn numbers and the arguments, which does not.
        piece: which numbers are this rank's; None if all are.
    """

    def __init__(self, target: Any, piece: Piece | None = None) -> None:
        super().__init__(target, 0)
        self.piece = piece

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator. Of a piece, the keywords `whole`, `sizes` and `held` say the global shape, the values of the symbols, and the
        rows of sorted dims."""
        return self._draw(*args, **kwargs)

    def drawn(self, memory: Memory | None = None) -> Callable[..., Any]:
        """The same with the state of the generator remembered, in `memory`, at the first call: further calls repeat it."""
        return partial(self._sample, memory or Memory())

    def _sample(self, memory: Any, /, *args: Any, **kwargs: Any) -> Any:
        generator = generator_of(device_of(args, kwargs))
        now = generator.get_state()
        if memory.state is None:
            memory.state = now
            return self._draw(*args, **kwargs)
        generator.set_state(memory.state)
        try:
            return self._draw(*args, **kwargs)
        finally:
            generator.set_state(now)

    def _draw(
        self, *args: Any, whole: Sequence[int] = (), sizes: Sequence[int] = (), held: Sequence[Tensor] = (), **kwargs: Any
    ) -> Any:
        if self.piece is None:
            return self.target(*args, **kwargs)
        with torch.no_grad():
            shape = Whole(tuple(map(index, whole)), self.piece.order)
            numbers = self.piece.of(self.piece.draw(shape, *args, **kwargs), sizes, held)
        return self.target(numbers, *args, **kwargs)

    def extra_repr(self) -> str:
        """The operator, and its piece."""
        return f"{self.target}, exact" + (f", {self.piece.layout}" if self.piece else "")


class Memory:
    """What a draw must know to be repeated: the state of the generator before it."""

    def __init__(self) -> None:
        self.state: Tensor | None = None


def drawn_together(modules: Sequence[RandomCall]) -> list[Callable[..., Any]]:
    """`drawn` for ranks that share one process, and so its generators: each draws what the first does."""
    memory = Memory()
    return [module.drawn(memory) if isinstance(module, ExactCall) else module.drawn() for module in modules]


def check_in_step(device_mesh: DeviceMesh) -> None:
    """Make sure that the generators of all ranks of a mesh stand at the same place. One exchange of two numbers for each mesh axis.

    Raises:
        AutotpError: on every rank of the axes along which they differ.
    """
    device = torch.device(device_mesh.device_type)
    digest = sha256(generator_of(device).get_state().numpy().tobytes()).digest()
    number = int.from_bytes(digest[:7])
    extremes = torch.tensor([number, -number], device=device)
    for axis in range(device_mesh.ndim):
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=device_mesh.get_group(axis))
    if extremes.tolist() != [number, -number]:
        raise AutotpError(
            "with randomness='exact' all ranks draw the same numbers, but their random generators stand at different places: call "
            "torch.manual_seed() with the same seed on every rank, and let no rank draw numbers that the others do not"
        )


def random_state(graphs: Sequence[nn.Module], device: torch.device) -> dict[str, Tensor]:
    """Where the random operators of graphs with one stream stand: see `ParallelModule.random_state`. Empty if there are none."""
    calls = [child for graph in graphs for child in graph.modules() if isinstance(child, RandomCall)]
    if any(isinstance(call, ExactCall) for call in calls):
        return {"generator": generator_of(device).get_state()}
    return {"seeds": calls[0].stream.state} if calls else {}


def set_random_state(graphs: Sequence[nn.Module], device: torch.device, state: Mapping[str, Tensor]) -> None:
    """Set back what `random_state` gave.

    Raises:
        AutotpError: it is of another kind.
    """
    now = random_state(graphs, device)
    if now.keys() != state.keys():
        raise AutotpError(
            f"the random state given has {', '.join(state) or 'nothing'}, and this module has {', '.join(now) or 'nothing'}: it was saved "
            "by a module with another `randomness`; make this one with that"
        )
    if "generator" in state:
        generator_of(device).set_state(state["generator"])
    if "seeds" in state:
        next(child for graph in graphs for child in graph.modules() if isinstance(child, RandomCall)).stream.state = state["seeds"]

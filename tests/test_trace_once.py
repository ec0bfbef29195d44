"""The trace that runs each distinct block twice is the trace of all of them, node for node."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp import trace_once
from autotp.program import Program
from autotp.trace import trace
from autotp.verify import first_difference
from tests.models import CONFIGS, example

DEPTH = 5


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Per export of a test, how many calls were cut short."""
    counts: list[int] = []
    original = trace_once.Repeats.cut.fget
    assert original is not None

    def counted(repeats: trace_once.Repeats) -> Any:
        counts.append(len(repeats.calls))
        return original(repeats)

    monkeypatch.setattr(trace_once.Repeats, "cut", property(counted))
    return counts


def check_same(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, dynamic: bool = True) -> Program:
    """Trace both ways and compare; returns the program."""
    whole = trace(model, args, kwargs, dynamic=dynamic, whole=True)
    once = trace(model, args, kwargs, dynamic=dynamic)
    assert first_difference(once, whole) == ""
    return once


# ---- real models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dynamic"), [*((name, False) for name in CONFIGS), ("gpt2", True), ("gemma2", True)])
def test_models(name: str, dynamic: bool, cut: list[int]) -> None:
    one = example(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": DEPTH})
    check_same(one.model, one.args, one.kwargs, dynamic=dynamic)
    assert cut == [0, 1 if name == "gemma2" else DEPTH - 2]  # gemma2 has two kinds of layers


# ---- blocks that differ in what a trace cannot show ---------------------------------------------------------------------


class Block(nn.Module):
    """A plain block with an index, which `what` may make it use."""

    counter = 0

    def __init__(self, index: int = 0, what: str = "") -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        self.index, self.what = index, what
        self.rate = 0.1 * index
        self.kind = "odd" if index % 2 else "even"
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(self.norm(x))))


class Indexed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.index + 1)


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.kind == "odd" else super().forward(x).tanh()


class DropPath(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.dropout(super().forward(x), self.rate, self.training)


class Drops(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(super().forward(x), 0.5, self.training)


STATE = SimpleNamespace(calls=0)
CALLS = 0


class CountsGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return super().forward(x) * CALLS


class CountsObject(Block):
    def forward(self, x: Tensor) -> Tensor:
        STATE.calls += 1
        return super().forward(x) * STATE.calls


class CountsClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        type(self).counter += 1
        return super().forward(x) * self.counter


class ReadsGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * STATE.calls


class ReadsClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.counter


class Detaches(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Halves(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).repeat(1, 1, 2)[..., 8:]


class Appends(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)
        return super().forward(x)


class ReadsDict(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (vars(self)["index"] + 1)


class GetsByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self, "in" + "dex")


class Draws(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if random.random() < 2 else x


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y += 1
        return y


class Overwrites(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return super().forward(x)


class Normed(Block):
    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.batch = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.batch(super().forward(x)))


class Lifted(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor([1.0, 2.0] * 4)


class Views(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape)


class NoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.norm(x).amax()
        return super().forward(x) * scale


class Pairs(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), {"before": x, "length": x.shape[0], "none": None}


class Shared(Block):
    """Uses a module that all copies share."""

    def __init__(self, index: int, shared: nn.Module) -> None:
        super().__init__(index)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shared(x))


def closure() -> tuple[Callable[[], int], Callable[[], None]]:
    value = 0

    def read() -> int:
        return value

    def move() -> None:
        nonlocal value
        value += 1

    return read, move


READ, MOVE = closure()


class Encloses(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * READ()


class Stack(nn.Module):
    """A loop over blocks; `around(index, x)` runs after each."""

    def __init__(self, blocks: list[nn.Module], around: Callable[[int, Tensor], Tensor] = lambda index, x: x) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(blocks)
        self.around = around

    def forward(self, x: Tensor) -> Any:
        x, seen = self.inlet(x), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if isinstance(x, tuple):
                x, more = x
                seen.append(more["before"])
            x = self.around(index, x)
            seen.append(x)
        return x, seen


def moving(index: int, x: Tensor) -> Tensor:
    """Changes what the next block reads."""
    STATE.calls = max(index - 2, 0)
    return x


def enclosed(index: int, x: Tensor) -> Tensor:
    if index == 2:
        MOVE()
    return x


def written(index: int, x: Tensor) -> Tensor:
    x += 1
    return x


def classed(index: int, x: Tensor) -> Tensor:
    """Changes an attribute of a class."""
    ReadsClass.counter = max(index - 2, 0)
    return x


def of(kind: type[nn.Module], count: int = DEPTH) -> list[nn.Module]:
    return [kind(index) for index in range(count)]


def layered(index: int, x: Tensor) -> Tensor:
    return x * (index + 1)


CUT = {
    "plain": (lambda: Stack(of(Block)), 3),
    "index outside": (lambda: Stack(of(Block), layered), 3),
    "alternating": (lambda: Stack(of(Branching, 7)), 3),
    "random": (lambda: Stack(of(Drops)), 3),
    "no gradients inside": (lambda: Stack(of(NoGrad)), 3),
    "several outputs": (lambda: Stack(of(Pairs)), 3),
    "two kinds": (lambda: Stack([*of(Block), *of(Drops)]), 6),
    "one odd": (lambda: Stack([*of(Block, 3), Drops(), *of(Block, 3)]), 4),
    "torch's own": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 6, enable_nested_tensor=False), 3),
    "writes": (lambda: Stack(of(InPlace)), 3),
    "writes outside": (lambda: Stack(of(Block), written), 3),
    "writes in both": (lambda: Stack(of(InPlace), written), 3),
    "batch norms": (lambda: Stack(of(Normed)), 3),
    "frozen": (lambda: Stack(of(Block)).requires_grad_(False), 3),
    "global changes": (lambda: Stack(of(ReadsGlobal), moving), 2),
    "class changes": (lambda: Stack(of(ReadsClass), classed), 2),
}
"""Models of which calls are cut short, and how many."""

WHOLE = {
    "index inside": lambda: Stack(of(Indexed)),
    "rates": lambda: Stack(of(DropPath)),
    "index by name": lambda: Stack(of(GetsByName)),
    "attributes as a dict": lambda: Stack(of(ReadsDict)),
    "counts in a global": lambda: Stack(of(CountsGlobal)),
    "counts in an object": lambda: Stack(of(CountsObject)),
    "counts in its class": lambda: Stack(of(CountsClass)),
    "keeps a list": lambda: Stack(of(Appends)),
    "draws in Python": lambda: Stack(of(Draws)),
    "writes to its input": lambda: Stack(of(Overwrites)),
    "constants": lambda: Stack(of(Lifted)),
    "views": lambda: Stack(of(Views)),
    "shared module": lambda: (lambda shared: Stack([Shared(index, shared) for index in range(DEPTH)]))(nn.Linear(8, 8)),
    "tied": lambda: Stack([Block()] * DEPTH),
    "detached": lambda: Stack(of(Detaches, 6)),
    "half of a tensor": lambda: Stack(of(Halves)),
    "two blocks": lambda: Stack(of(Block, 2)),
}
"""Models that are traced whole."""


def setup_state() -> None:
    global CALLS
    CALLS = STATE.calls = Block.counter = 0
    CountsClass.counter = ReadsClass.counter = 0


def both(build: Callable[[], nn.Module]) -> tuple[Program, Program]:
    """The two traces, each with the global state of the start."""
    torch.manual_seed(0)
    model, x = build(), torch.randn(3, 5, 8)
    programs = []
    for whole in (True, False):
        setup_state()
        global READ, MOVE
        READ, MOVE = closure()
        programs.append(trace(model, (x,), dynamic=False, whole=whole))
    return programs[0], programs[1]


@pytest.mark.parametrize("name", CUT)
def test_cut_short(name: str, cut: list[int]) -> None:
    build, count = CUT[name]
    whole, once = both(build)
    assert first_difference(once, whole) == ""
    assert cut == [0, count]


@pytest.mark.parametrize("name", WHOLE)
def test_traced_whole(name: str, cut: list[int]) -> None:
    whole, once = both(WHOLE[name])
    assert first_difference(once, whole) == ""
    assert set(cut) == {0}


def test_closure_that_moves(cut: list[int]) -> None:
    """The last copies read another value of an enclosed variable than the first did."""
    whole, once = both(lambda: Stack(of(Encloses), enclosed))
    assert first_difference(once, whole) == ""
    assert cut[-1] in (0, 1, 2)

"""How sample calls of operators are written down, and the table that the files of samples fill."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from autotp import experts, lookups, losses, statistics
from autotp.rules import RULES

RANDOM = torch.Generator().manual_seed(0)
INFINITY = float("inf")


class Sample(NamedTuple):
    """One call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(*args: Any, **kwargs: Any) -> Sample:
    """A call with these arguments."""
    return Sample(args, kwargs)


def real(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=RANDOM, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    """Numbers between 0.1 and 0.9, all different."""
    return torch.rand(shape, generator=RANDOM, dtype=torch.float64) * 0.8 + 0.1


def integers(*shape: int, below: int = 5) -> Tensor:
    """Numbers from 0 to below − 1."""
    return torch.randint(below, shape, generator=RANDOM)


def booleans(*shape: int) -> Tensor:
    """Half of them True."""
    return torch.rand(shape, generator=RANDOM) < 0.5


def each(names: str, *samples: Sample) -> dict[str, list[Sample]]:
    """The same samples for several operators of `aten`."""
    return {f"aten.{name}": list(samples) for name in names.split()}


def target_of(name: str) -> Any:
    """The operator, or the function of `autotp.rules.loss`, that a name in the table means."""
    homes = {"autotp.losses": losses, "autotp.experts": experts, "autotp.statistics": statistics, "autotp.lookups": lookups}
    home = homes.get(name.rpartition(".")[0])
    if home is not None:
        return getattr(home, name.rpartition(".")[2])
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


SAMPLES: dict[str, list[Sample]] = {}


def add(table: dict[str, list[Sample]]) -> None:
    """Join a table to `SAMPLES`; an operator may stand in several."""
    for name, found in table.items():
        SAMPLES.setdefault(name, []).extend(found)


def missing() -> list[str]:
    """Operators of the table without a sample."""
    return sorted(set(RULES) - set(SAMPLES))

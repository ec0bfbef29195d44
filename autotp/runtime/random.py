"""Random operators on a mesh: equal numbers where the tensor is replicated or partial, different ones where it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn


class SeedStream:
    """A sequence of seeds that is the same on every rank, because every rank draws one per random operator it reaches."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> int:
        """The next seed."""
        return int(torch.randint(2**62, (), generator=self._generator))

    def state(self) -> torch.Tensor:
        """Where the stream stands, as bytes that `resume` takes."""
        return self._generator.get_state()

    def resume(self, state: torch.Tensor) -> None:
        """Go on from where a stream stood."""
        self._generator.set_state(state)


class RandomCall(nn.Module):
    """Run a random operator under a seed of its own. `shard` numbers the piece of the output that this rank holds."""

    def __init__(self, target: Any, shard: int) -> None:
        super().__init__()
        self.target = target
        self.shard = shard
        self.stream = SeedStream()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator; the global random state stays as it was."""
        return self.drawn()(*args, **kwargs)

    def drawn(self) -> Callable[..., Any]:
        """The same with the seed drawn: whenever it is called with the same arguments, it gives the same."""
        return partial(self._sample, (self.stream.next() + self.shard) % 2**63)

    def _sample(self, seed: int, /, *args: Any, **kwargs: Any) -> Any:
        tensor = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
        generator = _generator(torch.device(kwargs.get("device") or (tensor.device if tensor is not None else "cpu")))
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return self.target(*args, **kwargs)
        finally:
            generator.set_state(state)

    def extra_repr(self) -> str:
        """The operator and the shard."""
        return f"{self.target}, shard {self.shard}"


def _generator(device: torch.device) -> torch.Generator:
    """The generator that operators on `device` draw from."""
    if device.type == "cpu":
        return torch.default_generator
    module: Any = torch.get_device_module(device)
    generator: torch.Generator = module.default_generators[module.current_device() if device.index is None else device.index]
    return generator


def seed_module(module: nn.Module, seed: int) -> None:
    """Give every random operator in `module` one common stream that starts at `seed`."""
    stream = SeedStream(seed)
    for child in module.modules():
        if isinstance(child, RandomCall):
            child.stream = stream


def random_state(graphs: Iterable[nn.Module], device: torch.device) -> dict[str, Any]:
    """Where this rank's default generators stand, of the CPU and of `device`, and the streams of all random operators in `graphs`."""
    generators = {kind: _generator(torch.device(kind)).get_state() for kind in {"cpu", device.type}}
    return {"generators": generators, "streams": [stream.state() for stream in _streams(graphs)]}


def resume_random(graphs: Iterable[nn.Module], states: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Go on from what `random_state` gave on every rank. On another number of ranks, rank r goes on from r modulo that number."""
    for kind, state in states[rank % len(states)]["generators"].items():
        if kind == "cpu" or torch.get_device_module(kind).is_available():
            _generator(torch.device(kind)).set_state(state)
    for stream, state in zip(_streams(graphs), states[0]["streams"], strict=False):
        stream.resume(state)


def _streams(graphs: Iterable[nn.Module]) -> list[SeedStream]:
    """Each stream once."""
    calls = (call for graph in graphs for call in graph.modules() if isinstance(call, RandomCall))
    return list({id(call.stream): call.stream for call in calls}.values())

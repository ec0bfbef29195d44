"""Random operators on a mesh: equal numbers where the tensor is replicated or partial, different ones where it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class SeedStream:
    """A sequence of seeds that is the same on every rank, because every rank draws one per random operator it reaches."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> int:
        """The next seed."""
        return int(torch.randint(2**62, (), generator=self._generator))

    @property
    def state(self) -> Tensor:
        """Where the stream stands: uint8, the same on every rank."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: Tensor) -> None:
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

    def _sample(self, seed: Any, /, *args: Any, **kwargs: Any) -> Any:
        generator = generator_of(device_of(args, kwargs))
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return self.target(*args, **kwargs)
        finally:
            generator.set_state(state)

    def extra_repr(self) -> str:
        """The operator and the shard."""
        return f"{self.target}, shard {self.shard}"


def device_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """Where an operator runs: on the device that is named, else on that of its first tensor."""
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    return torch.device(kwargs.get("device") or (tensor.device if tensor is not None else "cpu"))


def generator_of(device: torch.device) -> torch.Generator:
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


def share_stream(source: nn.Module, module: nn.Module) -> None:
    """Let the random operators of `module` take their seeds from the stream of those of `source`, if it has any."""
    stream = next((child.stream for child in source.modules() if isinstance(child, RandomCall)), SeedStream())
    for child in module.modules():
        if isinstance(child, RandomCall):
            child.stream = stream

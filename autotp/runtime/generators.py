"""Where the random generators of the ranks stand, for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autotp.runtime.random import RandomCall


def random_state(graphs: Iterable[nn.Module], device: torch.device) -> dict[str, Any]:
    """PyTorch's generators of this rank, of the CPU and of `device`, and the streams of all random operators in `graphs`."""
    found = {"cpu": torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        found[device.type] = torch.get_device_module(device).get_rng_state()
    return {"generators": found, "streams": [generator.get_state() for generator in _streams(graphs)]}


def resume_random(graphs: Iterable[nn.Module], states: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Go on from what `random_state` gave on every rank. On another number of ranks, rank r goes on from r modulo that number."""
    for kind, state in states[rank % len(states)]["generators"].items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif torch.get_device_module(kind).is_available():
            torch.get_device_module(kind).set_rng_state(state)
    for generator, state in zip(_streams(graphs), states[0]["streams"], strict=False):
        generator.set_state(state)


def _streams(graphs: Iterable[nn.Module]) -> list[torch.Generator]:
    """What random operators draw their seeds from, each once."""
    calls = (call for graph in graphs for call in graph.modules() if isinstance(call, RandomCall))
    return list({id(call.stream): call.stream._generator for call in calls}.values())

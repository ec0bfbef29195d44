"""Where the random generators of the ranks stand, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from autotp.errors import AutotpError
from autotp.runtime.module import ParallelModule


def random_state(module: nn.Module) -> dict[str, Any]:
    """PyTorch's generators of this rank, of the CPU and of the module's device, and the seeds of the parallel modules in it."""
    found = {"cpu": torch.get_rng_state()}
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type not in ("cpu", "meta"):
        found[device.type] = torch.get_device_module(device).get_rng_state()
    return {"generators": found, "seeds": [part.random_state().get("seeds") for part in _parts(module)]}


def resume_random(module: nn.Module, states: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Go on from what `random_state` gave on every rank. On another number of ranks, rank r goes on from r modulo that number."""
    for part, seeds in zip(_parts(module), states[0]["seeds"], strict=False):
        if seeds is not None:
            with suppress(AutotpError):  # it draws in another way now, or nothing
                part.set_random_state({"seeds": seeds})
    for kind, state in states[rank % len(states)]["generators"].items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif torch.get_device_module(kind).is_available():
            torch.get_device_module(kind).set_rng_state(state)


def _parts(module: nn.Module) -> list[ParallelModule]:
    return [part for part in module.modules() if isinstance(part, ParallelModule)]

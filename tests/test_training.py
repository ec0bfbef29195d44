"""Whole training runs with dropout beside one device: optimizers, clipping, accumulation, architectures, numbers of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp
from tests.models import Example, InFloat64, example, splitting_pays
from tests.ranks import run_ranks
from tests.test_api import loss_of
from tests.test_exact import MODELS

ARCHITECTURES = ("gpt2", "llama", "bert", "vit", "opt")
ADAFACTOR: dict[str, Any] = {"lr": 1e-2, "eps": (1e-5, 1e-3)}
"""By default it divides by gradients of 1e-16 too: those that are zero but for rounding, as of a key's bias, which nothing depends on."""
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=5e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, **ADAFACTOR),
}
STEPS = 10


def built(name: str) -> Example:
    return example("opt", dropout=0.3, attention_dropout=0.1) if name == "opt" else MODELS[name]()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adafactor" and isinstance(model, autotp.ParallelModule):
        return autotp.optimizer(torch.optim.Adafactor, model, **ADAFACTOR)
    made: torch.optim.Optimizer = OPTIMIZERS[name](model.parameters())
    return made


def trained(model: nn.Module, one: Example, optimizer: str, clip: bool, parts: int) -> list[Tensor]:
    """Losses of a run: `parts` micro-steps for each step, of other inputs."""
    torch.manual_seed(7)
    made, losses = optimizer_of(optimizer, model), []
    for step in range(STEPS):
        for part in range(parts):
            kwargs = {key: value.roll(step + 3 * part, 1 if value.ndim == 2 else 0) for key, value in one.kwargs.items()}
            last = part == parts - 1
            with nullcontext() if last or not isinstance(model, autotp.ParallelModule) else model.no_sync():
                loss = loss_of(model(**kwargs)) / parts
                loss.backward()
            losses.append(loss.detach())
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        made.step()
        made.zero_grad()
    return losses


def runs(name: str, combinations: Iterable[tuple[str, bool, int]], mesh: Any = None) -> None:
    """Every combination of optimizer, clipping and micro-steps, from the same start: losses, and parameters at the end."""
    with InFloat64():
        one = built(name)
        start = {key: value.clone() for key, value in one.model.state_dict().items()}
        many = autotp.parallelize(one.model, one.args, one.kwargs, mesh=mesh, cluster=splitting_pays(), randomness="exact")
        for optimizer, clip, parts in combinations:
            losses = []
            for model in (one.model, many):
                model.load_state_dict(start)
                losses.append(torch.stack(trained(model, one, optimizer, clip, parts)))
            worst = float((losses[0] - losses[1]).abs().max())
            after = many.full_state_dict()
            for key, value in one.model.state_dict().items():
                if value.is_floating_point():
                    worst = max(worst, float((after[key] - value).abs().max() / max(1.0, float(value.abs().max()))))
            if dist.get_rank() == 0:
                print(f"{dist.get_world_size()} ranks {name} {optimizer} clip {clip} accumulate {parts}: {worst:.1e}", flush=True)
            assert worst < 1e-9, (name, optimizer, clip, parts, worst)


def test_a_sample() -> None:
    run_ranks(runs, 2, "gpt2", [("adamw", True, 3), ("adafactor", True, 1)])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mesh"), [(2, None), (3, None), (4, None), (4, {"dp": 2, "tp": 2})])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_combination(name: str, ranks: int, mesh: Any) -> None:
    run_ranks(runs, ranks, name, list(product(OPTIMIZERS, (False, True), (1, 3))), mesh)

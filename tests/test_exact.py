"""Exact randomness: with the same seed, dropout on any mesh and under any plan is that of one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp
from autotp.equality import compare
from autotp.errors import AutotpError
from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.random_plans import random_plan, random_recomputed
from autotp.runtime.exact_random import ExactCall, Piece
from autotp.trace import trace
from tests.models import TOLERANCE, Example, InFloat64, example, splitting_pays
from tests.ranks import run_ranks
from tests.test_api import assert_close, full_gradient, loss_of


def vit() -> Example:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, image_size=16, patch_size=8,
        hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).double().train()
    return Example(model, (), {"pixel_values": torch.randn(3, 3, 16, 16).double(), "labels": torch.tensor([1, 4, 0])})


class Draws(nn.Module):
    """Every kind of random operator that can be split, numbers in another order of memory among them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 14), nn.Linear(14, 6)
        self.convolution = nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(torch.tanh(self.up(x)), 0.4)
        y = y + torch.rand_like(y) + torch.randn(y.shape[-1], dtype=y.dtype)
        y = self.down(y * torch.bernoulli(torch.full_like(y, 0.5), 0.7))
        y = nn.functional.dropout(y.transpose(1, 2), 0.2)
        y = nn.functional.dropout1d(self.convolution(y), 0.5)
        return nn.functional.alpha_dropout(y, 0.3, training=True) + torch.empty_like(y).uniform_(-1, 1)


def draws() -> Example:
    torch.manual_seed(0)
    return Example(Draws().double(), (torch.randn(3, 4, 6, dtype=torch.float64),), {})


MODELS: dict[str, Callable[[], Example]] = {
    "gpt2": lambda: example("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "gpt2-eager": lambda: example("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, attn_implementation="eager"),
    "bert": lambda: example("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3),
    "llama": lambda: example("llama", attention_dropout=0.3),
    "vit": vit,
    "draws": draws,
}


@cache
def traced(name: str) -> tuple[Example, Any]:
    with InFloat64():
        one = MODELS[name]()
        return one, trace(one.model, one.args, one.kwargs)


def fuzz(name: str, mesh: tuple[int, ...], seeds: range) -> None:
    one, program = traced(name)
    space, border = prepare(program, Request({f"axis{number}": size for number, size in enumerate(mesh)}))
    prices = ConversionPrices(load_cluster("dgx-h100"), mesh, True, traced_sizes(program))
    state = {**dict(one.model.named_parameters()), **dict(one.model.named_buffers())}
    for seed in seeds:
        decisions = random_plan(space, border, prices, seed)
        if seed % 2:
            decisions = random_recomputed(space, decisions, seed)
        torch.manual_seed(seed)
        with InFloat64():
            found = compare(space, decisions, state, one.args, one.kwargs, seed=seed, exact=True)
        assert found.worst < TOLERANCE, f"{name} on {mesh}, seed {seed}: {found.worst} at {found.where}"


@pytest.mark.parametrize(("name", "mesh"), [("gpt2", (2, 2)), ("bert", (3,)), ("vit", (2,)), ("draws", (3,)), ("draws", (2, 2))], ids=str)
def test_random_plans_drop_what_one_device_drops(name: str, mesh: tuple[int, ...]) -> None:
    fuzz(name, mesh, range(3))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2,), (3,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_many_random_plans_drop_what_one_device_drops(name: str, mesh: tuple[int, ...]) -> None:
    fuzz(name, mesh, range(100, 120))


def test_the_wrong_piece_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Piece.of
    monkeypatch.setattr(Piece, "of", lambda piece, *given: of(replace(piece, coordinate=(0,)), *given))
    with pytest.raises((AssertionError, RuntimeError)):  # other numbers, or another number of them
        fuzz("draws", (2,), range(4))


@pytest.mark.parametrize("name", ["gpt2", "vit", "draws"])
def test_the_trace_draws_what_the_model_draws(name: str) -> None:
    from autotp.interpret import run

    one, program = traced(name)
    results = []
    for call in (lambda: one.model(*one.args, **one.kwargs), lambda: run(program, state_of(one.model), one.args, one.kwargs)[0]):
        torch.manual_seed(3)
        with InFloat64():
            results.append((loss_of(call()), torch.rand(())))
    assert_close(results[1], results[0], name)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# ---- real ranks -----------------------------------------------------------------------------------------------------


def trains_like_one_device(name: str, mesh: Any = None, steps: int = 10, **options: Any) -> None:
    """AdamW steps: loss, all gradients and all parameters stay equal, and so does the generator."""
    one = MODELS[name]()
    torch.manual_seed(5)
    many = autotp.parallelize(
        one.model, one.args, one.kwargs, mesh=mesh, cluster=splitting_pays(), randomness="exact", **options
    )
    assert torch.initial_seed() == 5
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one.model, many)]
    states = [torch.get_rng_state()] * 2
    losses = []
    for step in range(steps):
        for which, model in enumerate((one.model, many)):
            torch.set_rng_state(states[which])
            losses.append(loss_of(model(*one.args, **one.kwargs)))
            losses[-1].backward()
            states[which] = torch.get_rng_state()
        assert_close(losses[-1], losses[-2], f"{name} loss, step {step}")
        assert torch.equal(*states)
        for (key, wanted), found in zip(one.model.named_parameters(), many.parameters(), strict=True):
            if wanted.grad is not None:
                assert_close(full_gradient(many, key, found), wanted.grad, f"{name} gradient of {key}, step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len({round(float(loss), 12) for loss in losses[::2]}) == steps
    after = many.full_state_dict()
    for key, wanted in one.model.state_dict().items():
        assert_close(after[key], wanted, f"{name} {key}")


def saved_and_out_of_step() -> None:
    """Random states are saved and set back; ranks whose generators part are told so."""
    for randomness, key in (("exact", "generator"), ("independent", "seeds")):
        one = draws()
        many = autotp.parallelize(one.model, one.args, cluster=splitting_pays(), randomness=randomness)
        many(*one.args)
        state = many.random_state()
        assert list(state) == [key]
        first, second = many(*one.args), many(*one.args)
        many.set_random_state(state)
        assert torch.equal(many(*one.args), first) and not torch.equal(first, second)
        with pytest.raises(AutotpError, match="with another `randomness`"):
            many.set_random_state({"other": state[key]})
    many = autotp.parallelize(one.model, one.args, cluster=splitting_pays(), randomness="exact")
    assert any(isinstance(child, ExactCall) and child.piece for child in many._sharded.graph.modules())
    torch.rand(1 + dist.get_rank())
    with pytest.raises(AutotpError, match="generators stand at different places"):
        many(*one.args)
    torch.manual_seed(0)
    many(*one.args)
    with pytest.raises(AutotpError, match="randomness is 'same'"):
        autotp.parallelize(one.model, one.args, randomness="same")


def in_float64(*checks: Any) -> None:
    with InFloat64():
        for check, *args in checks:
            check(*args)


def test_training_equals_one_device() -> None:
    run_ranks(in_float64, 2, (trains_like_one_device, "gpt2", None, 4), (saved_and_out_of_step,))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mesh"), [(2, None), (3, None), (4, None), (4, {"dp": 2, "tp": 2})])
def test_every_model_trains_like_one_device(ranks: int, mesh: Any) -> None:
    run_ranks(in_float64, ranks, *((trains_like_one_device, name, mesh) for name in MODELS))

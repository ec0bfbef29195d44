"""What training loops do besides steps: mixed precision, loss scaling, compilation, hooks, frozen parameters, adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp
from autotp._torch import local_of
from autotp.runtime.comm import ProcessComm
from tests.models import InFloat64, example, splitting_pays
from tests.ranks import run_ranks
from tests.test_api import assert_close, full_gradient


class LowRank(nn.Module):
    """Hu et al. 2021: a frozen layer beside a trained product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, rank, dtype=base.weight.dtype) / 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + 2.0 * (x @ self.down.T) @ self.up.T
        return result


def adapted() -> Any:
    """A Llama of which only the adapters of q, v and down are trained."""
    one = example("llama")
    one.model.requires_grad_(False)
    for layer in one.model.model.layers:  # type: ignore[union-attr]
        for owner, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "v_proj"), (layer.mlp, "down_proj")):
            setattr(owner, name, LowRank(getattr(owner, name)))
    return one


def same(one: nn.Module, many: autotp.ParallelModule, what: str, *, gradients: bool = True) -> None:
    for (name, wanted), mine in zip(one.named_parameters(), many.parameters(), strict=True):
        assert wanted.requires_grad is mine.requires_grad
        if gradients:
            assert (wanted.grad is None) is (mine.grad is None), f"{what}: {name}"
            if wanted.grad is not None:
                assert_close(full_gradient(many, name, mine), wanted.grad, f"{what}: gradient of {name}")
    state = many.full_state_dict()
    for name, value in one.state_dict().items():
        assert_close(state[name], value, f"{what}: {name}")


def steps(one: Any, many: autotp.ParallelModule, count: int, what: str) -> None:
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (one.model, many)]
    for _ in range(count):
        for model, optimizer in zip((one.model, many), optimizers, strict=True):
            optimizer.zero_grad()
            model(**one.kwargs).loss.backward()
            optimizer.step()
        same(one.model, many, what)


def adapters_and_freezing() -> None:
    """Frozen weights get no gradients, and none of their size is exchanged."""
    one = adapted()
    pins = {"*.gate_proj": "batch", "*.up_proj": "batch"}
    many = autotp.parallelize(one.model, one.args, one.kwargs, cluster=splitting_pays(), pins=pins)
    loss, sizes = many(**one.kwargs).loss, list[int]()

    def counted(exchange: Any) -> Any:
        def call(comm: ProcessComm, x: Tensor, *args: Any) -> Tensor:
            sizes.append(x.numel())
            result: Tensor = exchange(comm, x, *args)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
            patch.setattr(ProcessComm, name, counted(getattr(ProcessComm, name)))
        loss.backward()
    assert 0 < max(sizes) < 56 * 56  # activations of 30 tokens, and adapters
    steps(one, many, 3, "adapters")
    names = [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]
    for frozen in (True, False):
        for model in (one.model, many):
            dict(model.named_parameters())[names[0]].requires_grad_(not frozen)
            model.zero_grad()
        steps(one, many, 2, f"frozen {frozen}")


def hooks() -> None:
    """Hooks on the module see what those on a model see; those on parameters see whole gradients."""
    one = example("mlp")
    many = autotp.parallelize(one.model, one.args, cluster=splitting_pays())
    seen: dict[nn.Module, list[Any]] = {one.model: [], many: []}
    for model, found in seen.items():
        model.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        model.register_forward_hook(lambda _, args, output, found=found: found.append(output.detach().clone()))  # type: ignore[misc]
        model.register_full_backward_hook(lambda _, before, after, found=found: found.append(after[0].clone()))  # type: ignore[misc]
        next(model.parameters()).register_hook(lambda gradient: gradient * 3)
        model(*one.args).square().sum().backward()
    for wanted, found in zip(*seen.values(), strict=True):
        assert_close(found, wanted, "what a hook sees")
    assert len(seen[many]) == 2
    same(one.model, many, "hooks")


def loss_scaling() -> None:
    """An overflow on one rank skips the step on all; otherwise steps are those of one device."""
    one = example("mlp")
    many = autotp.parallelize(one.model, one.args, cluster=splitting_pays())
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)]
    models = (one.model, many)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    split = next(p for p in many.parameters() if p.to_local().shape != p.shape)  # type: ignore[attr-defined]
    for step in range(5):
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(model(*one.args).square().sum()).backward()
            if step == 2 and model is many and dist.get_rank() == 1:
                local_of(split.grad)[0] = float("inf")
            if step == 2 and model is one.model:
                next(model.parameters()).grad[0] = float("inf")  # type: ignore[index]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        same(one.model, many, f"scaled step {step}", gradients=step != 2)


def mixed_precision() -> None:
    """Under autocast the module computes in bfloat16 as the model does; parameters and gradients stay float32."""
    one = example("gpt2", dtype=torch.float32)
    many = autotp.parallelize(one.model, one.args, one.kwargs, cluster=splitting_pays())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (one.model, many)]
    losses: list[list[float]] = [[], []]
    for _ in range(6):
        for model, optimizer, found in zip((one.model, many), optimizers, losses, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**one.kwargs)
            assert output.logits.dtype is torch.bfloat16
            output.loss.backward()
            assert all(p.grad is None or p.grad.dtype is torch.float32 for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(output.loss.detach()))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-2)
    assert losses[1][-1] < losses[1][0]


def compiled() -> None:
    """One graph without breaks."""
    one = example("gpt2")
    many = autotp.parallelize(one.model, one.args, one.kwargs, cluster=splitting_pays())
    fast = torch.compile(many, backend="aot_eager", fullgraph=True)
    for model in (one.model, fast):
        model(**one.kwargs).loss.backward()
    for (name, wanted), mine in zip(one.model.named_parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(full_gradient(many, name, mine), wanted.grad, atol=1e-7, rtol=1e-6)  # the loss is in float32


def in_float64(*checks: Any) -> None:
    for check in checks:
        with InFloat64():
            check()


def test_adapters_and_hooks() -> None:
    run_ranks(in_float64, 2, adapters_and_freezing, hooks)


def plain(*checks: Any) -> None:
    for check in checks:
        check()


def test_mixed_precision_and_loss_scaling() -> None:
    run_ranks(plain, 2, mixed_precision, loss_scaling)


@pytest.mark.slow
def test_compiled() -> None:
    run_ranks(plain, 2, compiled)

"""Train and eval: one module with a graph for each, equal to one device in both, and planned only when it is needed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp
from autotp.errors import AutotpError
from tests.models import InFloat64, example, splitting_pays
from tests.ranks import run_ranks
from tests.test_api import assert_close, full_gradient, loss_of


class Normed(nn.Module):
    """Buffers that only training changes, dropout, and a head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.aside = nn.Linear(6, 14), nn.BatchNorm1d(14), nn.Linear(14, 6), nn.Linear(14, 3)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Any:
        hidden = self.drop(self.norm(self.up(x)).relu())
        result = self.down(hidden)
        return (result, self.aside(hidden)) if self.training else result


class OnlyTrains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and bool(x.sum() > 0):
            return x
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


def run_both(one: nn.Module, many: autotp.ParallelModule, args: Any, kwargs: Any, what: str, *, gradient: bool = True) -> None:
    """The same call on one device and in parallel, from one state of the generator: outputs, gradients, buffers."""
    results = []
    for model in (one, many):
        torch.manual_seed(11)
        with torch.set_grad_enabled(gradient):
            output = model(*args, **kwargs)
        output = output[0] + output[1].mean() if type(output) is tuple else output
        loss = loss_of(output)
        model.zero_grad()
        if gradient:
            loss.backward()
        results.append(loss)
    assert_close(results[1], results[0], what)
    for (name, wanted), mine in zip(one.named_parameters(), many.parameters(), strict=True):
        assert (wanted.grad is None) is (mine.grad is None), name
        if wanted.grad is not None:
            assert_close(full_gradient(many, name, mine), wanted.grad, f"{what}: gradient of {name}")
    state = many.full_state_dict()
    for name, value in one.state_dict().items():
        assert_close(state[name], value, f"{what}: {name}")


def both_modes() -> None:
    torch.manual_seed(0)
    normed, x = Normed().double(), torch.randn(8, 6, dtype=torch.float64)
    gpt2 = example("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    for one, args, kwargs in ((normed, (x,), {}), (gpt2.model, (), gpt2.kwargs)):
        for first in (True, False) if one is normed else (True,):
            one.train(first)
            flags = [module.training for module in one.modules()]
            many = autotp.parallelize(one, args, kwargs, cluster=splitting_pays(), randomness="exact")
            assert flags == [module.training for module in one.modules()] and many.training is first
            keys, optimizers = list(many.state_dict()), [torch.optim.SGD(m.parameters(), lr=0.01) for m in (one, many)]
            for training, gradient in ((True, True), (False, True), (True, True), (False, False), (True, True)):
                one.train(training)
                many.train(training)
                run_both(one, many, args, kwargs, f"{type(one).__name__} training {training}", gradient=gradient)
                for optimizer in optimizers:
                    optimizer.step()
            assert list(many.state_dict()) == keys and len(list(many.parameters())) == len(list(one.parameters()))
            copied = copy.deepcopy(many)
            one.eval()
            run_both(one, copied.eval(), args, kwargs, "a copy", gradient=False)
    resting = {spec.name: spec.layout for spec in many._sharded.state}
    assert any(layout.splits for layout in resting.values())


def split_buffers() -> None:
    """Running statistics that rest split, since the layer before them is."""
    torch.manual_seed(0)
    one, x = Normed().double(), torch.randn(8, 6, dtype=torch.float64)
    many = autotp.parallelize(one, (x,), cluster=splitting_pays(), pins={"up": "column"}, randomness="exact")
    assert next(spec for spec in many._sharded.state if spec.name == "norm.running_mean").layout.splits
    run_both(one, many, (x,), {}, "train")
    run_both(one.eval(), many.eval(), (x,), {}, "eval")
    run_both(one.train(), many.train(), (x,), {}, "train again")


def seeds_and_refusals() -> None:
    torch.manual_seed(dist.get_rank())
    one, x = OnlyTrains().double(), torch.randn(4, 6, dtype=torch.float64)
    dist.broadcast(x, 0)
    for parameter in one.parameters():
        dist.broadcast(parameter.data, 0)
    many = autotp.parallelize(one, (x,), cluster=splitting_pays())
    many(x)
    with pytest.raises(AutotpError, match="no graph for eval mode, since the model cannot be traced in it"):
        many.eval()(x)
    many.train()(x)
    served = autotp.parallelize(one, (x,), mode="inference", cluster=splitting_pays())
    with pytest.raises(AutotpError, match="call .train"):
        served.eval()(x)
    late = autotp.parallelize(nn.Sequential(one.layer, nn.Dropout(0.5)).eval(), (x,), cluster=splitting_pays())
    assert late.random_state() == {}
    late.train()
    late(x)
    state, first = late.random_state(), late(x)
    again = autotp.parallelize(nn.Sequential(one.layer, nn.Dropout(0.5)).eval(), (x,), cluster=splitting_pays()).train()
    again.set_random_state(state)
    assert torch.equal(again(x), first)


def all_of(*checks: Any) -> None:
    with InFloat64():
        for check in checks:
            check()


def test_both_modes_equal_one_device() -> None:
    run_ranks(all_of, 2, both_modes, split_buffers, seeds_and_refusals)

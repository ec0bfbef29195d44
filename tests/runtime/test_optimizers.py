"""Optimizers on pieces of parameters: equal to one device, by gathering, or refused by name before the first step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as hooks

import autotp
from autotp.errors import AutotpError
from autotp.runtime.optimizers import BesideOptimizer, acts_on_elements
from tests.models import TOLERANCE, splitting_pays
from tests.ranks import run_ranks

optim = torch.optim


class Lion(optim.Optimizer):
    """Chen et al. 2023: the sign of a momentum."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure, as many do not
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.add_((0.9 * momentum + 0.1 * parameter.grad).sign(), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 0.01)


class Lamb(optim.Optimizer):
    """You et al. 2020, as far as it matters: steps scaled by norms of whole tensors, after some steps of warm-up."""

    def __init__(self, params: Any, lr: float = 1e-3, warmup: int = 0) -> None:
        super().__init__(params, {"lr": lr, "warmup": warmup, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for parameter in group["params"]:
                trust = parameter.norm() / parameter.grad.norm() if group["count"] > group["warmup"] else 1.0
                parameter.sub_(group["lr"] * trust * parameter.grad)


class Stranger(optim.Optimizer):
    def __init__(self, params: Any, model: nn.Module) -> None:
        super().__init__(params, {})
        self.model = model


ELEMENTWISE: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "adam": lambda p: optim.Adam(p, lr=0.05, amsgrad=True, foreach=True),
    "adam-fused": lambda p: optim.Adam(p, lr=0.05, fused=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.05, maximize=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.05, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "adamax": lambda p: optim.Adamax(p, lr=0.05),
    "nadam": lambda p: optim.NAdam(p, lr=0.05),
    "radam": lambda p: optim.RAdam(p, lr=0.05),
    "asgd": lambda p: optim.ASGD(p, lr=0.05),
    "lion": lambda p: Lion(p, lr=0.05),
}


def whole(kind: Any, **options: Any) -> Callable[[Any, nn.Module], optim.Optimizer]:
    """The optimizer of a model, parallel or not."""

    def make(params: Any, model: nn.Module) -> optim.Optimizer:
        return autotp.optimizer(kind, model, params, **options) if isinstance(model, autotp.ParallelModule) else kind(params, **options)

    return make


WHOLE: dict[str, Callable[[Any, nn.Module], optim.Optimizer]] = {
    "adafactor": whole(optim.Adafactor, lr=0.05),
    "lamb": whole(Lamb, lr=0.05),
    "lbfgs": whole(optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
    "muon": whole(optim.Muon, lr=0.05),
    "adamw": whole(optim.AdamW, lr=0.05),
    "rprop": whole(optim.Rprop, lr=0.05),
    "sgd-fused": whole(optim.SGD, lr=0.05, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_ones_are_known_by_a_trial(name: str) -> None:
    made = ELEMENTWISE[name]([nn.Parameter(torch.ones(2, 3))])
    assert acts_on_elements(type(made), {**made.defaults, "lr": 0.0}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(optim.Adafactor, {}), (optim.Muon, {}), (optim.LBFGS, {}), (Lamb, {}), (Lamb, {"warmup": 9}), (Lamb, {"lr": 0.0})],
)
def test_others_are_found_out(kind: Any, options: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    assert not acts_on_elements(kind, options, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_tried_is_refused() -> None:
    with pytest.raises(AutotpError, match="Stranger cannot be tried on a small matrix"):
        acts_on_elements(Stranger, {}, torch.device("cpu"))


# ---- on ranks -------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(10, 14), nn.Tanh(), nn.LayerNorm(14), nn.Linear(14, 7, bias=False)
    return nn.Sequential(*layers).double()


X = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(found: Any, wanted: Any, what: str) -> None:
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def parallel(model: nn.Module) -> autotp.ParallelModule:
    return autotp.parallelize(model, (X,), cluster=splitting_pays(), check=False)


def same_steps(one: nn.Module, many: autotp.ParallelModule, make: Callable[[Any, nn.Module], optim.Optimizer], what: str) -> Any:
    """Five steps with a schedule and two groups, clipped; every parameter stays equal."""
    start = many.full_state_dict()
    one.load_state_dict(start)
    matrices_only = "muon" in what
    pairs = []
    for model in (one, many):
        named = [pair for pair in model.named_parameters() if pair[1].ndim == 2 or not matrices_only]
        groups: Any = [{"params": [p for n, p in named if n[0] == "0"]}, {"params": [p for n, p in named if n[0] != "0"], "lr": 0.02}]
        if "lbfgs" in what:
            groups = [p for _, p in named]
        pairs.append((model, made := make(groups, model), optim.lr_scheduler.LinearLR(made, 0.1, total_iters=3)))
    for step in range(5):
        for model, made, schedule in pairs:

            def closure(model: nn.Module = model, made: optim.Optimizer = made, to_none: bool = step % 2 == 1) -> Tensor:
                made.zero_grad(set_to_none=to_none)
                loss = (model(X) - X[:, :7]).square().sum()
                loss.backward()
                return loss

            if "lbfgs" in what:
                made.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                nn.utils.clip_grad_norm_(model.parameters(), 2.0)
                made.step()
            schedule.step()
        for name, value in many.full_state_dict().items():
            close(value, one.state_dict()[name], f"{what} {name}, step {step}")
    many.load_state_dict(start)
    return pairs[1][1]


def every_optimizer() -> None:
    one = network()
    many = parallel(one)
    assert many._in_pieces()
    for name, make in ELEMENTWISE.items():
        same_steps(one, many, lambda params, model, make=make: make(params), name)  # type: ignore[misc]
    for name, whole in WHOLE.items():
        made = same_steps(one, many, whole, name)
        assert isinstance(made, BesideOptimizer) is (name != "adamw")
        groups = [{**group, "params": list(group["params"])} for group in made.param_groups]
        other = whole(many.parameters() if name == "lbfgs" else groups, many)
        other.load_state_dict(made.state_dict())
        assert other.state_dict()["state"].keys() == made.state_dict()["state"].keys()
    for kind, why in ((optim.Adafactor, "looks at whole tensors, and ranks"), (Lamb, "looks at"), (optim.Rprop, "uses an operator")):
        before = many.full_state_dict()
        wrong = kind(many.parameters())
        many(X).sum().backward()
        with pytest.raises(AutotpError, match=rf"{kind.__name__} {why}.*autotp.optimizer\({kind.__name__}"):
            wrong.step()
        close(many.full_state_dict(), before, "refused")
    with pytest.raises(AutotpError, match="not one of this parallel module's"):
        autotp.optimizer(Lamb, many, one.parameters())
    norms(one, many)
    count = len(hooks._global_optimizer_pre_hooks)
    del many, wrong, made, other
    gc.collect()
    assert len(hooks._global_optimizer_pre_hooks) == count - 1


def norms(one: nn.Module, many: autotp.ParallelModule) -> None:
    """Norms and clipping are those of one device, whatever the norm; infinities are found on every rank."""
    one.load_state_dict(many.full_state_dict())
    for kind in (2.0, 1.0, 3.0, float("inf")):
        for foreach in (None, False, True):
            found = []
            for model in (one, many):
                model.zero_grad()
                model(X).square().sum().backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=kind, error_if_nonfinite=True, foreach=foreach)
                after = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], kind)
                found.append([n.full_tensor() if hasattr(n, "full_tensor") else n for n in (norm, after)])
            close(found[1], found[0], f"norm {kind} foreach {foreach}")
    for model in (one, many):
        model.zero_grad()
        model(X).square().sum().backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        assert all(p.grad is not None and p.grad.abs().max().item() <= 0.05 for p in model.parameters())
    many(X * float("inf")).sum().backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(many.parameters(), 0.1, error_if_nonfinite=True)
    many.zero_grad()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_optimizer_equals_one_device(ranks: int) -> None:
    run_ranks(every_optimizer, ranks)

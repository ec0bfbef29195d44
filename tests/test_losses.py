"""Losses as they are traced: equal to PyTorch's in every form, and right however they are split."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autotp.cleanup import named_state
from autotp.equality import compare
from autotp.interpret import run
from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.random_plans import random_plan
from autotp.trace import trace
from tests.models import TOLERANCE

CLASSES = 7
ROWS = torch.tensor([0, 6, -100, 3, 2])
MORE_ROWS = torch.tensor([[[0, 6, 5], [1, -100, 3]], [[2, 2, 4], [6, 0, 1]]])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


WEIGHT = random(CLASSES).abs()
SIGNS = random(5, CLASSES).sign()


class Head(nn.Module):
    """A projection to classes, and a loss of it. The classes are dim 1 of inputs with more than two dims."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, CLASSES, dtype=torch.float64)
        self.loss = loss

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        logits = self.linear(x)
        return self.loss(logits.movedim(-1, 1) if logits.dim() > 2 else logits, *args)


def forms() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Name → (loss, the inputs and the targets)."""
    rows, more, one = random(5, 6), random(2, 2, 3, 6), random(6)
    inputs = {
        "rows": (rows, ROWS),
        "dims": (more, MORE_ROWS),
        "one": (one, torch.tensor(3)),
        "probabilities": (rows, random(5, CLASSES).softmax(-1)),
        "probabilities of dims": (more, random(2, CLASSES, 2, 3).softmax(1)),
        "probabilities of one": (one, random(CLASSES).softmax(0)),
    }
    found: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {}
    for name, given in inputs.items():
        for reduction in ("mean", "sum", "none"):
            for smoothing in (0.0, 0.1):
                loss = partial(F.cross_entropy, reduction=reduction, label_smoothing=smoothing)
                found[f"{name}, {reduction}, {smoothing}"] = loss, given
                found[f"{name}, {reduction}, {smoothing}, weights"] = _weighted(loss), (*given, WEIGHT)
            if not name.startswith("probabilities"):
                dim = 0 if name == "one" else 1
                loss = partial(_nll, reduction=reduction, dim=dim)
                found[f"nll, {name}, {reduction}"] = loss, given
                found[f"nll, {name}, {reduction}, weights"] = _weighted(loss), (*given, WEIGHT)
    found["other ignored class"] = partial(F.cross_entropy, ignore_index=3), (rows, ROWS.clamp(min=0))
    found["nll of other scores"] = lambda y, t: F.nll_loss(y.sin(), t), (rows, ROWS)
    return found


def _weighted(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda y, t, w: loss(y, t, weight=w)


def _nll(logits: Tensor, target: Tensor, dim: int, **options: Any) -> Tensor:
    return F.nll_loss(logits.log_softmax(dim), target, **options)


OTHERS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "logsumexp": (lambda y: y.logsumexp(-1), (random(5, 6),)),
    "logsumexp of rows": (lambda y: y.logsumexp(0, keepdim=True), (random(5, 6),)),
    "logsumexp of everything": (lambda y: y.logsumexp((0, 1)), (random(5, 6),)),
    "log-probabilities": (lambda y, t: y.log_softmax(-1).gather(-1, t[:, None]), (random(5, 6), ROWS.clamp(min=0))),
    "log-probabilities of rows": (
        lambda y, t: y.log_softmax(0).gather(0, t),
        (random(5, 6), torch.arange(3 * CLASSES).view(3, CLASSES) % 5),
    ),
    "mse": (F.mse_loss, (random(5, 6), random(5, CLASSES))),
    "mse that broadcasts": (F.mse_loss, (random(5, 6), random(5, 1))),
    "sum of squares": (partial(F.mse_loss, reduction="sum"), (random(5, 6), random(5, CLASSES))),
    "l1": (F.l1_loss, (random(5, 6), random(5, CLASSES))),
    "smooth l1": (F.smooth_l1_loss, (random(5, 6), random(5, CLASSES))),
    "huber": (partial(F.huber_loss, delta=0.3), (random(5, 6), random(5, CLASSES))),
    "binary": (lambda y, t: F.binary_cross_entropy(y.sigmoid(), t), (random(5, 6), random(5, CLASSES).sigmoid())),
    "binary of logits": (lambda y, t, w: F.binary_cross_entropy_with_logits(y, t, pos_weight=w), (random(5, 6), SIGNS.relu(), WEIGHT)),
    "kl": (lambda y, t: F.kl_div(y.log_softmax(-1), t), (random(5, 6), random(5, CLASSES).softmax(-1))),
    "kl by batch": (
        lambda y, t: F.kl_div(y.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True),
        (random(5, 6), random(5, CLASSES)),
    ),
    "soft margin": (F.soft_margin_loss, (random(5, 6), SIGNS)),
    "cosine": (F.cosine_embedding_loss, (random(5, 6), random(5, CLASSES), SIGNS[:, 0])),
    "ranking": (F.margin_ranking_loss, (random(5, 6), random(5, CLASSES), SIGNS)),
    "hinge": (F.hinge_embedding_loss, (random(5, 6), SIGNS)),
    "multi margin": (F.multi_margin_loss, (random(5, 6), ROWS.clamp(min=0))),
    "multilabel margin": (F.multilabel_margin_loss, (random(5, 6), torch.tensor([[0, 2, -1, 0, 0, 0, 0]] * 5))),
    "multilabel soft margin": (F.multilabel_soft_margin_loss, (random(5, 6), SIGNS.relu())),
    "triplet": (F.triplet_margin_loss, (random(5, 6), random(5, CLASSES), 1 + random(5, CLASSES))),
    "poisson": (F.poisson_nll_loss, (random(5, 6), random(5, CLASSES).abs())),
    "cosine similarity": (lambda y, t: F.cosine_similarity(y, t).mean(), (random(5, 6), random(5, CLASSES))),
}

FORMS = forms() | OTHERS
PLANS = [(name, mesh) for name in sorted(FORMS) for mesh in ((3,), (2, 2)) if name in OTHERS or (mesh == (3,) and "none" not in name)]


@cache
def traced(name: str) -> tuple[Head, Any]:
    torch.manual_seed(0)
    loss, args = FORMS[name]
    model = Head(loss)
    return model, trace(model, args)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_traced_loss_is_pytorchs(name: str) -> None:
    """Value and gradients in float64; no loss is left that only runs whole."""
    (model, program), args = traced(name), FORMS[name][1]
    expected = model(*args)
    found = run(program, named_state(model)[1], args)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(expected)
    weights = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(found, weights, seed), torch.autograd.grad(expected, weights, seed), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    whole = {"aten.cross_entropy_loss.default", "aten.nll_loss_nd.default", "aten.logsumexp.default"}
    assert name == "logsumexp of everything" or whole.isdisjoint(node.op for node in program.nodes)


@pytest.mark.parametrize(("name", "mesh"), PLANS, ids=str)
def test_random_plans_of_a_loss(name: str, mesh: tuple[int, ...]) -> None:
    model, program = traced(name)
    space, border = prepare(program, Request({f"axis{number}": size for number, size in enumerate(mesh)}))
    prices = ConversionPrices(load_cluster("dgx-h100"), mesh, True, traced_sizes(program))
    for seed in range(3):
        found = compare(space, random_plan(space, border, prices, seed), named_state(model)[1], FORMS[name][1], {}, seed=seed)
        assert found.worst < TOLERANCE, f"{name} on {mesh}, seed {seed}: {found.worst} at {found.where}"


@pytest.mark.parametrize("name", ["rows, mean, 0.1, weights", "probabilities, mean, 0.1", "nll, rows, mean", "log-probabilities"])
def test_the_classes_of_a_loss_can_be_split(name: str) -> None:
    """No operator after the projection keeps the classes whole."""
    _, program = traced(name)
    space, _ = prepare(program, Request({"tp": 2}))
    linear = next(node for node in program.nodes if node.op == "aten.linear.default")
    reached = {linear.index}
    for node in program.nodes[linear.index + 1 :]:
        touched = [place for place, ref in enumerate(node.inputs) if ref.node in reached]
        if touched and program.type_of(node.inputs[touched[0]]).shape[-1:] == (CLASSES,):
            split = [
                option
                for option in space.strategies[node.index]
                if any(option.operands[place].split_at(len(program.type_of(node.inputs[place]).shape) - 1) for place in touched)
            ]
            assert split or node.op.startswith("aten.log_softmax"), node.op
            reached.add(node.index)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["rows, mean, 0.1", "dims, mean, 0.1", "probabilities, mean, 0.1", "nll, rows, mean", "mse"])
def test_a_loss_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """As close to float64 as PyTorch's own operator in 16 bits, and of its dtype."""
    loss, args = FORMS[name]
    model = Head(loss).to(dtype)
    args = tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)
    exact = model.double()(*(arg.double() if arg.is_floating_point() else arg for arg in args))
    model = model.to(dtype)
    found = run(trace(model, args), named_state(model)[1], args)[0]
    assert found.dtype == dtype
    assert abs(found.double() - exact) <= 2 * abs(model(*args).double() - exact) + torch.finfo(dtype).eps * exact.abs() * 2


def test_a_target_out_of_bounds_is_refused() -> None:
    model, x = Head(F.cross_entropy), random(5, 6)
    program = trace(model, (x, ROWS))
    with pytest.raises(Exception, match="out of bounds"):
        run(program, named_state(model)[1], (x, torch.full((5,), CLASSES)))

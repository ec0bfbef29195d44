"""What users of PyTorch write, traced: equal to PyTorch at the traced sizes and at others, and of operators that have rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autotp.cleanup import named_state
from autotp.composites import COMPOSITES
from autotp.equality import compare
from autotp.interpret import run
from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.random_plans import random_plan
from autotp.rules import call_of, rule_of
from autotp.trace import trace
from tests.models import TOLERANCE


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


class Function(nn.Module):
    """A projection and a function of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 6, dtype=torch.float64)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


def overwritten(y: Tensor) -> Tensor:
    z = y * 1
    z[z > 0] = 0.5
    z[:, 1:3] = y[:, :2]
    z[:, 0] = 2.0
    z[0] = y[1]
    return z


def picked(y: Tensor) -> Tensor:
    index = y.detach().argmax(-1)
    return torch.take_along_dim(y, index[:, None], 1) + y[torch.arange(len(y)), index][:, None]


def added(y: Tensor) -> Tensor:
    rows = y.detach().argmax(-1)
    return y.new_zeros(6, 6).index_add(0, rows, y) + y.new_zeros(6, 6).index_put((rows,), y, accumulate=True)


def scattered(y: Tensor) -> Tensor:
    best = y.topk(2, -1)
    zeros = torch.zeros_like(y)
    written = zeros.scatter(1, best.indices, best.values) + zeros.scatter(1, best.indices, 0.0)
    return written + zeros.scatter_add(1, best.indices, best.values)


def merged(y: Tensor) -> Tensor:
    mask = (y.detach().sum(-1) > 0).unsqueeze(-1).expand_as(y)
    return y.masked_scatter(mask, y * 2)


def bags(y: Tensor) -> Tensor:
    ids = y.detach().argmax(-1)[:, None].expand(-1, 3)
    return F.embedding_bag(ids, y[:1].T @ y[:1], mode="sum") + F.embedding_bag(ids, y[:1].T @ y[:1], mode="mean")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "differences": lambda y: torch.diff(y, dim=0).sum() + torch.trapz(y, dim=1),
    "distances": lambda y: torch.cdist(y, y * 2) + F.pairwise_distance(y, y.flip(1))[:, None],
    "norms": lambda y: y.norm() + y.norm(dim=1) + torch.linalg.norm(y, dim=-1) + y.norm(1, 1, True).sum(),
    "normalized": lambda y: F.normalize(y) + F.cosine_similarity(y, y.flip(1))[:, None],
    "statistics": lambda y: torch.std_mean(y, 1)[0] + torch.var_mean(y, 0)[1].sum() + y.amax() + y.max() - y.min(),
    "quantiles": lambda y: y.quantile(0.3, 1) + y.median(1).values + y.kthvalue(2, 1).values,
    "products": lambda y: torch.tensordot(y, y, ([1], [1])) + torch.inner(y, y) + torch.linalg.multi_dot([y, y.T, y, y.T]),
    "kronecker": lambda y: torch.kron(y, y[:2, :2]).sum(0) + torch.linalg.vecdot(y, y).sum(),
    "stacked": lambda y: torch.hstack([y, y * 2]) + torch.column_stack([y, y * 3]) + torch.vstack([y, y]).mean(),
    "turned": lambda y: y.fliplr() + y.mT.swapaxes(0, 1) + torch.tile(y, (1, 1)) + y.moveaxis(0, 1).T,
    "grids": lambda y: sum(torch.meshgrid(y[:, 0], y[0], indexing="ij")) + torch.diag_embed(y).diagonal(dim1=1, dim2=2),
    "gradients": lambda y: torch.gradient(y, dim=1)[0] + y.clip(-1, 1) + y.float_power(2) + y.square(),
    "frequencies": lambda y: torch.fft.irfft(torch.fft.rfft(y, dim=1), n=6, dim=1) + torch.fft.fft(y, dim=1).real,
    "cumulated": lambda y: y.cummax(1).values + y.cumsum(0) + y.logcumsumexp(1) + torch.cumulative_trapezoid(y, dim=1).sum(),
    "truth": lambda y: y * ((y > 0).any() & (y < 9).all()) * torch.isfinite(y) * torch.isclose(y, y),
    "new tensors": lambda y: y * y.new_ones(6) + torch.full_like(y, 2.0) + torch.zeros_like(y) + y.new_full((1,), 3.0) + y.new_zeros(1),
    "elementwise": lambda y: torch.logaddexp(y, y) + torch.hypot(y, y) + y.sinc() + torch.xlogy(y, y.abs()) + y.lerp(y.abs(), 0.3),
    "complex": lambda y: torch.view_as_real(torch.complex(y, y).conj() * torch.polar(y.abs(), y)).sum(-1),
    "one hot": lambda y: F.one_hot(y.detach().argmax(-1), 6) * y,
    "searched": lambda y: y * torch.bucketize(y.detach(), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)),
    "overwritten": overwritten,
    "picked": picked,
    "added": added,
    "scattered": scattered,
    "merged": merged,
    "bags": bags,
}

PROGRAMS: dict[str, Any] = {}


def traced(name: str) -> Any:
    if name not in PROGRAMS:
        torch.manual_seed(0)
        model = Function(FUNCTIONS[name])
        PROGRAMS[name] = model, trace(model, (random(4, 5),))
    return PROGRAMS[name]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_what_is_written_out_is_equal(name: str) -> None:
    model, program = traced(name)
    assert not any(node.target in COMPOSITES for node in program.nodes)
    without = {node.op for node in program.nodes if node.kind == "op" and node.inputs and rule_of(call_of(node, program.type_of)) is None}
    assert not without
    for rows in (4, 7) if program.symbols else (4,):
        x = random(rows, 5)
        expected, found = model(x), run(program, named_state(model)[1], (x,))[0]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        seed, weights = torch.randn_like(expected), list(model.parameters())
        theirs = torch.autograd.grad(expected, weights, seed)
        for mine, other in zip(torch.autograd.grad(found, weights, seed), theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_random_plans_of_what_is_written_out(name: str, mesh: tuple[int, ...]) -> None:
    model, program = traced(name)
    space, border = prepare(program, Request({f"axis{number}": size for number, size in enumerate(mesh)}))
    prices = ConversionPrices(load_cluster("dgx-h100"), mesh, True, traced_sizes(program))
    for seed in range(5):
        found = compare(space, random_plan(space, border, prices, seed), named_state(model)[1], (random(4, 5),), {}, seed=seed)
        assert found.worst < TOLERANCE, f"{name} on {mesh}, seed {seed}: {found.worst} at {found.where}"


def test_a_new_tensor_depends_on_nothing() -> None:
    """Zeros shaped like a tensor neither wait for it nor want its layout."""
    _, program = traced("new tensors")
    made = [node for node in program.nodes if node.op == "aten.full.default"]
    assert len(made) == 5 and not any(node.inputs for node in made)

"""Splits that must come out of the rules alone: queries of attention, slices of fused weights, units of recurrent cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp.equality import compare
from autotp.planning import Request, adopt, make_plan, prepare, traced_sizes
from autotp.plans import Plan
from autotp.price.cluster import Cluster, load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.random_plans import random_plan
from autotp.rules.attention import causal_attention_of_rows
from autotp.trace import trace
from autotp.verify import cluster_where_splitting_pays

SIZE = 24


def small_device() -> Cluster:
    """Accelerators so slow that splitting pays, of one unit each, which half of a small attention fills too."""
    cluster = cluster_where_splitting_pays(load_cluster("dgx-h100"))
    device = cluster.accelerator
    return replace(cluster, accelerator=replace(device, gemm=replace(device.gemm, units=1)))


CLUSTER = small_device()


class OneHead(nn.Module):
    """Attention of one head: neither heads nor a batch of 1 can be split, the queries can."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


class Sliced(nn.Module):
    """A projection fused of gate and up halves, or of q, k and v, taken apart by slicing."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.fused = nn.Linear(SIZE, parts * SIZE)
        self.down = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused(x)
        found = functional.silu(fused[..., :SIZE])
        for part in range(1, self.parts):
            found = found * fused[..., part * SIZE : (part + 1) * SIZE]
        out: Tensor = self.down(found)
        return out


class Steps(nn.Module):
    """Cells unrolled over three time steps."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = cell(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return state[0] if isinstance(state, tuple) else state


class Recurrent(nn.Module):
    """A recurrent layer between two linears."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = layer(SIZE, SIZE, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(x)[0])
        return out


class Mapped(nn.Module):
    """`torch.vmap` over the rows of a linear's output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.vmap(lambda row: row.softmax(-1) * row.sum(0))(self.linear(x))
        return out


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return functional.scaled_dot_product_attention(q, k, v, mask)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[-2], k.shape[-2]), float("-inf"), dtype=q.dtype).triu(1)
    return (0.3 * q @ k.mT + mask).softmax(-1) @ v


def plan_and_compare(model: nn.Module, args: tuple[Tensor, ...], ranks: int, **pins: str) -> Plan:
    """The plan where splitting pays, after it and some random plans have been found equal to one device."""
    model.double()
    program = trace(model, args)
    request = Request({"tp": ranks}, pins=pins)
    plan = make_plan(program, request, CLUSTER, "model")
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    space, decisions = adopt(program, request, plan)
    assert compare(space, decisions, state, args, {}).worst < 1e-9
    space, border = prepare(program, request)
    prices = ConversionPrices(CLUSTER, request.mesh, True, traced_sizes(program))
    for seed in range(8):
        found = compare(space, random_plan(space, border, prices, seed), state, args, {}, seed=seed)
        assert found.worst < 1e-9, found.where
    return plan


def operands(queries: int, keys: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (1, 1, queries, 8), (1, 1, keys, 8), (1, 1, keys, 8)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("attend", [causal, masked, explicit])
def test_queries_of_attention_are_split(attend: Callable[[Tensor, Tensor, Tensor], Tensor], ranks: int) -> None:
    """Context parallelism: each rank holds some queries and all keys."""
    plan = plan_and_compare(OneHead(attend), operands(128, 128), ranks)
    work = next(node for node in plan.nodes if node.op in ("aten.scaled_dot_product_attention.default", "aten.softmax.int"))
    split = [name for name in work.key if name in ("s", "d2")]  # of the fused operator, of the softmax
    assert split == list(work.key), work


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_of_a_fused_projection_stay_split(parts: int, ranks: int) -> None:
    x = torch.randn(5, SIZE, dtype=torch.float64)
    plan = plan_and_compare(Sliced(parts), (x,), ranks, fused="column", down="row")
    assert {node.strategy for node in plan.nodes if node.op == "aten.slice.Tensor"} == {"column"}
    assert plan.collectives["forward"] == {"all_reduce": 1}


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_units_of_cells(cell: type[nn.RNNCellBase]) -> None:
    plan_and_compare(Steps(cell), (torch.randn(5, 3, SIZE, dtype=torch.float64),), 3)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_batch_of_recurrent_layers(layer: type[nn.RNNBase]) -> None:
    plan_and_compare(Recurrent(layer), (torch.randn(5, 3, SIZE, dtype=torch.float64),), 2)


def test_vmap_leaves_ordinary_operators() -> None:
    plan_and_compare(Mapped(), (torch.randn(5, 3, SIZE, dtype=torch.float64),), 2)


def test_a_trace_leaves_the_compiler_as_it_was() -> None:
    trace(nn.Linear(3, 3), (torch.ones(2, 3),))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + 1 if torch.compiler.is_compiling() else x, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, 5), (4, 8)])
def test_attention_of_rows_compiles_into_one_graph(start: int, stop: int, dynamic: bool) -> None:
    q, k, v = operands(8, 6)
    expected = causal(q, k, v)[..., start:stop, :]
    torch.compiler.reset()
    compiled = torch.compile(causal_attention_of_rows, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found = compiled(q[..., start:stop, :], k, v, start)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(output.square().sum(), (q, k, v)) for output in (found, expected))
    for mine, want in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, want)

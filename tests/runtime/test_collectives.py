"""The same conversions between Gloo processes as on virtual ranks, and what autograd and debug tools see of them."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from autotp.definitions import coordinates, gradient_layout, scatter
from autotp.errors import AutotpError
from autotp.layouts import (
    COLLECTIVES,
    Cut,
    Layout,
    Move,
    Segment,
    Split,
    all_layouts,
    moves_from,
    plain_cut,
    uniform,
)
from autotp.runtime.collectives import Bucket, Convert, bind
from autotp.runtime.comm import ProcessComm
from autotp.sharded import Sharded
from autotp.simulate import Simulation

Mesh = tuple[int, ...]
CUTS: list[list[Cut]] = [[plain_cut(5)], [plain_cut(12), (Segment(2, 3, 1), Segment(1, 3, 2))], [plain_cut(8)]]
SHAPE = (5, 12, 8)
INVARIANT, REPLICATE, PARTIAL = (uniform(kind, 1) for kind in "IRP")


def sharded(dim: int, size: Any) -> Layout:
    return Layout(("S",), (Split(dim, (0,), plain_cut(size)),))


# ---- between processes ----------------------------------------------------------------------------------------------


def in_processes(count: int, body: Callable[[int, int], None], path: Path) -> None:
    """Run `body(rank, count)` in `count` processes of one Gloo group."""
    torch.multiprocessing.spawn(_process, (count, body, str(path / "store")), nprocs=count)


def _process(rank: int, count: int, body: Callable[[int, int], None], store: str) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    try:
        body(rank, count)
    finally:
        dist.destroy_process_group()


def some_moves(mesh: Mesh) -> Iterator[Move]:
    """Every move on one axis; on two axes, every kind of move of every axis once or twice."""
    if len(mesh) == 1:
        for layout in all_layouts(CUTS, 1, "IRPS"):
            yield from moves_from(layout, CUTS, True)
        return
    seen: dict[tuple[int, tuple[str, str]], int] = {}
    for layout in all_layouts(CUTS, 2, "SIRP")[::-1]:
        for move in moves_from(layout, CUTS, True):
            key = move.axis, move.kinds
            seen[key] = seen.get(key, 0) + 1
            if seen[key] % 40 == 1:
                yield move


def converted(modules: list[Convert], xs: list[Tensor], seeds: list[Tensor]) -> tuple[list[Tensor], list[Tensor], int]:
    """What virtual ranks make of it: outputs, gradients, and the number of collectives."""
    ranks = []
    for module in modules:
        graph = torch.fx.Graph()
        graph.output((graph.call_module("convert", (graph.placeholder("x"),)),))
        root = nn.Module()
        root.convert = module
        program = torch.fx.GraphModule(root, graph)
        ranks.append(Sharded(program, (), (), (), (), module.mesh, module.coordinate, None, None, (), {}, {}))
    simulation = Simulation(ranks)
    leaves = [x.clone().requires_grad_() for x in xs]
    outputs = [output for (output,) in simulation.forward([[]] * len(xs), [[x] for x in leaves])]
    torch.autograd.backward(outputs, seeds)
    return (
        [output.detach() for output in outputs],
        [x.grad for x in leaves if x.grad is not None],
        len(simulation.records),
    )


def every_move(rank: int, count: int) -> None:
    for mesh in ((2,),) if count == 2 else ((4,), (2, 2)):
        comm = ProcessComm(init_device_mesh("cpu", mesh))
        places = coordinates(mesh)
        random = torch.Generator().manual_seed(0)
        full, seed = torch.randn(2, *SHAPE, generator=random, dtype=torch.float64)
        for move in some_moves(mesh):
            xs = [scatter(full, move.source, mesh, at, random) for at in places]
            seeds = [scatter(seed, gradient_layout(move.target), mesh, at, random) for at in places]
            modules = [Convert((move,), mesh, at) for at in places]
            outputs, gradients, counted = converted(modules, xs, seeds)
            bind(modules[rank], comm)
            # a leaf that is not contiguous, as most views in a model
            x = xs[rank].movedim(0, -1).contiguous().movedim(-1, 0).detach().requires_grad_()
            before = x.detach().clone()
            with CommDebugMode() as mode:
                output = modules[rank](x)
                output.backward(seeds[rank])
            torch.testing.assert_close(output.detach(), outputs[rank], rtol=0, atol=1e-12, msg=str(modules[rank]))
            torch.testing.assert_close(x.grad, gradients[rank], rtol=0, atol=1e-12, msg=str(modules[rank]))
            assert torch.equal(x, before)
            assert mode.get_total_counts() == counted, str(modules[rank])
    if count == 2:
        each_dtype(rank, comm)
        counted_by_kind(rank, comm)
        merged(rank, comm)
        compiled(rank, comm)


def each_dtype(rank: int, comm: ProcessComm) -> None:
    """Every collective in every dtype of PyTorch that a model is likely to use, and the empty tensor."""
    ones, wait = torch.ones(4, 2), comm.wait
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.complex64):
        x = (ones * (rank + 1)).to(dtype)
        assert torch.equal(wait(comm.all_reduce(x, 0, "sum")), (ones * 3).to(dtype))
        assert torch.equal(wait(comm.reduce_scatter(x, 0)), (ones[:2] * 3).to(dtype))
        if not dtype.is_complex:
            assert torch.equal(wait(comm.all_reduce(x, 0, "max")), (ones * 2).to(dtype))
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn):
        pair = [(torch.arange(4.0) >= 2 * member).to(dtype)[:, None] for member in range(2)]
        same(wait(comm.all_gather(pair[rank], 0)), pair)
        received = wait(comm.all_to_all(pair[rank], 0, (3, 1), ((3, 3), (1, 1))[rank]))
        same(received, [one[:3] if rank == 0 else one[3:] for one in pair])
    assert wait(comm.all_reduce(torch.empty(0, 3), 0, "sum")).shape == (0, 3)


def same(found: Tensor, parts: list[Tensor]) -> None:
    assert found.dtype == parts[0].dtype
    assert found.tolist() == [row for part in parts for row in part.tolist()]


def counted_by_kind(rank: int, comm: ProcessComm) -> None:
    """Each primitive is the collective of its name, and one only."""
    for move in (
        Move(0, PARTIAL, REPLICATE),
        Move(0, sharded(0, 4), REPLICATE),
        Move(0, PARTIAL, sharded(1, 5)),
        Move(0, sharded(0, 4), sharded(1, 5)),
    ):
        module = Convert((move,), (2,), (rank,))
        bind(module, comm)
        shape = [2 if move.kinds[0] == "S" else 4, 5]
        with CommDebugMode() as mode:
            module(torch.ones(shape)).sum()
        (packet,) = mode.get_comm_counts()
        assert str(packet).split(".")[-1].startswith(move.forward) and mode.get_total_counts() == 1


def merged(rank: int, comm: ProcessComm) -> None:
    """A bucket sums each dtype's gradients in one all-reduce."""
    bucket = Bucket((Move(0, INVARIANT, REPLICATE),), 3)
    bind(bucket, comm)
    tensors = [torch.ones(2, 3, requires_grad=True), torch.ones(4, requires_grad=True), torch.ones(1)]
    tensors.append(torch.ones(2, dtype=torch.bfloat16, requires_grad=True))
    a, b, _, _ = bucket(*tensors)
    with CommDebugMode() as mode:
        ((a * (rank + 1)).sum() + (b[0] * 2 * rank)).backward()
    assert mode.get_total_counts() == 2
    assert torch.equal(tensors[0].grad, torch.full((2, 3), 3.0))
    assert torch.equal(tensors[1].grad, torch.tensor([2.0, 0, 0, 0]))
    assert tensors[2].grad is None and torch.equal(tensors[3].grad, torch.zeros(2, dtype=torch.bfloat16))


class Model(nn.Module):
    """All five kinds of conversion in a row, uneven, with a size that changes."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        rows = sympy.Symbol("rows", integer=True, positive=True)

        def convert(source: Layout, target: Layout) -> Convert:
            return Convert((Move(0, source, target),), (2,), (rank,), (rows,))

        self.rank = rank
        self.weight, self.bias = nn.Parameter(torch.linspace(0, 1, 7)), nn.Parameter(torch.ones(1))
        self.bucket = Bucket((Move(0, INVARIANT, REPLICATE),), 2)
        self.enter, self.reduce = convert(INVARIANT, REPLICATE), convert(PARTIAL, INVARIANT)
        self.slice, self.swap = convert(INVARIANT, sharded(1, 7)), convert(sharded(1, 7), sharded(0, rows))
        self.gather, self.scatter = convert(sharded(0, rows), REPLICATE), convert(PARTIAL, sharded(1, 7))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        weight, bias = self.bucket(self.weight, self.bias)
        y = self.reduce(self.enter(x, rows) * (self.rank + 1) + bias, rows)
        y = self.swap(self.slice(y, rows).sin(), rows)
        y = self.gather(y * y, rows)
        return self.scatter(y * weight, rows)


def compiled(rank: int, comm: ProcessComm) -> None:
    """The whole model is one graph for torch.compile, whether a conversion has run before or not."""
    model = Model(rank)
    bind(model, comm)
    program = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)

    def results(function: Callable[[Tensor], Tensor], rows: int) -> list[Tensor]:
        model.zero_grad()
        x = torch.linspace(0, 2, rows * 7).view(rows, 7).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        return [y.detach(), *(t.grad.clone() for t in (x, model.weight, model.bias) if t.grad is not None)]

    for rows in (5, 8):
        found, wanted = results(program, rows), results(model, rows)
        assert len(found) == len(wanted) == 4
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_agree_with_virtual_ranks(count: int, tmp_path: Path) -> None:
    in_processes(count, every_move, tmp_path)


# ---- in one process -------------------------------------------------------------------------------------------------


def test_what_a_conversion_is_called() -> None:
    assert Convert((Move(0, sharded(1, 4), REPLICATE),), (2,), (0,)).extra_repr() == (
        "all_gather over axis 0: S(1) → R, backward reduce_scatter"
    )
    assert Convert((Move(0, sharded(1, 4), REPLICATE),), (2,), (0,), gradient=False).extra_repr() == (
        "all_gather over axis 0: S(1) → R"
    )
    assert (
        repr(Bucket((Move(0, INVARIANT, REPLICATE),), 2))
        == "Bucket(2 tensors, none over axis 0: I → R, backward all_reduce)"
    )


def test_nothing_to_do_costs_nothing() -> None:
    """Without gradient I → R is the tensor itself; with it, one autograd node."""
    x = torch.ones(3, requires_grad=True)
    enter = Convert((Move(0, INVARIANT, REPLICATE),), (2,), (0,))
    with torch.no_grad():
        assert enter(x) is x
    assert enter(x.detach()).grad_fn is None and enter(x).grad_fn is not None
    assert Convert((Move(0, INVARIANT, REPLICATE),), (1,), (0,))(x) is x
    assert not Convert((Move(0, INVARIANT, REPLICATE),), (2,), (0,), gradient=False)(x).requires_grad


def test_local_moves_need_no_processes() -> None:
    x = torch.arange(5.0).requires_grad_()
    y = Convert((Move(0, REPLICATE, sharded(0, 5)),), (2,), (1,))(x)
    assert torch.equal(y, torch.tensor([3.0, 4.0]))
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 0, 0, 1, 1]))
    with pytest.raises(AutotpError, match="all_reduce was called on a module without process groups"):
        Convert((Move(0, PARTIAL, INVARIANT),), (2,), (1,))(x)


def test_a_mask_that_keeps_is_no_autograd_node() -> None:
    x = torch.ones(3, requires_grad=True)
    kept, dropped = (Convert((Move(0, INVARIANT, PARTIAL),), (2,), (rank,))(x) for rank in range(2))
    assert kept is x and torch.equal(dropped, torch.zeros(3))
    dropped.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_second_derivatives_are_refused() -> None:
    x = torch.ones(4, requires_grad=True)
    y = Convert((Move(0, REPLICATE, sharded(0, 4)),), (2,), (0,))(x)
    with pytest.raises(AutotpError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_first_dim_is_not_copied() -> None:
    """Slices, gathers and scatters of equal pieces along dim 0 are plain views for the exchange."""
    x = torch.ones(4, 3)
    for move in (Move(0, sharded(0, 8), REPLICATE), Move(0, PARTIAL, sharded(0, 4)), Move(0, INVARIANT, sharded(0, 4))):
        (step,), _ = Convert((move,), (2,), (0,)).steps((), x.device)
        sent = step.prepare(x)
        assert sent.data_ptr() == x.data_ptr() and step.finish(sent).data_ptr() == x.data_ptr()


def test_modules_can_be_copied() -> None:
    module = nn.Sequential(
        Convert((Move(0, REPLICATE, sharded(0, 4)),), (2,), (0,)), Bucket((Move(0, INVARIANT, REPLICATE),), 1)
    )
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module) and torch.equal(other[0](torch.ones(4)), torch.ones(2))


def test_moves_that_communicate() -> None:
    """The names of COLLECTIVES are those that the runtime exchanges for."""
    for move in some_moves((2,)):
        forward, backward = Convert((move,), (2,), (0,)).steps((), torch.device("cpu"))
        names = [step.name for step in (*forward, *backward)]
        assert set(names) <= {*COLLECTIVES, "slice", "pad", "mask"} and "none" not in names

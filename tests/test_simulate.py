"""Every move, judged by the layouts' definitions on virtual ranks; and the interpreter on small hand-made graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from autotp.definitions import coordinates, gather, gather_gradient, gradient_layout, scatter
from autotp.errors import AutotpError
from autotp.layouts import (
    COLLECTIVES,
    MOVES,
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
from autotp.program import TensorType
from autotp.runtime.collectives import Bucket, Convert
from autotp.sharded import BorderSpec, Sharded, StateSpec
from autotp.simulate import Record, Simulation

Mesh = tuple[int, ...]
Build = Callable[[tuple[int, ...]], tuple[dict[str, nn.Module], Callable[[torch.fx.Graph], Any]]]


def sharded(mesh: Mesh, coordinate: tuple[int, ...], modules: dict[str, nn.Module], graph: torch.fx.Graph) -> Sharded:
    """One rank of a hand-made program."""
    root = nn.Module()
    for name, module in modules.items():
        root.add_module(name, module)
    kind = TensorType((), (), torch.float64, True)
    places = [node.name for node in graph.nodes if node.op == "placeholder"]
    state = tuple(StateSpec(n, "parameter", kind, uniform("I", len(mesh))) for n in places if n.startswith("w"))
    inputs = tuple(BorderSpec(n, i, kind, uniform("I", len(mesh))) for i, n in enumerate(places) if n[0] != "w")
    return Sharded(torch.fx.GraphModule(root, graph), state, inputs, (), (), mesh, coordinate, None, None, (), {}, {})


def converter(path: tuple[Move, ...], mesh: Mesh, gradient: bool = True) -> Simulation:
    """A program that is one conversion."""
    ranks = []
    for coordinate in coordinates(mesh):
        graph = torch.fx.Graph()
        graph.output((graph.call_module("convert", (graph.placeholder("x"),)),))
        ranks.append(sharded(mesh, coordinate, {"convert": Convert(path, mesh, coordinate, (), gradient)}, graph))
    return Simulation(ranks)


def convert(path: tuple[Move, ...], mesh: Mesh, full: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, list[Record]]:
    """The value after `path`, and the gradient before it, put together by the definitions."""
    source, target = path[0].source, path[-1].target
    random = torch.Generator().manual_seed(5)
    xs = [scatter(full, source, mesh, at, random).requires_grad_() for at in coordinates(mesh)]
    before = [x.detach().clone() for x in xs]
    simulation = converter(path, mesh)
    outputs = [output for (output,) in simulation.forward([[]] * len(xs), [[x] for x in xs])]
    seeds = [scatter(seed, gradient_layout(target), mesh, at, random) for at in coordinates(mesh)]
    torch.autograd.backward(outputs, seeds)
    assert all(torch.equal(x, old) for x, old in zip(xs, before, strict=True)), "an input was modified"
    assert all(output.is_contiguous() for output in outputs)
    gradients = [x.grad for x in xs if x.grad is not None]
    value = gather([output.detach() for output in outputs], target, mesh)
    return value, gather_gradient(gradients, source, mesh), simulation.records


def check(move: Move, mesh: Mesh, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(1)
    full, seed = torch.randn(2, *shape, generator=random, dtype=torch.float64)
    value, gradient, records = convert((move,), mesh, full, seed)
    torch.testing.assert_close(value, full, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, seed, rtol=0, atol=1e-12)
    wanted = [(name, phase) for name, phase in ((move.forward, "forward"), (move.backward, "backward"))]
    wanted = [(name, phase) for name, phase in wanted if name in COLLECTIVES]
    found = [(record.primitive, record.phase) for record in records]
    assert found == wanted or (not found and move.kinds == ("S", "S"))
    assert all(record.axis == move.axis for record in records)


def moves(shape: tuple[int, ...], cuts: list[list[Cut]], axes: int) -> Iterator[Move]:
    for layout in all_layouts(cuts, axes, "IRPS"):
        yield from moves_from(layout, cuts, True)


EVEN = [[plain_cut(12)], [plain_cut(24), (Segment(2, 12, 1),)]]
UNEVEN = [[plain_cut(5), (Segment(1, 2, 1), Segment(3, 1, 1))], [(Segment(3, 14, 1),), (Segment(1, 42, 1),)]]
EMPTY = [[plain_cut(2)], [(Segment(2, 3, 1),), (Segment(1, 2, 3),)]]


@pytest.mark.parametrize("mesh", [(1,), (2,), (3,), (4,)])
@pytest.mark.parametrize("shape, cuts", [((12, 24), EVEN), ((5, 42), UNEVEN), ((2, 6), EMPTY)])
def test_every_move_on_one_axis(mesh: Mesh, shape: tuple[int, ...], cuts: list[list[Cut]]) -> None:
    found = list(moves(shape, cuts, 1))
    assert {move.kinds for move in found} == set(MOVES) - {("M", "I")}
    for move in found:
        if mesh != (1,):
            check(move, mesh, shape)
        else:
            assert converter((move,), mesh).ranks[0].graph.convert.steps((), torch.device("cpu")) == ((), ())


@pytest.mark.parametrize("mesh", [(2, 2), (2, 3)])
@pytest.mark.parametrize("shape, cuts", [((12, 24), EVEN), ((5, 42), UNEVEN), ((2, 6), EMPTY)])
def test_every_move_on_two_axes(mesh: Mesh, shape: tuple[int, ...], cuts: list[list[Cut]]) -> None:
    found = list(moves(shape, cuts, 2))
    assert {move.kinds for move in found} == set(MOVES) - {("M", "I")}
    for move in found:
        check(move, mesh, shape)


def test_heads_on_a_mesh_that_they_do_not_fit() -> None:
    """A fused qkv of 14 heads of 4 on 4 ranks: 4, 4, 4 and 2 heads of each of q, k and v."""
    cuts = [[plain_cut(3)], [(Segment(3, 14, 4),), plain_cut(168)], [plain_cut(8)]]
    for move in moves((3, 168, 8), cuts, 1):
        check(move, (4,), (3, 168, 8))


def test_maximum() -> None:
    full = torch.randn(4, 3, dtype=torch.float64)
    for mesh in ((3,), (2, 2)):
        source, target = Layout(("M", "I")[: len(mesh)]), uniform("I", len(mesh))
        random = torch.Generator().manual_seed(2)
        xs = [scatter(full, source, mesh, at, random) for at in coordinates(mesh)]
        assert not torch.equal(xs[0], full)
        simulation = converter((Move(0, source, target),), mesh, gradient=False)
        outputs = [output for (output,) in simulation.forward([[]] * len(xs), [[x] for x in xs])]
        torch.testing.assert_close(gather(outputs, target, mesh), full)
        assert [record.primitive for record in simulation.records] == ["all_reduce_max"]


def test_path_of_several_moves() -> None:
    """P, P to S, I by way of R: reduce-scatter over the nodes after an all-reduce inside."""
    mesh, cut = (2, 2), plain_cut(5)
    source, middle = Layout(("P", "P")), Layout(("P", "R"))
    target = Layout(("S", "R"), (Split(0, (0,), cut),))
    full, seed = torch.randn(2, 5, 3, dtype=torch.float64)
    value, gradient, records = convert((Move(1, source, middle), Move(0, middle, target)), mesh, full, seed)
    torch.testing.assert_close(value, full)
    torch.testing.assert_close(gradient, seed)
    assert [(r.primitive, r.axis, r.phase) for r in records] == [
        ("all_reduce", 1, "forward"),
        ("reduce_scatter", 0, "forward"),
        ("all_gather", 0, "backward"),
        ("all_reduce", 1, "backward"),
    ]
    assert [record.bytes for record in records] == [5 * 3 * 8, 6 * 3 * 8, 6 * 3 * 8, 5 * 3 * 8]


def test_no_single_move() -> None:
    convert = Convert((Move(0, Layout(("I",)), Layout(("M",))),), (2,), (0,))
    with pytest.raises(AutotpError, match="no single move on mesh axis 0 leads from I to M"):
        convert(torch.ones(2))


# ---- definitions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(4,), (2, 3)])
def test_scatter_and_gather_are_inverse(mesh: Mesh) -> None:
    full = torch.randn(5, 42, dtype=torch.float64)
    for layout in all_layouts(UNEVEN, len(mesh), "IRPMS"):
        for random in (None, torch.Generator().manual_seed(3)):
            locals = [scatter(full, layout, mesh, at, random) for at in coordinates(mesh)]
            torch.testing.assert_close(gather(locals, layout, mesh), full)
        dual = gradient_layout(layout)
        locals = [scatter(full, dual, mesh, at, torch.Generator()) for at in coordinates(mesh)]
        torch.testing.assert_close(gather_gradient(locals, layout, mesh), full)


def test_gather_of_integers_and_flags() -> None:
    full = torch.arange(6)
    locals = [scatter(full, Layout(("P",)), (3,), at, torch.Generator()) for at in coordinates((3,))]
    assert torch.equal(gather(locals, Layout(("P",)), (3,)), full)
    split = Layout(("S",), (Split(0, (0,), plain_cut(6)),))
    locals = [scatter(full > 2, split, (4,), at) for at in coordinates((4,))]
    assert torch.equal(gather(locals, split, (4,)), full > 2)


def test_gather_refuses_ranks_that_differ() -> None:
    with pytest.raises(AutotpError, match="layout I wants equal tensors along mesh axis 0"):
        gather([torch.ones(2), torch.ones(2) * 1.1], Layout(("I",)), (2,))
    with pytest.raises(AutotpError, match=r"layout S\(0\) of shape \(4,\) gives it \(2,\)"):
        gather([torch.ones(2), torch.ones(3)], Layout(("S",), (Split(0, (0,), plain_cut(4)),)), (2,))


# ---- the interpreter ------------------------------------------------------------------------------------------------


def block(coordinate: tuple[int, ...]) -> torch.fx.GraphModule:
    """Megatron's MLP: f, column-parallel, relu, row-parallel, g."""
    root = nn.Module()
    root.f = Convert((Move(0, uniform("I", 1), uniform("R", 1)),), (2,), coordinate)
    root.g = Convert((Move(0, uniform("P", 1), uniform("I", 1)),), (2,), coordinate)
    graph = torch.fx.Graph()
    x, up, down = (graph.placeholder(name) for name in ("x", "up", "down"))
    hidden = graph.call_function(torch.ops.aten.linear.default, (graph.call_module("f", (x,)), up))
    hidden = graph.call_function(torch.ops.aten.relu.default, (hidden,))
    hidden = graph.call_function(torch.ops.aten.linear.default, (hidden, down))
    graph.output((graph.call_module("g", (hidden,)),))
    return torch.fx.GraphModule(root, graph)


def two_blocks(coordinate: tuple[int, ...]) -> Sharded:
    graph = torch.fx.Graph()
    up, down, x = (graph.placeholder(name) for name in ("w_up", "w_down", "x"))
    y = x
    for name in ("first", "second"):
        y = graph.call_function(
            torch.add, (y, graph.call_function(getitem, (graph.call_module(name, (y, up, down)), 0)))
        )
    graph.output((y,))
    return sharded((2,), coordinate, {"first": block(coordinate), "second": block(coordinate)}, graph)


def getitem(sequence: Any, index: int) -> Any:
    return sequence[index]


def test_blocks_with_shared_weights_reproduce_one_device() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, generator=random, dtype=torch.float64)
    up, down = torch.randn(2, 8, 6, generator=random, dtype=torch.float64)
    down = down.t().contiguous()
    layouts = [
        Layout(("S",), (Split(0, (0,), plain_cut(8)),)),
        Layout(("S",), (Split(1, (0,), plain_cut(8)),)),
        uniform("I", 1),
    ]
    ranks = [
        [scatter(full, layout, (2,), at).requires_grad_() for full, layout in zip((up, down, x), layouts, strict=True)]
        for at in coordinates((2,))
    ]
    simulation = Simulation([two_blocks(at) for at in coordinates((2,))])
    outputs = [output for (output,) in simulation.forward([r[:2] for r in ranks], [r[2:] for r in ranks])]
    seed = torch.randn(3, 6, generator=random, dtype=torch.float64)
    torch.autograd.backward(outputs, [seed, seed])

    whole = [full.clone().requires_grad_() for full in (up, down, x)]
    y = whole[2]
    for _ in range(2):
        y = y + torch.relu(y @ whole[0].t()) @ whole[1].t()
    y.backward(seed)
    torch.testing.assert_close(gather(outputs, uniform("I", 1), (2,)).detach(), y.detach())
    for i, layout in enumerate(layouts):
        torch.testing.assert_close(gather_gradient([r[i].grad for r in ranks], layout, (2,)), whole[i].grad)
    assert [(r.primitive, r.phase) for r in simulation.records] == [("all_reduce", "forward")] * 2 + [
        ("all_reduce", "backward")
    ] * 2


def test_sizes_that_change_between_calls() -> None:
    """Batch sizes 5 and 7 on 2 ranks: 3 + 2 and 4 + 3 rows."""
    batch = sympy.Symbol("batch", integer=True, positive=True)
    split = Layout(("S",), (Split(0, (0,), plain_cut(batch)),))
    path = (Move(0, uniform("I", 1), split),)
    ranks = []
    for at in coordinates((2,)):
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
        graph.output((graph.call_module("convert", (x, size)),))
        ranks.append(sharded((2,), at, {"convert": Convert(path, (2,), at, (batch,))}, graph))
    simulation = Simulation(ranks)
    for rows in (5, 7, 5):
        x = torch.randn(rows, 2)
        outputs = simulation.forward([[], []], [[x], [x]])
        assert [len(output) for (output,) in outputs] == [-(-rows // 2), rows // 2]
        assert torch.equal(torch.cat([output for (output,) in outputs]), x)


def test_bucket_merges_gradients() -> None:
    """Three tensors of two dtypes, one of them without gradient, on a 2 × 2 mesh: one all-reduce per dtype and axis."""
    mesh = (2, 2)
    path = (Move(0, Layout(("I", "I")), Layout(("R", "I"))), Move(1, Layout(("R", "I")), Layout(("R", "R"))))
    ranks = []
    for at in coordinates(mesh):
        graph = torch.fx.Graph()
        places = [graph.placeholder(f"w{i}") for i in range(4)]
        bucket = graph.call_module("bucket", tuple(places))
        graph.output(tuple(graph.call_function(getitem, (bucket, i)) for i in range(4)))
        ranks.append(sharded(mesh, at, {"bucket": Bucket(path, 4)}, graph))
    types = (torch.float64, torch.float32, torch.float64, torch.float64)
    weights = [[torch.ones(2, 3, dtype=dtype, requires_grad=i != 2) for i, dtype in enumerate(types)] for _ in ranks]
    simulation = Simulation(ranks)
    outputs = simulation.forward(weights, [[] for _ in ranks])
    loss = sum(
        ((rank + 1) * output[0]).sum() + output[1].sum().double() for rank, output in enumerate(outputs)
    )  # the last tensor has no gradient
    assert isinstance(loss, Tensor)
    loss.backward()
    for mine in weights:
        assert torch.equal(mine[0].grad, torch.full((2, 3), 10.0, dtype=torch.float64))
        assert torch.equal(mine[1].grad, torch.full((2, 3), 4.0))
        assert mine[2].grad is None and torch.equal(mine[3].grad, torch.zeros(2, 3, dtype=torch.float64))
    assert [(r.primitive, r.axis, r.bytes) for r in simulation.records] == [
        ("all_reduce", 1, 96),
        ("all_reduce", 0, 96),
        ("all_reduce", 1, 24),
        ("all_reduce", 0, 24),
    ]


def test_bucket_refuses_other_moves() -> None:
    with pytest.raises(AutotpError, match="a bucket merges moves I → R only, not P → I on mesh axis 0"):
        Bucket((Move(0, Layout(("P",)), Layout(("I",))),), 2)


def test_graphs_must_be_alike() -> None:
    def one(coordinate: tuple[int, ...], function: Any, twice: bool = False) -> Sharded:
        graph = torch.fx.Graph()
        y = graph.call_function(function, (graph.placeholder("x"),), name="step")
        graph.output((graph.call_function(function, (y,), name="again") if twice else y,))
        return sharded((2,), coordinate, {}, graph)

    with pytest.raises(AutotpError, match="virtual rank 1 runs step .* where rank 0 runs step"):
        Simulation([one((0,), torch.sin), one((1,), torch.cos)])
    with pytest.raises(AutotpError, match="virtual rank 1 runs again .* where rank 0 runs output"):
        Simulation([one((0,), torch.sin), one((1,), torch.sin, twice=True)])
    with pytest.raises(AutotpError, match="one Sharded for every coordinate of the mesh in row-major order"):
        Simulation([one((1,), torch.sin), one((0,), torch.sin)])
    simulation = Simulation([one((0,), torch.sin), one((1,), torch.sin)])
    with pytest.raises(AutotpError, match="takes 1 tensors, but 0 were given"):
        simulation.forward([[], []], [[], []])


def test_an_error_names_its_node() -> None:
    graph = torch.fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.view.default, (graph.placeholder("x"), [7])),))
    simulation = Simulation([sharded((1,), (0,), {}, graph)])
    with pytest.raises(RuntimeError) as caught:
        simulation.forward([[]], [[torch.ones(3)]])
    assert caught.value.__notes__ == ["at node view_default of virtual rank (0,)"]

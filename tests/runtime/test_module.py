"""`ParallelModule` on hand-made graphs: trained, saved, frozen and misused like an ordinary module."""

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sympy
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils import _pytree as pytree

from autotp.errors import AutotpError
from autotp.layouts import Layout, Segment, Split
from autotp.program import Size, TensorType
from autotp.runtime.module import ParallelModule
from autotp.runtime.state import local_part
from autotp.sharded import BorderSpec, Sharded, StateSpec

HEADS = (Segment(3, 2, 4),)


class Model(nn.Module):
    """A fused qkv of two heads of 4, cut by heads; an uneven hidden layer; a tied weight; a counter of calls."""

    attention: Any
    mlp: Any
    calls: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.attention = nn.Module()
        self.attention.qkv = nn.Linear(6, 24)
        self.attention.out = nn.Linear(8, 6)
        self.mlp = nn.ModuleDict({"up": nn.Linear(6, 5), "down": nn.Linear(5, 6, bias=False)})
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.mlp["up"].weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.full((6,), 0.5, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, factor: float = 2.0) -> "Output":
        self.calls += 1
        q, k, v = self.attention.qkv(x * self.scale + self.shift).chunk(3, -1)
        x = x + self.attention.out(torch.tanh(q) * k + v)
        x = x + self.mlp["down"](torch.tanh(self.mlp["up"](x)))
        return Output(x * factor, None, self.head(x))


class Output(NamedTuple):
    hidden: Tensor
    cache: None
    logits: Tensor


class ToReplicate(torch.autograd.Function):
    """I → R: nothing forward, an all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class ToInvariant(torch.autograd.Function):
    """P → I: an all-reduce forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def to_replicate(x: Tensor) -> Tensor:
    return ToReplicate.apply(x)


def to_invariant(x: Tensor) -> Tensor:
    return ToInvariant.apply(x)


def shard(dim: int, *cut: Segment) -> Layout:
    return Layout(("S",), (Split(dim, (0,), cut),))


INVARIANT = Layout(("I",))
LAYOUTS = {
    "attention.qkv.weight": shard(0, *HEADS),
    "attention.qkv.bias": shard(0, *HEADS),
    "attention.out.weight": shard(1, Segment(1, 2, 4)),
    "mlp.up.weight": shard(0, Segment(1, 5, 1)),
    "mlp.up.bias": shard(0, Segment(1, 5, 1)),
    "mlp.down.weight": shard(1, Segment(1, 5, 1)),
}


def local_graph(sizes: dict[str, int]) -> torch.fx.GraphModule:
    """The graph of `Model` on one rank. The tied head gathers nothing: its logits leave sharded, on dim 1."""
    aten, graph = torch.ops.aten, torch.fx.Graph()
    names = [*dict(Model().named_parameters()), "calls", "shift", "x"]
    n = {name: graph.placeholder(name.replace(".", "_")) for name in names}

    def call(target: Any, *args: Any) -> torch.fx.Node:
        return graph.call_function(target, args)

    scaled = call(aten.add.Tensor, call(aten.mul.Tensor, n["x"], n["scale"]), n["shift"])
    scaled = call(to_replicate, scaled)
    qkv = call(aten.linear.default, scaled, n["attention.qkv.weight"], n["attention.qkv.bias"])
    q, k, v = (call(aten.slice.Tensor, qkv, 1, i * sizes["head"], (i + 1) * sizes["head"]) for i in range(3))
    mixed = call(aten.add.Tensor, call(aten.mul.Tensor, call(aten.tanh.default, q), k), v)
    out = call(to_invariant, call(aten.linear.default, mixed, n["attention.out.weight"]))
    first = call(aten.add.Tensor, n["x"], call(aten.add.Tensor, out, n["attention.out.bias"]))
    up = call(aten.linear.default, call(to_replicate, first), n["mlp.up.weight"], n["mlp.up.bias"])
    down = call(aten.linear.default, call(aten.tanh.default, up), n["mlp.down.weight"])
    hidden = call(aten.add.Tensor, first, call(to_invariant, down))
    logits = call(aten.linear.default, call(to_replicate, hidden), n["mlp.up.weight"])
    graph.output((call(aten.mul.Tensor, hidden, 2.0), logits, call(aten.add.Tensor, n["calls"], 1)))
    return torch.fx.GraphModule(nn.Module(), graph)


def tensor_type(tensor: Tensor, shape: tuple[Size, ...] | None = None) -> TensorType:
    return TensorType(shape or tuple(tensor.shape), tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def make_sharded(model: nn.Module, rank: int, world: int) -> Sharded:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = tuple(
        StateSpec(
            name, "parameter" if isinstance(t, nn.Parameter) else "buffer", tensor_type(t), LAYOUTS.get(name, INVARIANT)
        )
        for name, t in tensors.items()
    )
    x, batch = torch.zeros(3, 6, dtype=torch.float64), sympy.Symbol("batch")
    _, in_spec = pytree.tree_flatten(((x,), {"mask": None, "factor": 2.0}))
    _, out_spec = pytree.tree_flatten(Output(x, None, x))
    return Sharded(
        graph=local_graph({"head": 8 // world}),
        state=state,
        inputs=(BorderSpec("x", 0, tensor_type(x, (batch, 6)), INVARIANT),),
        outputs=(
            BorderSpec("hidden", 0, tensor_type(x, (batch, 6)), INVARIANT),
            BorderSpec("logits", 2, tensor_type(x[:, :5], (batch, 5)), shard(1, Segment(1, 5, 1))),
        ),
        updates=("calls",),
        mesh=(world,),
        coordinate=(rank,),
        in_spec=in_spec,
        out_spec=out_spec,
        in_names=("x", "mask", "factor"),
        in_constants={1: None, 2: 2.0},
        out_constants={1: None},
    )


def parallel(
    model: nn.Module, mesh: DeviceMesh, change: Callable[[Sharded], Sharded] = lambda s: s, **options: Any
) -> Any:
    sharded = change(make_sharded(model, dist.get_rank(), dist.get_world_size()))
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    options = {"signature": inspect.signature(model.forward), **options}
    return ParallelModule(
        sharded, mesh, values, {"head.weight": "mlp.up.weight"}, frozenset({"calls"}), "cpu", **options
    )


def make_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def loss_of(output: Any) -> Tensor:
    return output.hidden.square().sum() + local(output.logits).square().sum()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of an output that was declared split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- one process ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",))
    dist.destroy_process_group()


X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_names_ties_and_outputs_are_those_of_the_model(mesh: DeviceMesh) -> None:
    model = make_model()
    module = parallel(model, mesh)
    assert set(module.state_dict()) == set(model.state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert set(dict(module.named_buffers())) == set(dict(model.named_buffers()))
    assert module.head.weight is module.mlp.up.weight and isinstance(module.head.weight, DTensor)
    output, expected = module(X), model(X)
    assert isinstance(output, Output) and output.cache is None
    assert isinstance(output.logits, DTensor) and output.logits.placements == (Shard(1),)
    assert_same((output.hidden, local(output.logits)), (expected.hidden, expected.logits))
    assert module.calls == model.calls == 1
    assert "mesh: 1 (tensor)" in repr(module) and "weight: 24×6 S(0; 3×2×4)" in repr(module)


def test_gradients_accumulate_and_are_zeroed_as_on_one_device(mesh: DeviceMesh) -> None:
    model = make_model()
    module = parallel(model, mesh)
    for set_to_none in (True, False):
        for step in range(2):
            loss_of(module(X + step)).backward()
            loss_of(model(X + step)).backward()
            for mine, theirs in zip(module.parameters(), model.parameters(), strict=True):
                assert isinstance(mine.grad, DTensor)
                assert_same(mine.grad.full_tensor(), theirs.grad)
        for m in (module, model):
            m.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) is set_to_none for p in module.parameters())


def test_hooks_of_users_run(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    seen: list[Any] = []
    module.scale.register_hook(lambda gradient: gradient * 3)
    module.scale.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    plain = parallel(make_model(), mesh)
    for m in (module, plain):
        loss_of(m(X)).backward()
    assert_same(seen[0].full_tensor(), 3 * plain.scale.grad.full_tensor())


def test_constants_are_read_but_not_shown(mesh: DeviceMesh) -> None:
    def shift_as_constant(sharded: Sharded) -> Sharded:
        state = (replace(spec, kind="constant") if spec.name == "shift" else spec for spec in sharded.state)
        return replace(sharded, state=tuple(state))

    module = parallel(make_model(), mesh, shift_as_constant)
    assert set(dict(module.named_buffers())) == {"calls"}
    assert_same(module(X).hidden, make_model()(X).hidden)


def test_freezing_is_honoured_both_ways(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    module.scale.requires_grad_(False)
    loss_of(module(X)).backward()
    assert module.scale.grad is None and module.mlp.up.weight.grad is not None
    module.scale.requires_grad_(True)
    loss_of(module(X)).backward()
    assert module.scale.grad is not None


def test_a_parameter_traced_frozen_stays_frozen(mesh: DeviceMesh) -> None:
    model = make_model()
    model.scale.requires_grad_(False)
    module = parallel(model, mesh)
    assert not module.scale.requires_grad
    module.scale.requires_grad_(True)
    with pytest.raises(AutotpError, match="'scale' was frozen when the model was traced"):
        module(X)


def test_values_written_in_place_are_seen(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    before = module(X).hidden
    with torch.no_grad():
        module.scale.mul_(2)
        module.attention.out.bias.data.add_(1)
    model = make_model()
    with torch.no_grad():
        model.scale.mul_(2)
        model.attention.out.bias.add_(1)
    assert_same(module(X).hidden, model(X).hidden)
    assert not torch.equal(before, module(X).hidden)


def test_a_copy_is_independent(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    module.scale.requires_grad_(False)
    copied = copy.deepcopy(module)
    with pytest.raises(AutotpError, match="a parallel module cannot be pickled"):
        pickle.dumps(module)
    with torch.no_grad():
        module.mlp.up.weight.zero_()
    assert not copied.scale.requires_grad
    assert_same(copied(X).hidden, make_model()(X).hidden)


def test_arguments_bind_as_in_the_original_forward(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    expected = module(X).hidden
    for call in (
        lambda: module(x=X),
        lambda: module(X, None),
        lambda: module(X, None, 2.0),
        lambda: module(factor=2.0, mask=None, x=X),
    ):
        assert_same(call().hidden, expected)
    assert module(torch.cat([X, X])).hidden.shape == (6, 6)
    unsigned = parallel(make_model(), mesh, signature=None)
    assert_same(unsigned(X, factor=2.0, unused=None).hidden, expected)


def test_wrong_arguments_do_not_reach_the_graph(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    with pytest.raises(AutotpError, match="input 'factor' is 3.0, but the example had 2.0"):
        module(X, factor=3.0)
    assert module.calls == 0


def test_the_mode_is_that_of_the_trace(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh, trained_mode=False)
    assert not module.training
    module(X)
    module.train()
    with pytest.raises(AutotpError, match=r"traced in eval mode and the module is in train mode; call .eval\(\)"):
        module(X)
    parallel(make_model(), mesh).eval()(X)


def test_replaced_and_converted_state_is_refused(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    assert module.to("cpu").double() is module
    with pytest.raises(AutotpError, match="cannot change 'scale' from torch.float64 on cpu to torch.float16"):
        module.half()
    with pytest.raises(AutotpError, match="cannot change 'weight'"):
        module.mlp.up.to("meta")
    with pytest.raises(AutotpError, match="outside the memory that the forward reads"):
        module.load_state_dict(module.state_dict(), assign=True)
    module(X)
    module.scale = nn.Parameter(module.scale.to_local().detach().clone())
    with pytest.raises(AutotpError, match="parameter 'scale' was replaced"):
        module(X)
    module = parallel(make_model(), mesh)
    torch.utils.swap_tensors(module.scale, nn.Parameter(module.scale.detach().clone()))
    with pytest.raises(AutotpError, match="parameter 'scale' was replaced"):
        module(X)
    module = parallel(make_model(), mesh)
    module.shift = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(AutotpError, match="buffer 'shift' was replaced"):
        module(X)


def test_a_parameter_that_lies_alike_may_take_another_s_place(mesh: DeviceMesh) -> None:
    """As `fully_shard` does: the graph reads it, and it gets the gradient."""
    model = make_model()
    module = parallel(model, mesh)
    module(X)
    first = module.scale
    module.scale = nn.Parameter(first.detach() * 2)
    with torch.no_grad():
        model.scale.mul_(2)
    found, wanted = module(X), model(X)
    assert_same([local(one) for one in found], [local(one) for one in wanted])
    for output in (found, wanted):
        (output.hidden.sum() + local(output.logits).sum()).backward()
    assert first.grad is None
    torch.testing.assert_close(module.scale.grad.to_local(), model.scale.grad)


def test_it_compiles_without_graph_breaks(mesh: DeviceMesh) -> None:
    def without_collectives(sharded: Sharded) -> Sharded:
        for node in sharded.graph.graph.nodes:
            if node.target in (to_replicate, to_invariant):
                node.target = torch.ops.aten.alias.default
        sharded.graph.recompile()
        return sharded

    module, plain = parallel(make_model(), mesh, without_collectives), parallel(make_model(), mesh)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for frozen in (False, True):
        for m in (module, plain):
            m.scale.requires_grad_(not frozen)
            m.zero_grad()
        output = compiled(X)
        loss_of(output).backward()
        loss_of(plain(X)).backward()
        assert (module.scale.grad is None) is frozen
        assert_same(module.mlp.up.weight.grad.full_tensor(), plain.mlp.up.weight.grad.full_tensor())
    assert module.calls == 2


@pytest.mark.filterwarnings("ignore:Using backward")
def test_second_derivatives_are_refused(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    with pytest.raises(AutotpError, match="no second derivatives"):
        loss_of(module(X)).backward(create_graph=True)


def test_wrong_construction_is_one_clear_sentence(mesh: DeviceMesh) -> None:
    model = make_model()
    sharded = make_sharded(model, 0, 1)
    good = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def build(sharded: Sharded = sharded, values: Any = good, aliases: Any = None) -> ParallelModule:
        return ParallelModule(sharded, mesh, values, aliases or {}, frozenset(), "cpu")

    cases: list[tuple[dict[str, Any], str]] = [
        ({"sharded": replace(sharded, mesh=(2,))}, r"plan is for a mesh of \(2,\), the device mesh has \(1,\)"),
        ({"sharded": replace(sharded, coordinate=(1,))}, r"rank at \(1,\), this rank is at \(0,\)"),
        ({"values": {k: v for k, v in good.items() if k != "scale"}}, "no value is given for parameter 'scale'"),
        (
            {"values": {**good, "scale": torch.ones(5)}},
            r"'scale' is torch.float32 of shape \(5,\), but the plan was made for",
        ),
        ({"values": {**good, "scale": model.scale.to("meta")}}, "'scale' is on the meta device"),
        ({"values": {**good, "extra": torch.ones(5)}}, "a value is given for 'extra', which is no state"),
        ({"aliases": {"second": "nothing"}}, "'second' is tied to 'nothing', which is no state"),
        (
            {"sharded": replace(sharded, state=(replace(sharded.state[0], layout=Layout(("R",))), *sharded.state[1:]))},
            "parameter 'scale' rests as R; a trainable parameter rests as I or S",
        ),
    ]
    for options, sentence in cases:
        with pytest.raises(AutotpError, match=sentence):
            build(**options)


def test_load_errors_are_those_of_torch(mesh: DeviceMesh) -> None:
    module = parallel(make_model(), mesh)
    full = module.full_state_dict()
    with pytest.raises(RuntimeError, match='Missing key.*"scale"'):
        module.load_state_dict({k: v for k, v in full.items() if k != "scale"})
    with pytest.raises(RuntimeError, match='Unexpected key.*"extra"'):
        module.load_state_dict({**full, "extra": X})
    with pytest.raises(RuntimeError, match="size mismatch for mlp.down.weight"):
        module.load_state_dict({**full, "mlp.down.weight": X})
    missing, unexpected = module.load_state_dict({"extra": X}, strict=False)
    assert "scale" in missing and unexpected == ["extra"]


# ---- two processes --------------------------------------------------------------------------------------------------


def run_ranks(check: Callable[[DeviceMesh], None], path: Path, world: int = 2) -> None:
    """Run `check` on every rank of a Gloo world."""
    mp.spawn(run_rank, (world, str(path / "store"), check), nprocs=world)


def run_rank(rank: int, world: int, store: str, check: Callable[[DeviceMesh], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        check(init_device_mesh("cpu", (world,)))
    finally:
        dist.destroy_process_group()


def check_two_ranks(mesh: DeviceMesh) -> None:
    check_training(mesh, foreach=False)
    check_training(mesh, foreach=True)
    check_state_dicts(mesh)
    check_shapes(mesh)


def check_training(mesh: DeviceMesh, foreach: bool) -> None:
    """AdamW, clipping and accumulation for 3 steps: parameters, gradients and norms are those of one device."""
    model, expected = make_model(), make_model()
    module = parallel(model, mesh)
    mine = torch.optim.AdamW(module.parameters(), lr=0.05, foreach=foreach)
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.05, foreach=foreach)
    for step in range(3):
        for part in range(2):
            x = X + step + 0.1 * part
            output = module(x)
            loss_of(output).backward()
            full = expected(x)
            loss_of(full).backward()
            assert_same(output.hidden, full.hidden)
            assert_same(local(output.logits), local_part(full.logits, shard(1, Segment(1, 5, 1)), (2,), (dist.get_rank(),)))
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.5, foreach=foreach) for m in (module, expected)]
        assert isinstance(norms[0], DTensor)
        assert_same(norms[0].full_tensor(), norms[1])
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad(set_to_none=step == 0)
        for name, value in module.full_state_dict().items():
            assert_same(value, expected.state_dict()[name])


def check_state_dicts(mesh: DeviceMesh) -> None:
    """Full and sharded state survive the round trip, uneven and segmented cuts and ties included."""
    model = make_model()
    module = parallel(model, mesh)
    full = module.full_state_dict()
    assert full.keys() == model.state_dict().keys()
    for name, value in full.items():
        assert type(value) is Tensor and torch.equal(value, model.state_dict()[name])
    other = Model().double()
    parts, fresh = module.state_dict(), [parallel(other, mesh) for _ in range(2)]
    fresh[0].load_state_dict(full)
    fresh[1].load_state_dict(parts)
    fresh[0].mlp.load_state_dict(model.mlp.state_dict())
    for loaded in fresh:
        assert_same(loaded.full_state_dict(), full)
        assert_same(loaded(X).hidden, model(X).hidden)
    copied = copy.deepcopy(module)
    assert_same(copied.full_state_dict(), {**full, "calls": copied.calls})
    moved = DTensor.from_local(torch.ones(12, 6, dtype=torch.float64), mesh).redistribute(
        placements=[parts["scale"].placements[0]]
    )
    with pytest.raises(RuntimeError, match="size mismatch for attention.qkv.weight"):
        module.load_state_dict({**parts, "attention.qkv.weight": moved})
    replicated = DTensor.from_local(torch.ones(24, 6, dtype=torch.float64), mesh)
    with pytest.raises(AutotpError, match="is a DTensor that lies otherwise"):
        module.load_state_dict({**parts, "attention.qkv.weight": replicated})


def check_shapes(mesh: DeviceMesh) -> None:
    """The DTensor of a weight shows the global shape, although the local pieces are not torch's chunks."""
    module = parallel(make_model(), mesh)
    weight, rank = module.mlp.up.weight, dist.get_rank()
    assert weight.shape == (5, 6) and weight.to_local().shape == ((3, 6), (2, 6))[rank]
    qkv = module.attention.qkv.weight
    assert qkv.shape == (24, 6) and qkv.to_local().shape == (12, 6)
    full = make_model().attention.qkv.weight
    rows = torch.cat([full[8 * part + 4 * rank : 8 * part + 4 * rank + 4] for part in range(3)])
    assert_same(qkv.to_local().detach(), rows.detach())


def test_two_ranks_train_and_save_like_one_device(tmp_path: Path) -> None:
    run_ranks(check_two_ranks, tmp_path)

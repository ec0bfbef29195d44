"""Gathers begun a block early and reductions ended a block late: on real ranks, equal to one device, and really under way meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import autotp
from autotp.decisions import Decisions, Recomputed, recomputable
from autotp.definitions import coordinates, scatter
from autotp.equality import compare, emitted
from autotp.errors import AutotpError
from autotp.runtime.collectives import bind
from autotp.runtime.comm import ProcessComm
from autotp.simulate import Simulation
from autotp.strategies import Space
from autotp.trace import trace
from tests.data_parallel import data_parallel, parallel_module, without_prefetch
from tests.models import TOLERANCE, splitting_pays
from tests.ranks import run_ranks
from tests.test_api import full_gradient

LAYERS = 4


class Block(nn.Module):
    """Two products, one weight used twice, one that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 30), nn.Linear(30, 12), nn.LayerNorm(12)
        self.twice = nn.Parameter(torch.randn(12, 12) / 4)
        self.unused = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(self.norm(x), self.twice)
        return x + functional.linear(self.down(functional.gelu(self.up(y))), self.twice)


class Model(nn.Module):
    """Blocks between a projection and its own transpose: a weight tied across the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(12, 20) / 4)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.embed)
        for block in self.blocks:
            x = block(x)
        return functional.linear(x, self.embed.t())


def made(rests: str = "S", sizes: Sequence[int] = (2,)) -> tuple[Model, Any, Tensor]:
    """A model, its module on this rank, and an input of the whole batch."""
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(12, 20, dtype=torch.float64)
    space, decisions = decided(model, x, rests, sizes)
    return model, parallel_module(model, space, decisions, init_device_mesh("cpu", tuple(sizes))), x


def decided(model: Model, x: Tensor, rests: str, sizes: Sequence[int]) -> tuple[Space, Decisions]:
    """`rests` as for `data_parallel`; with "+" what is gathered is gathered again in backward."""
    mesh = {f"axis{number}": size for number, size in enumerate(sizes)}
    space, decisions = data_parallel(trace(model, (x,)), mesh, rests.rstrip("+"))
    return space, gathered_again(space, decisions) if rests.endswith("+") else decisions


def gathered_again(space: Space, decisions: Decisions) -> Decisions:
    found = []
    for number, repeat in enumerate(space.folding.repeats):
        versions = recomputable(space, decisions, number)
        weights = frozenset(version for version in versions if space.program.nodes[version[0].node].kind == "parameter")
        found.append(Recomputed(number, repeat.count, weights))
    return replace(decisions, recomputed=tuple(found))


def close(found: Any, wanted: Any, what: str) -> None:
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def same_gradients(model: nn.Module, module: Any, what: str) -> None:
    for (name, parameter), mine in zip(model.named_parameters(), module.parameters(), strict=True):
        if parameter.grad is None:
            assert mine.grad is None or not mine.grad.to_local().any(), f"{what}: {name}"
        else:
            close(full_gradient(module, name, mine), parameter.grad, f"{what}: {name}")


# ---- equal to one device --------------------------------------------------------------------------------------------


def train(sizes: Sequence[int], rests: str) -> None:
    """Three AdamW steps with clipping; as many collectives as simulated ranks count, in the same order on every rank."""
    model, module, x = made(rests, sizes)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, module)]
    recorder = Recorder(module._device_mesh)
    bind(module._sharded.graph, recorder)
    what = f"{rests} on {sizes}"
    for step in range(3):
        recorder.events.clear()
        with CommDebugMode() as counted:
            outputs = [one(x + step) for one in (model, module)]
            for output in outputs:
                output.square().mean().backward()
        close(outputs[1], outputs[0], f"{what}: output, step {step}")
        same_gradients(model, module, f"{what}: step {step}")
        for optimizer, one in zip(optimizers, (model, module), strict=True):
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    after = module.full_state_dict()
    for key, wanted in model.state_dict().items():
        close(after[key], wanted, f"{what}: {key} after three steps")
    order = [kind for event, kind, _ in recorder.events if event == "begin"]
    orders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(orders, order)
    assert all(other == order for other in orders)
    assert len(order) == counted.get_total_counts()
    assert Counter(order) == simulated(rests, sizes, x)


def simulated(rests: str, sizes: Sequence[int], x: Tensor) -> Counter[str]:
    """The collectives of one step of simulated ranks."""
    model = Model().double()
    space, decisions = decided(model, x, rests, sizes)
    found = compare(space, decisions, dict(model.named_parameters()), (x,), {})
    assert found.worst < TOLERANCE
    return Counter(record.primitive for record in found.simulation.records)


@pytest.mark.parametrize("ranks, sizes, rests", [(3, (3,), "S"), (4, (2, 2), "IS")], ids=["FSDP on 3", "HSDP"])
def test_it_trains_like_one_device(ranks: int, sizes: tuple[int, ...], rests: str) -> None:
    run_ranks(train, ranks, sizes, rests)


# ---- under way meanwhile --------------------------------------------------------------------------------------------


class Recorder(ProcessComm):
    """Notes every exchange when it begins and when it is waited for, in order, under a number of its own."""

    def __init__(self, device_mesh: Any) -> None:
        super().__init__(device_mesh)
        self.events: list[tuple[str, str, int]] = []
        self.begun: dict[int, tuple[str, int]] = {}

    def note(self, what: str, received: Tensor) -> Tensor:
        number = sum(event[0] == "begin" for event in self.events)
        self.begun[id(received)] = what, number
        self.events.append(("begin", what, number))
        return received

    def all_reduce(self, x: Tensor, axis: int, op: Any) -> Tensor:
        return self.note("all_reduce", super().all_reduce(x, axis, op))

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        return self.note("all_gather", super().all_gather(x, axis))

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        return self.note("reduce_scatter", super().reduce_scatter(x, axis))

    def all_to_all(self, x: Tensor, axis: int, send_sizes: Any, receive_sizes: Any) -> Tensor:
        return self.note("all_to_all", super().all_to_all(x, axis, send_sizes, receive_sizes))

    def wait(self, x: Tensor) -> Tensor:
        self.events.append(("wait", *self.begun.pop(id(x))))
        return super().wait(x)


class Compute(TorchDispatchMode):
    """Notes matrix products among a recorder's events."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.recorder.events.append(("compute", "", 0))
        return func(*args, **(kwargs or {}))


def products_meanwhile(events: list[tuple[str, str, int]], what: str) -> list[int]:
    """How many matrix products run while each exchange is under way."""
    begins = [(place, event[2]) for place, event in enumerate(events) if event[:2] == ("begin", what)]
    found = []
    for place, number in begins:
        end = events.index(("wait", what, number))
        found.append(sum(event[0] == "compute" for event in events[place:end]))
    return found


def most_under_way(events: list[tuple[str, str, int]]) -> int:
    found = now = 0
    for event in events:
        now += (event[0] == "begin") - (event[0] == "wait")
        found = max(found, now)
    return found


def record(module: Any, x: Tensor) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, int]]]:
    """The events of one forward, and those of its backward."""
    recorder = Recorder(module._device_mesh)
    bind(module._sharded.graph, recorder)
    with Compute(recorder):
        loss = module(x).square().sum()
        forward = recorder.events.copy()
        recorder.events.clear()
        loss.backward()
    return forward, recorder.events


PRODUCTS, GATHERED, SAVED = 4, 5, 3
"""A block's products in its forward, the parameters that it gathers (the gradients of the others are merged), and those that its backward
needs."""


def in_flight() -> None:
    _, module, x = made()
    forward, backward = record(module, x)
    gathered = products_meanwhile(forward, "all_gather")
    early = [count for count in gathered if count >= PRODUCTS]
    assert len(early) >= (LAYERS - 1) * GATHERED, gathered
    assert most_under_way(forward) <= 2 * GATHERED + 1
    reduced = products_meanwhile(backward, "reduce_scatter")
    late = [count for count in reduced if count >= 2 * PRODUCTS]
    assert len(late) >= (LAYERS - 1) * GATHERED, reduced
    assert most_under_way(backward) <= 2 * (GATHERED + 1)
    _, again, x = made("S+")
    _, backward = record(again, x)
    gathered = products_meanwhile(backward, "all_gather")
    early = [count for count in gathered if count >= PRODUCTS]
    assert len(gathered) == LAYERS * SAVED and len(early) >= (LAYERS - 1) * SAVED, gathered
    assert most_under_way(backward) <= 3 * (GATHERED + 1)
    for node in list(module._sharded.graph.graph.nodes):
        assert node.op != "call_module" or "prefetch" not in node.name or node.users
    without_prefetch(module)
    forward, backward = record(module, x)
    assert not any(products_meanwhile(forward, "all_gather")) and not any(products_meanwhile(backward, "reduce_scatter"))


# ---- gradients reach parameters as ever -----------------------------------------------------------------------------


def accumulated(model: Model, module: Any, x: Tensor) -> None:
    """Two backwards, then one through two forwards, then one graph twice."""
    for one in (model, module):
        for factor in (1, 2):
            one(x * factor).square().sum().backward()
        (one(x).sum() + one(x + 1).square().sum()).backward()
        loss = one(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    same_gradients(model, module, "accumulated")


def hooked(model: Model, module: Any, x: Tensor) -> None:
    """Hooks see the whole gradient, once per backward, also if the optimizer's step is one of them."""
    calls: Counter[str] = Counter()

    def double(gradient: Tensor) -> Tensor:
        calls["gradient"] += 1
        return gradient * 2

    def step(parameter: Tensor) -> None:
        calls["step"] += 1
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    handles = []
    for one in (model, module):
        one.zero_grad()
        handles += [one.get_parameter("blocks.1.twice").register_hook(double)]
        handles += [parameter.register_post_accumulate_grad_hook(step) for parameter in one.blocks.parameters()]
        (one(x).square().sum() + one(x + 1).sum()).backward()
    for handle in handles:
        handle.remove()
    assert calls["gradient"] == 2
    after = module.full_state_dict()
    for name, wanted in model.state_dict().items():
        close(after[name], wanted, f"stepped in a hook: {name}")
    same_gradients(model, module, "hooked")


def frozen(model: Model, module: Any, x: Tensor) -> None:
    for one in (model, module):
        one.zero_grad()
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(not name.startswith("blocks.3") and name not in ("blocks.2.up.weight", "blocks.0.norm.weight"))
        one(x).square().sum().backward()
    same_gradients(model, module, "frozen")
    for one in (model, module):
        one.requires_grad_(True)


def interrupted(model: Model, module: Any, x: Tensor) -> None:
    """A backward that fails in the middle leaves nothing behind; neither does a forward whose result is dropped."""
    for one in (model, module):
        one.zero_grad()

    class Failure(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Failure

    handle = module.get_parameter("blocks.1.twice").register_post_accumulate_grad_hook(fail)
    with pytest.raises(Failure):
        module(x).square().sum().backward()
    handle.remove()
    module.zero_grad()
    module(x)
    for one in (model, module):
        one(x).square().sum().backward()
    same_gradients(model, module, "after a failure")


def without_gradients(model: Model, module: Any, x: Tensor) -> None:
    with torch.no_grad():
        close(module(x), model(x), "no_grad")
    with pytest.raises(AutotpError, match="no second derivatives"):
        module(x).square().sum().backward(create_graph=True)
    module.zero_grad()


def compiled(model: Model, module: Any, x: Tensor) -> None:
    """One graph, in which every conversion stands at its place."""
    for one in (model, module):
        one.zero_grad()
    program = torch.compile(module, backend="aot_eager", fullgraph=True)
    program(x).square().sum().backward()
    model(x).square().sum().backward()
    same_gradients(model, module, "compiled")


CHECKS: tuple[Callable[[Model, Any, Tensor], None], ...] = (
    accumulated, frozen, hooked, interrupted, without_gradients, compiled,
)  # fmt: skip


def all_checks() -> None:
    for rests, checks in (("S", CHECKS), ("I", CHECKS[:2]), ("S+", CHECKS[:2])):
        model, module, x = made(rests)
        for check in checks:
            check(model, module, x)


# ---- all together ---------------------------------------------------------------------------------------------------


def tensor_parallel() -> None:
    """Weights that are split and never gathered: the reductions of small gradients alone run late."""
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(12, 20, dtype=torch.float64)
    pins = {"blocks.*.up": "column", "blocks.*.down": "row"}
    module: Any = autotp.parallelize(model, (x,), cluster=splitting_pays(), pins=pins)
    for one in (model, module):
        one(x).square().sum().backward()
    same_gradients(model, module, "tensor parallel")


def training() -> None:
    """One start of the ranks for several ways to split: starting costs more than training."""
    for rests in ("I", "S", "S+"):
        train((2,), rests)
    tensor_parallel()


def test_it_trains_like_one_device_on_two_ranks() -> None:
    run_ranks(training, 2)


def in_flight_and_complete() -> None:
    in_flight()
    all_checks()


def test_exchanges_run_beside_compute_and_gradients_are_complete_whatever_is_done_with_them() -> None:
    run_ranks(in_flight_and_complete, 2)


def test_wrong_wiring_is_caught() -> None:
    """Weights gathered for another copy of the block: the simulation sees it."""
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(6, 20, dtype=torch.float64)
    space, decisions = decided(model, x, "S", (2,))
    ranks = emitted(space, decisions, gradient=True)
    for rank in ranks:
        gathers = {name for name, child in rank.graph.named_children() if "all_gather" in repr(child)}
        calls = [node for node in rank.graph.graph.nodes if node.target in gathers and node.name.startswith("prefetch")]
        calls = [node for node in calls if node.target == calls[0].target]
        calls[1].args, calls[2].args = calls[2].args, calls[1].args
        rank.graph.recompile()
    state = dict(model.named_parameters())
    places = coordinates((2,))
    locals_ = [[scatter(state[spec.name], spec.layout, (2,), at) for spec in rank.state] for rank, at in zip(ranks, places, strict=True)]
    inputs = [[scatter(x, rank.inputs[0].layout, (2,), at)] for rank, at in zip(ranks, places, strict=True)]
    wrong = Simulation(ranks).forward(locals_, inputs)[0][0]
    assert not torch.allclose(wrong, model(x))

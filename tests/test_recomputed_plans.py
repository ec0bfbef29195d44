"""Plans that recompute: whatever a plan makes again, on virtual and on real ranks, the module is equal to the one that keeps everything."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import autotp
from autotp.check import check
from autotp.decisions import Decisions, Recomputed, orders_of, read_plan, recomputable
from autotp.definitions import coordinates, scatter
from autotp.equality import compare, emitted
from autotp.errors import AutotpError
from autotp.layouts import Layout, at_sizes
from autotp.planning import Request, adopt, make_plan, prepare, traced_sizes
from autotp.plans import Plan, RecomputePlan, code_of
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program, Ref
from autotp.random_plans import random_plan, random_recomputed
from autotp.runtime import recompute
from autotp.runtime.random import RandomCall, seed_module
from autotp.simulate import Record, Simulation
from autotp.strategies import Space
from autotp.trace import trace
from tests.benchmarks import memory_accuracy
from tests.models import TOLERANCE, Example, InFloat64, example, splitting_pays
from tests.ranks import run_ranks
from tests.test_experts import stack
from tests.test_liveness import Small

PLANS_EACH = 2


@cache
def traced(name: str) -> tuple[Example, Program]:
    with InFloat64():
        if name == "experts":
            one = Example(stack(layers=3), (torch.randn(3, 7, 6, dtype=torch.float64),), {})
        else:
            one = example("gpt2", resid_pdrop=0.2, attn_pdrop=0.2) if name == "dropout" else example(name)
        return one, trace(one.model, one.args, one.kwargs)


def drawn(name: str, mesh: tuple[int, ...], seed: int) -> tuple[Space, Decisions]:
    """A random plan with random sets of tensors to be made again."""
    _, program = traced(name)
    space, border = prepare(program, Request({f"axis{number}": size for number, size in enumerate(mesh)}))
    prices = ConversionPrices(load_cluster("dgx-h100"), mesh, True, traced_sizes(program))
    return space, random_recomputed(space, random_plan(space, border, prices, seed), seed)


def equal_to_one_device(name: str, mesh: tuple[int, ...], seeds: range) -> None:
    one, _ = traced(name)
    state = {**dict(one.model.named_parameters()), **dict(one.model.named_buffers())}
    for seed in seeds:
        space, decisions = drawn(name, mesh, seed)
        assert decisions.recomputed
        with InFloat64():
            found = compare(space, decisions, state, one.args, one.kwargs, seed=seed)
        assert found.worst < TOLERANCE, f"{name} on {mesh}, seed {seed}: {found.worst} at {found.where}"


@pytest.mark.parametrize(
    ("name", "mesh"), [("llama", (2,)), ("gpt2", (2, 2)), ("gpt2", (3,)), ("experts", (4,))], ids=str
)
def test_random_sets_equal_one_device(name: str, mesh: tuple[int, ...]) -> None:
    equal_to_one_device(name, mesh, range(PLANS_EACH))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2,), (3,), (4,), (2, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "bert", "experts"])
def test_many_random_sets_equal_one_device(name: str, mesh: tuple[int, ...]) -> None:
    equal_to_one_device(name, mesh, range(100, 120))


# ---- against the same plan without recomputation --------------------------------------------------------------------


def simulated(space: Space, decisions: Decisions, one: Example) -> tuple[list[torch.Tensor], list[Record]]:
    """Outputs and gradients of all ranks, and the collectives."""
    ranks = emitted(space, decisions, gradient=True)
    for rank in ranks:
        seed_module(rank.graph, 11)
    values = {**dict(one.model.named_parameters()), **dict(one.model.named_buffers()), **space.program.constants}
    sizes = traced_sizes(space.program)
    state = [
        [
            scatter(values[spec.name].detach(), at_sizes(spec.layout, sizes), rank.mesh, at).clone().requires_grad_(spec.type.requires_grad)
            for spec in rank.state
        ]
        for rank, at in zip(ranks, coordinates(space.mesh), strict=True)
    ]
    inputs = [[one.kwargs[spec.name] for spec in rank.inputs] for rank in ranks]
    simulation = Simulation(ranks)
    outputs = [tensor for result in simulation.forward(state, inputs) for tensor in result]
    roots = [tensor for tensor in outputs if tensor.requires_grad]
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(roots, [torch.randn(root.shape, generator=generator, dtype=root.dtype) for root in roots])
    grads = [leaf.grad for mine in state for leaf in mine if leaf.grad is not None]
    return [*(tensor.detach() for tensor in outputs), *grads], simulation.records


def same_with_dropout(mesh: tuple[int, ...], seeds: range) -> None:
    one, _ = traced("dropout")
    for seed in seeds:
        space, decisions = drawn("dropout", mesh, seed)
        with InFloat64():
            found, _ = simulated(space, decisions, one)
            wanted, _ = simulated(space, replace(decisions, recomputed=()), one)
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
def test_dropout_draws_the_same_numbers_again(mesh: tuple[int, ...]) -> None:
    same_with_dropout(mesh, range(PLANS_EACH))


def _other_seed(self: RandomCall) -> Any:
    return lambda *args, **kwargs: self._sample((self.stream.next() + self.shard) % 2**63, *args, **kwargs)


def _first_operand(self: Any) -> torch.Tensor:
    """A promise that hands out what it rests on."""
    for need in self.call.needs if self.call is not None else ():
        return _honest(need) * 2
    return _honest(self)


_honest = recompute._Remade.tensor


@pytest.mark.parametrize(
    ("owner", "name", "wrong"), [(RandomCall, "drawn", _other_seed), (recompute._Remade, "tensor", _first_operand)], ids=["seed", "value"]
)
def test_planted_errors_are_caught(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        same_with_dropout((2,), range(PLANS_EACH))


# ---- plans ----------------------------------------------------------------------------------------------------------


@cache
def planned() -> tuple[Program, Request, Plan]:
    """A plan for three layers."""
    one = example("llama", num_hidden_layers=3)
    program = trace(one.model, one.args, one.kwargs)
    request = Request({"tp": 2}, pins=MEGATRON)
    return program, request, make_plan(program, request, splitting_pays(), "llama")


COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
MEGATRON = {f"*.layers.*.{name}": "column" if name in COLUMN else "row" for name in (*COLUMN, "o_proj", "down_proj")}


def entries(space: Space, decisions: Decisions, copies: int, share: int = 1) -> tuple[RecomputePlan, ...]:
    """Every `share`-th tensor that can be made again, in the first copies of its block."""
    found = []
    for number in range(len(space.folding.repeats)):
        for ref, layout in recomputable(space, decisions, number)[::share]:
            code = code_of(layout, space.dim_cuts(ref))
            found.append(RecomputePlan(space.program.nodes[ref.node].name, ref.output, code, str(layout), copies, 0.0, 0))
    return tuple(found)


def test_entries_are_read_back_as_nested_sets() -> None:
    program, request, plan = planned()
    space, decisions = adopt(program, request, plan)
    all_ = entries(space, decisions, 1)
    nested = tuple(replace(entry, copies=1 + place % 3) for place, entry in enumerate(all_))
    _, found = adopt(program, request, replace(plan, recomputed=nested))
    assert [(entry.repeat, entry.copies) for entry in found.recomputed] == [(0, 1), (0, 1), (0, 1)]
    sets = [entry.versions for entry in found.recomputed]
    assert sets[0] > sets[1] > sets[2] and sets[0] == set(recomputable(space, decisions, 0))
    graphs = emitted(space, found, gradient=True)[0].graph
    assert sorted(name for name, _ in graphs.named_children() if "recomputing" in name) == [
        f"block_1_recomputing_{number}" for number in (1, 2, 3)
    ]


def test_saved_plans_keep_what_is_recomputed(tmp_path: Path) -> None:
    program, request, plan = planned()
    space, decisions = adopt(program, request, plan)
    changed = replace(plan, recomputed=entries(space, decisions, 2))
    changed.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml").recomputed == changed.recomputed
    assert changed.hash != plan.hash


def wrong_entries(space: Space, entry: RecomputePlan) -> list[tuple[RecomputePlan, str]]:
    loss = next(node for node in reversed(space.program.nodes) if node.op).name
    second = space.program.nodes[space.folding.repeats[0].instance(1)[0]].name
    folded = (space.program.nodes[index] for index, members in space.folding.members.items() if len(members) > 1)
    parameter = next(node for node in folded if node.kind == "parameter")
    ids = next(node for node in space.program.nodes if node.kind == "input").name
    return [
        (replace(entry, node="nowhere"), "a tensor of 'nowhere', which this model does not have"),
        (replace(entry, node=loss), f"recomputes '{loss}', which no repeated block of this model makes"),
        (replace(entry, node=ids), f"recomputes '{ids}', which no repeated block|no tensor of the first copy"),
        (replace(entry, node=second), "which no repeated block of this model makes|no tensor of the first copy"),
        (replace(entry, output=3), "which no repeated block of this model makes"),
        (replace(entry, copies=0), "in 0 copies, expected 1 to 3, as many as its block has"),
        (replace(entry, copies=4), "in 4 copies, expected 1 to 3"),
        (replace(entry, layout="P"), r"as \(P\), which its block does not make; it makes \("),
        (replace(entry, layout="S9"), "plan this model again"),
        (replace(entry, node=parameter.name, layout="I"), r"as \(I\), as it rests, so that nothing is made|does not make"),
    ]


def test_wrong_entries_get_a_sentence() -> None:
    program, request, plan = planned()
    space, decisions = adopt(program, request, plan)
    known = entries(space, decisions, 3)
    partial = {entry.node for entry in known if entry.layout == "P"}
    good = next(entry for entry in known if entry.node not in partial and program.by_name[entry.node].kind == "op")
    for wrong, message in wrong_entries(space, good):
        with pytest.raises(AutotpError, match=message) as caught:
            adopt(program, request, replace(plan, recomputed=(wrong,)))
        assert "\n" not in str(caught.value)
    with pytest.raises(AutotpError, match="twice, expected one entry"):
        check(program, space, replace(plan, recomputed=(good, good)))
    inference = replace(request, mode="inference")
    plan = replace(make_plan(program, inference, splitting_pays(), "llama"), recomputed=(good,))
    with pytest.raises(AutotpError, match="the plan is for inference and recomputes .* only training keeps"):
        adopt(program, inference, plan)


def test_the_order_of_sorted_rows_is_kept() -> None:
    _, program = traced("experts")
    request = Request({"ep": 2})
    plan = make_plan(program, request, splitting_pays(), "experts")
    space, decisions = adopt(program, request, plan)
    block = space.folding.repeats[0].instance(0)
    order = next(index for index in block if program.nodes[index].op.endswith("sort_by_key"))
    assert order in orders_of(decisions)
    assert Ref(order) not in {ref for ref, _ in recomputable(space, decisions, 0)}
    entry = RecomputePlan(program.nodes[order].name, 0, "I", "I", 1, 0.0, 0)
    with pytest.raises(AutotpError, match="the order of sorted rows, which must be the very same in forward and backward"):
        adopt(program, request, replace(plan, recomputed=(entry,)))


def test_a_block_is_not_asked_for_what_it_does_not_make() -> None:
    program, request, plan = planned()
    space, decisions = adopt(program, request, plan)
    ref = recomputable(space, decisions, 0)[0][0]
    wrong = replace(decisions, recomputed=(Recomputed(0, 1, frozenset({(ref, Layout(("P",)))})),))
    with pytest.raises(AutotpError, match="which its block does not make"):
        emitted(space, wrong, gradient=True)
    assert read_plan(space, plan, {}, {}).recomputed == ()


# ---- real ranks -----------------------------------------------------------------------------------------------------


def train(name: str, pins: dict[str, str] | None, share: int, **model: Any) -> None:
    """Three AdamW steps of a plan that makes tensors again beside the same plan that keeps them: equal to the last bit."""
    one = example(name, **model)
    program = trace(one.model, one.args, one.kwargs)
    request = Request({"tp": dist.get_world_size()}, pins=pins)
    plan = make_plan(program, request, splitting_pays(), name)
    space, decisions = adopt(program, request, plan)
    again = replace(plan, recomputed=entries(space, decisions, space.folding.repeats[0].count - 1, share))
    losses, states = [], []
    for one_plan in (plan, again):
        torch.manual_seed(3)
        module = autotp.parallelize(one.model, one.args, one.kwargs, plan=one_plan, check=False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(3):
            loss = module(*one.args, **one.kwargs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        states.append(module.full_state_dict())
    assert all(torch.equal(a, b) for a, b in zip(losses[:3], losses[3:], strict=True)), losses
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def counted(recompute: str) -> Counter[str]:
    """The collectives of a step of a small model of three blocks with every parameter split at rest."""
    step = memory_accuracy.Step(Small(), tuple(torch.randint(0, 300, (2, 8, 32), generator=torch.Generator().manual_seed(1))), {})
    change = memory_accuracy.Change(recompute, zero=True)
    program, request, plan = memory_accuracy.planned(step, "train", 2, change)
    module, args, kwargs = memory_accuracy.module_of(step, program, request, plan, change)
    with CommDebugMode() as comm:
        memory_accuracy.loss_of(module(*args, **kwargs)).backward()
    return Counter({str(kind).split(".")[-1]: count for kind, count in comm.get_comm_counts().items()})


def real_ranks() -> None:
    train("gpt2", {"*.c_attn": "column", "*.c_fc": "column", "*.c_proj": "row"}, 1, resid_pdrop=0.2, attn_pdrop=0.2)
    kept, again = counted("none"), counted("weights")
    assert again - kept == {"all_gather_into_tensor": 6}  # of the weights of two products in three blocks: biases are not asked for


def test_real_ranks_train_to_the_last_bit() -> None:
    run_ranks(real_ranks, 2)


def more_real_ranks() -> None:
    train("llama", MEGATRON, 1, num_hidden_layers=3)
    train("llama", None, 2, batch=5)
    train("gpt2", None, 2, resid_pdrop=0.2, attn_pdrop=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_more_real_ranks_train_to_the_last_bit(ranks: int) -> None:
    run_ranks(more_real_ranks, ranks)

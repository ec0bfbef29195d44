"""Data-parallel axes: where the batch is, and plans that split it on some mesh axes and never on others."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import nn

from autotp import planning
from autotp.batch_axes import batch_border, batch_factors
from autotp.planning import Request, adopt, make_plan
from autotp.plans import Plan
from autotp.program import Ref
from autotp.rules import call_of, rule_of
from autotp.trace import trace
from tests.models import example, splitting_pays

BATCH = {"dp": 0}


def planned(name: str, data: tuple[str, ...] | None, mesh: dict[str, int], **options: object) -> Plan:
    case = example(name, batch=8, seq=12)
    program = trace(case.model, case.args, case.kwargs, dynamic=False)
    inputs, outputs = batch_border(program, ("dp",))
    border = {"inputs": inputs, "outputs": outputs} if data is None and "dp" in mesh else {}
    return make_plan(program, Request(mesh, data=data, **border, **options), splitting_pays(), name, gap=1e-6)  # type: ignore[arg-type]


class SequenceFirst(nn.Module):
    """The batch goes from dim 0 to dim 1, into a merged dim, and out again."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        turned = self.up(x).transpose(0, 1)  # (sequence, batch, 10)
        merged = x.reshape(-1, 6).relu()  # (batch × sequence, 6)
        return turned, merged.view(x.shape), turned.sum()


def test_the_batch_is_followed_through_views() -> None:
    program = trace(SequenceFirst(), (torch.randn(4, 5, 6),), dynamic=False)
    rules = {node.index: rule_of(call_of(node, program.type_of)) for node in program.nodes if node.kind == "op"}
    dims, _ = batch_factors(program, rules)
    turned, merged, total = program.outputs
    assert (dims[turned], dims[merged]) == (1, 0)
    assert total not in dims
    assert all(Ref(node.index) not in dims for node in program.nodes if node.kind == "parameter")
    assert batch_border(program, ("dp",)) == ({"x": BATCH}, {"0": {"dp": 1}, "1": BATCH})


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "mlp"])
def test_every_product_is_split_by_batch_on_the_data_axis_alone(name: str) -> None:
    plan = planned(name, ("dp",), {"dp": 2, "tp": 2})
    products = [node for node in plan.nodes if node.op in ("aten.linear.default", "aten.addmm.default")]
    assert products
    for node in products:
        on_dp, on_tp = node.outputs[0].split("|")
        assert on_dp.startswith("S0"), node
        assert not on_tp.startswith("S0"), node
    assert set(plan.inputs) == {"input_ids", "labels"} if name != "mlp" else set(plan.inputs) == {"input"}


@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_pinned_is_a_2d_plan_and_never_cheaper_than_a_free_one(name: str) -> None:
    mesh = {"dp": 2, "tp": 2}
    free, pinned = planned(name, None, mesh), planned(name, ("dp",), mesh)
    assert free.time.step_s <= pinned.time.step_s * (1 + 1e-5)


@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_where_data_parallelism_is_best_the_free_plan_costs_the_same(name: str) -> None:
    free, pinned = planned(name, None, {"dp": 4}), planned(name, ("dp",), {"dp": 4})
    batch = all(word in ("batch", "replicate") for word in free.strategies.values())
    assert free.time.step_s <= pinned.time.step_s * (1 + 1e-5)
    if batch:
        assert pinned.time.step_s == pytest.approx(free.time.step_s, rel=1e-5)


def test_data_parallelism_reduces_each_gradient_once() -> None:
    """Pure data parallelism by hand: every parameter's gradient is reduced over the axis, and nothing else but the loss moves."""
    plan = planned("mlp", ("dp",), {"dp": 4})
    moved = [entry for entry in plan.conversions if any(entry.forward) or any(entry.backward)]
    assert {entry.node.startswith("p_") for entry in moved} == {True}
    assert len(moved) == 6  # two linears and a norm, weight and bias each
    assert plan.collectives["forward"].get("all_reduce", 0) == 0


def test_a_pinned_plan_is_executable() -> None:
    case = example("llama", batch=8, seq=12)
    program = trace(case.model, case.args, case.kwargs, dynamic=False)
    mesh = {"dp": 2, "tp": 2}
    plan = make_plan(program, Request(mesh, data=("dp",)), splitting_pays(), "llama")
    space, decisions = adopt(program, Request(mesh), plan)
    assert prod(space.mesh) == 4
    assert decisions is not None


@pytest.mark.parametrize(("mesh", "data"), [({"dp": 2, "tp": 2}, ("dp",)), ({"dp": 2, "fsdp": 2, "tp": 2}, ("dp", "fsdp"))])
def test_what_is_left_unpriced_is_in_no_better_plan(monkeypatch: pytest.MonkeyPatch, mesh: dict[str, int], data: tuple[str, ...]) -> None:
    """A plan from all strategies and layouts is as fast as one from those that the data-parallel axes allow."""
    case = example("mlp", batch=8)
    program = trace(case.model, case.args, case.kwargs, dynamic=False)
    found = make_plan(program, Request(mesh, data=data), splitting_pays(), "mlp", gap=1e-9)
    monkeypatch.setattr(planning, "narrowed", lambda space, allowed: (space, allowed))
    monkeypatch.setattr(planning, "layouts_in_use", lambda space, leaving: {})
    whole = make_plan(program, Request(mesh, data=data), splitting_pays(), "mlp", gap=1e-9)
    assert found.time.step_s == pytest.approx(whole.time.step_s, rel=1e-8)
    assert found.kpi["shard_efficiency"] == pytest.approx(whole.kpi["shard_efficiency"])

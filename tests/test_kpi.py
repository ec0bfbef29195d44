"""Key figures against values computed by hand, and in the plans that show them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autotp
from autotp import kpi
from autotp.price.flops import model_flops
from autotp.program import Program
from autotp.report import key_figures, rate, to_json
from autotp.rules import call_of, rule_of
from autotp.trace import trace
from tests.models import example


def test_by_hand() -> None:
    assert kpi.communication_to_computation(1.0, 4.0) == 0.25
    assert kpi.communication_to_computation(0.0, 0.0) == 0.0
    assert kpi.shard_efficiency(alone_s=8.0, compute_s=2.5, ranks=4) == pytest.approx(0.8)  # 8 / (4 · 2.5)
    assert kpi.shard_efficiency(alone_s=8.0, compute_s=1.9, ranks=4) == 1.0  # pieces that run better than the whole
    assert kpi.exposed_communication_s(3.0) == 3.0
    assert kpi.exposed_communication_s(3.0, hidden_s=2.0) == 1.0
    assert kpi.exposed_communication_s(3.0, hidden_s=5.0) == 0.0
    assert kpi.rates(4, 512, 0.5) == {"samples_per_s": 8.0, "tokens_per_s": 4096.0}
    assert kpi.rates(4, None, 0.5) == {"samples_per_s": 8.0}
    assert kpi.rates(None, None, 0.5) == kpi.rates(4, 512, 0.0) == {}
    assert kpi.model_flops_utilisation({100.0: 800.0}, step_s=2.0, ranks=8) == pytest.approx(0.5)  # 800 / (100 · 2 · 8)
    assert kpi.model_flops_utilisation({100.0: 400.0, 50.0: 200.0}, step_s=2.0, ranks=8) == pytest.approx(0.5)
    assert kpi.memory_fraction(30e9, 40e9) == 0.75


@pytest.mark.parametrize(("value", "shown"), [(0.4231, "0.423"), (83.06, "83.1"), (12345.0, "12,300"), (999.6, "1,000")])
def test_rates_have_three_digits(value: float, shown: str) -> None:
    assert rate(value) == shown


def flops(program: Program, train: bool = True) -> float:
    rules = {node.index: rule_of(call_of(node, program.type_of)) for node in program.nodes if node.kind == "op"}
    sizes = {symbol: program.nodes[at.node].outputs[0].hint[at.dim] for symbol, at in program.symbols.items()}
    return sum(model_flops(program, rules, sizes, train).values())


@pytest.mark.parametrize("dynamic", [True, False])
def test_model_flops_of_a_transformer(dynamic: bool) -> None:
    """2 FLOPs per weight of a product and token, and 4 · sequence · heads · head size per token, layer and attention; 3 × in training."""
    case = example("llama", batch=3, seq=10)
    program = trace(case.model, case.args, case.kwargs, dynamic=dynamic)
    products = sum(p.numel() for name, p in case.model.named_parameters() if p.ndim == 2 and "embed" not in name)
    rotary = 2 * 2 * 10  # angles: (2) inverse frequencies times 10 positions, an outer product, without gradient
    forward = 2 * products * 30 + 2 * 4 * 10 * 14 * 4 * 30
    assert flops(program) == pytest.approx(3 * forward, abs=3 * 2 * rotary)
    assert flops(program, train=False) == pytest.approx(forward, abs=2 * rotary)


@pytest.mark.parametrize("transposed", [False, True])
def test_model_flops_of_a_convolution(transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    program = trace(kind(4, 6, 3, groups=2), (torch.randn(5, 4, 8, 8),))
    places = 5 * 8 * 8 if transposed else 5 * 6 * 6  # places of the input meet the kernels; of the output
    kernel = 4 * (6 // 2) * 9 if transposed else 6 * (4 // 2) * 9
    assert flops(program, train=False) == 2 * places * kernel
    assert flops(program) == 3 * 2 * places * kernel


def test_a_plan_on_one_device() -> None:
    case = example("mlp", batch=64)
    plan = autotp.plan(case.model.float(), (case.args[0].float(),), mesh=1)
    peak = autotp.load_cluster("dgx-h100").accelerator.peak_flops["fp32"]
    work = 3 * 2 * 64 * (20 * 31 + 31 * 20)
    assert plan.kpi["model_flops_utilisation"] == pytest.approx(work / peak / plan.time.step_s)
    assert plan.kpi["shard_efficiency"] == 1.0
    assert plan.kpi["exposed_communication_s"] == plan.kpi["communication_to_computation"] == 0.0
    assert plan.kpi["samples_per_s"] == pytest.approx(64 / plan.time.step_s)
    assert "tokens_per_s" not in plan.kpi  # its second dim is no sequence
    memory = autotp.load_cluster("dgx-h100").accelerator.memory_bytes
    assert plan.kpi["memory_fraction"] == pytest.approx(plan.memory.total / memory)


def test_a_plan_of_tokens_and_its_report() -> None:
    case = example("llama", batch=4, seq=16, dtype=torch.float32)
    plan = autotp.plan(case.model, kwargs=case.kwargs, mesh=2)
    assert plan.kpi["tokens_per_s"] == pytest.approx(4 * 16 / plan.time.step_s)
    assert plan.kpi["exposed_communication_s"] == plan.time.communication_s
    assert to_json(plan)["kpi"] == dict(plan.kpi)
    shown = dict(key_figures(plan))
    assert shown["tokens per second"] == rate(plan.kpi["tokens_per_s"])
    assert "samples per second" not in shown
    for title in ("exposed communication", "model FLOPs utilisation", "shard efficiency", "memory of the device"):
        assert title in str(plan)

"""Verification: equal models pass, planted differences are found, random plans are legal and reproducible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autotp import trace_once
from autotp.equality import compare
from autotp.errors import AutotpError
from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.random_plans import random_plan
from autotp.trace import trace
from autotp.verify import Check, VerifyReport, cluster_where_splitting_pays, narrowest, verify, without_dropout

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.up, self.down, self.drop = nn.Linear(6, 10), nn.Linear(10, 6), nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(1))
    def forward(self, ids):
        self.steps.add_(1)
        x = self.embed(ids)
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))

def net(batch=2, seq=5):
    return Net(), (torch.randint(11, (batch, seq)),)

class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
    def forward(self, x):
        return self.up(x).float().softmax(-1)

def casting(batch=2):
    return Casting(), (torch.randn(batch, 4),)

class Deceiving(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
    def forward(self, x):
        x = self.up(x)
        return x * 2 if isinstance(x, torch._subclasses.FakeTensor) else x * 3

def deceiving(batch=2):
    return Deceiving(), (torch.randn(batch, 4),)

class InEval(Deceiving):
    def forward(self, x):
        return super().forward(x) if not self.training else self.up(x)

def in_eval(batch=2):
    return InEval(), (torch.randn(batch, 4),)

class Broken(Deceiving):
    def forward(self, x):
        if not isinstance(x, torch._subclasses.FakeTensor):
            raise ValueError("no kernel")
        return self.up(x)

def broken(batch=2):
    return Broken(), (torch.randn(batch, 4),)

class Scaled(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.up, self.index = nn.Linear(4, 4), index
    def forward(self, x):
        return self.up(x) * (self.index + 1)

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet, self.layers = nn.Linear(4, 4), nn.ModuleList(Scaled(index) for index in range(4))
    def forward(self, x):
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x)
        return x

def deep(batch=2):
    return Deep(), (torch.randn(batch, 4),)
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(NET)
    return str(path)


@pytest.mark.parametrize("axes", [{"tp": 2}, {"dp": 2, "tp": 2}, {"tp": 3}])
def test_equal(code: str, axes: dict[str, int]) -> None:
    report = verify(f"{code}:net", axes=axes, batch=3, seq=7, plans=3)
    assert report.passed
    assert [check.name for check in report.checks] == [
        *("eager and traced", "eager and traced, 4 × 10", "eager and traced, eval mode"),
        *("each block traced once and all of them", "the planner's plan"),
        *("random plan 0", "random plan 1", "random plan 2"),
    ]
    assert all(check.error is not None and check.error < 1e-12 for check in report.checks)
    assert (report.tolerance, report.precision, report.batch, report.sequence) == (1e-9, "float64", 3, 7)


def test_float32_inside_is_said(code: str) -> None:
    report = verify(f"{code}:casting", axes={"tp": 2}, plans=1)
    assert (report.tolerance, report.precision, report.passed) == (1e-5, "float32", True)


def test_a_trace_that_differs_is_found(code: str) -> None:
    report = verify(f"{code}:deceiving", axes={"tp": 2}, plans=0)
    first = report.checks[0]
    assert not report.passed
    assert not report.passes(first)
    assert first.where.startswith(("output", "gradient"))
    assert report.worst > 0.1
    assert report.passes(report.checks[-1])  # the plan is equal to the (wrong) trace


def test_a_trace_that_differs_in_eval_mode_is_found(code: str) -> None:
    report = verify(f"{code}:in_eval", axes={"tp": 2}, plans=0)
    assert [report.passes(check) for check in report.checks] == [True, True, False, True, True]


def test_a_block_wrongly_traced_once_is_found(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(f"{code}:deep", axes={"tp": 2}, plans=0).passed
    monkeypatch.setattr(trace_once.Block, "fits", lambda *_: True)
    monkeypatch.setattr(trace_once, "same_body", lambda *_: True)
    report = verify(f"{code}:deep", axes={"tp": 2}, plans=0)
    wrong = [check for check in report.checks if not report.passes(check)]
    assert [(check.name, check.error, check.where) for check in wrong][-1] == (
        *("each block traced once and all of them", float("inf"), "node mul_2 in `layers.2`"),
    )


def test_a_model_that_cannot_run_is_no_verified_model(code: str) -> None:
    with pytest.raises(AutotpError, match=r"cannot be verified: the model itself cannot be run here \(no kernel\)"):
        verify(f"{code}:broken", axes={"tp": 2}, plans=0)


def test_nan_does_not_pass() -> None:
    report = VerifyReport("m", 1, {}, 1, None, 1e-9, "float64", (Check("a", float("nan"), ""), Check("b", 0.0, "")), ())
    assert not report.passed
    assert report.worst != report.worst
    assert replace(report, checks=(Check("c", None, "fixed"),)).passed


def test_wrong_requests(code: str) -> None:
    with pytest.raises(AutotpError, match="-1 random plans cannot be made"):
        verify(f"{code}:net", axes={"tp": 2}, plans=-1)
    with pytest.raises(AutotpError, match="no such model"):
        verify("nosuch", axes={"tp": 2})


def test_helpers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout2d(0.3))
    without_dropout(model)
    assert [module.p for module in model if isinstance(module, (nn.Dropout, nn.Dropout2d))] == [0.0, 0.0]
    fast = load_cluster("dgx-h100")
    slow = cluster_where_splitting_pays(fast)
    assert slow.links == fast.links
    assert slow.accelerator.peak_flops["bf16"] < 1e-6 * fast.accelerator.peak_flops["bf16"]
    program = trace(model.to(torch.float32), (torch.ones(2, 4),))
    assert narrowest(program) is torch.float32


@pytest.mark.parametrize("mesh", [(2,), (4,), (2, 2)])
def test_random_plans(mesh: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)).double()
    args: tuple[Any, ...] = (torch.randn(3, 5, 6, dtype=torch.float64),)
    program = trace(model, args)
    request = Request({f"axis{number}": count for number, count in enumerate(mesh)})
    space, border = prepare(program, request)
    prices = ConversionPrices(load_cluster("dgx-h100"), mesh, True, traced_sizes(program))
    plans = [random_plan(space, border, prices, seed) for seed in range(6)]
    assert plans[0] == random_plan(space, border, prices, 0)
    assert len({tuple(s.key for s in plan.chosen.values()) for plan in plans}) == 6
    kinds = {kind for plan in plans for s in plan.chosen.values() for layout in s.outputs for kind in layout.kinds}
    assert {"I", "R", "S", "P"} <= kinds
    for plan in plans:
        assert compare(space, plan, dict(model.named_parameters()), args, {}).worst < 1e-12

"""Every model of the suite, with a memory limit and with overlap: what the folded problem claims is the recount on the unfolded graph."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from autotp.describe import describe
from autotp.errors import AutotpError
from autotp.loading import LoadedModel
from autotp.memory_limit import Fitted, Walk, solve_within
from autotp.planning import Request, least_peak, pose
from autotp.plans import Plan
from autotp.price.cluster import load_cluster
from autotp.problem import Problem
from autotp.program import Program
from autotp.trace import trace
from tests.models import CONFIGS, example
from tests.zoo.catalogue import case_of
from tests.zoo.test_zoo_sample import AT_THREE, AT_TWO

DEPTH = {"gpt2": "n_layer"}
FAST = ("gpt2", "llama", "gemma2", "bert")
"""The others differ from these in little, and each takes seconds."""
SQUARE = {"dp": 2, "tp": 2}


def recounted(program: Program, request: Request, cluster: str) -> tuple[Fitted, Plan]:
    """A solution with its claim, and the plan in which everything is added up again over all copies; it need not be the best one."""
    posed = pose(program, request, load_cluster(cluster))
    fitted = solve_within(posed.formulation.problem, posed.walk, time_limit=4, gap=0.1)
    plan = describe(
        posed.space, posed.prices, posed.border, posed.formulation, fitted.solution, model="claims", mode=request.mode, axes=request.axes,
        memory=fitted.memory, recomputation=fitted.recomputation,
    )  # fmt: skip
    return fitted, plan


def holds(program: Program, request: Request, cluster: str) -> tuple[Fitted, Plan]:
    """The claim is the recount, to rounding; the limit is kept."""
    fitted, plan = recounted(program, request, cluster)
    assert plan.time.step_s == pytest.approx(fitted.seconds, rel=1e-9)
    assert plan.time.step_s == pytest.approx(plan.time.compute_s + plan.time.communication_s - plan.time.hidden_s, rel=1e-9)
    if request.memory is not None:
        assert plan.memory.total <= request.memory
    return fitted, plan


def under_all(program: Program, axes: dict[str, int], cluster: str) -> None:
    """With overlap, and both with and without it under a limit between the least peak and that of the fastest plan."""
    free = Request(axes, overlap=True)
    fitted, _ = holds(program, free, cluster)
    least = least_peak(program, free, load_cluster(cluster))
    limit = least + 0.3 * max(fitted.memory.total - least, 0.0) + 1024
    for overlap in (False, True):
        holds(program, replace(free, overlap=overlap, memory=limit), cluster)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CONFIGS])
def test_a_claim_is_its_recount(name: str) -> None:
    made = example(name, **{DEPTH.get(name, "num_hidden_layers"): 3})
    under_all(trace(made.model, made.args, made.kwargs, dynamic=False), SQUARE, "derecho")


def test_a_wrong_claim_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = solve_within

    def wrong(problem: Problem, walk: Walk, *, time_limit: float, gap: float) -> Fitted:
        found = right(problem, walk, time_limit=time_limit, gap=gap)
        return replace(found, seconds=found.seconds * (1 + 1e-6))

    made = example("llama", num_hidden_layers=3)
    program = trace(made.model, made.args, made.kwargs, dynamic=False)
    monkeypatch.setattr(sys.modules[__name__], "solve_within", wrong)
    with pytest.raises(AssertionError):
        holds(program, Request(SQUARE), "derecho")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*AT_TWO, *AT_THREE])
def test_a_claim_is_its_recount_for_every_family(name: str) -> None:
    loaded: LoadedModel = case_of(name).build(torch.float32)
    try:
        program = trace(loaded.model, loaded.args, loaded.kwargs)
    except AutotpError as refused:
        pytest.skip(str(refused))
    under_all(program, SQUARE, "derecho")

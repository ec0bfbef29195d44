"""What the problem says making tensors again costs, against the ladders of the plan's own walk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotp.planning import Request, pose
from autotp.price.cluster import load_cluster
from autotp.problem import bytes_of, made_again
from autotp.recompute import recomputation
from autotp.solve import solve
from autotp.trace import trace
from tests.models import example


@pytest.mark.parametrize(("name", "mesh"), [("llama", {"tp": 4}), ("llama", {"dp": 2, "tp": 2}), ("gpt2", {"tp": 4})])
def test_the_estimate_is_near_what_is_walked(name: str, mesh: dict[str, int]) -> None:
    deep = {"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}
    one = example(name, **deep)
    posed = pose(trace(one.model, one.args, one.kwargs, dynamic=False), Request(mesh, memory=1e12), load_cluster("dgx-h100"))
    free = replace(posed.formulation.problem, limit=None)
    found = solve(free)
    walked = posed.walk(found)
    whole = bytes_of(free, found.chosen)
    most = recomputation(walked.ladders, float("inf")).bytes - walked.spare
    for part in (0.2, 0.4, 0.6, 0.8):
        asked = made_again(replace(free, limit=whole - part * most), found.chosen)
        estimate = sum(share * version.again for version, share in asked)
        actual = recomputation(walked.ladders, part * most + walked.spare).seconds
        assert 0.75 * actual <= estimate <= 1.05 * actual

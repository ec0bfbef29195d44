"""The search over meshes: shapes, what is left out and why, the fastest that fits, and what would fit where nothing does."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import inf, prod
from typing import Any

import pytest
import torch

import autotp
from autotp import cli_common
from autotp.batch_axes import sizes_of
from autotp.errors import AutotpError
from autotp.mesh_choice import does_not_fit, fastest_mesh, plan_on
from autotp.mesh_search import MeshSearch, Traced
from autotp.mesh_shapes import mesh_name, meshes_on, node_size, variants
from autotp.planning import Request
from autotp.price.cluster import Cluster, load_cluster
from autotp.recommendation import TIE
from autotp.solve import OutOfMemoryError
from autotp.trace import trace
from tests.models import example, splitting_pays


def two_per_node() -> Cluster:
    """Slow devices, two in each node, so that four of them cross nodes."""
    cluster = splitting_pays()
    return replace(cluster, links=(replace(cluster.links[0], devices=2), *cluster.links[1:]))


def searched(memory: float | None = None, cluster: Cluster | None = None, **options: Any) -> MeshSearch:
    case = example("mlp", batch=64, dtype=torch.float32)
    program = trace(case.model, case.args, dynamic=False)
    request = Request({"tp": 1}, memory=memory)
    return MeshSearch(Traced(program, *sizes_of(program)), request, cluster or two_per_node(), "mlp", **options)


# Shapes


def names(gpus: int, batch: int | None, cluster: str) -> list[str]:
    return [mesh_name(mesh) for mesh in meshes_on(gpus, node_size(load_cluster(cluster), gpus), batch)]


def test_meshes_of_all_devices() -> None:
    assert names(8, 8, "derecho") == ["dp=2 × tp=4", "dp=4 × tp=2", "dp=8", "tp=8"]
    assert names(64, 64, "dgx-h100")[0] == "dp=8 × tp=8"
    assert names(64, 1, "dgx-h100") == ["cp=8 × tp=8"]  # nothing but tp over 8 nodes: an axis of its own
    assert names(64, 2, "dgx-h100") == ["dp=2 × cp=4 × tp=8"]
    assert names(1, 1, "dgx-h100") == ["1 GPU"]


def test_axes_are_bound_to_tiers() -> None:
    superpod, derecho = load_cluster("dgx-h100-superpod"), load_cluster("derecho")
    found = [mesh_name(mesh) for mesh in variants({"dp": 256, "tp": 2}, superpod)]
    assert "dp=64 × fsdp=4 × tp=2" in found  # fsdp and tp fill a node
    assert "dp=2 × fsdp=128 × tp=2" in found  # they fill what a leaf switch joins
    assert "dp=16 × fsdp=16 × tp=2" in found
    assert "tp=2 × dp=256" in found
    assert [mesh_name(mesh) for mesh in variants({"tp": 8}, derecho)] == ["cp=2 × tp=4"]
    assert variants({"dp": 2, "tp": 2}, derecho) == []  # inside a node all links are equal
    for mesh in variants({"dp": 64, "tp": 8}, superpod):
        assert prod(mesh.values()) == 512
        assert min(mesh.values()) > 1


# The search


@pytest.mark.parametrize("memory", [None, 30e3, 20e3])
def test_what_is_left_out_would_not_have_won(memory: float | None) -> None:
    """Every mesh is planned within the limit, one by one: none that fits beats what the search found."""
    search = searched(memory)
    found = fastest_mesh(search, 4)
    everything = [inf]
    for candidate in found:
        with suppress(OutOfMemoryError):
            everything.append(search.plan(candidate.mesh, search.request.memory).time.step_s)
    assert found[0].plan is not None
    assert found[0].plan.memory.total <= search.limit
    assert found[0].step_s <= min(everything) * (1 + TIE + 2e-3)
    for candidate in found:
        if candidate.plan and candidate.bound_s is not None:
            assert candidate.bound_s <= candidate.step_s * (1 + 2e-3)


def test_unlimited_plans_bound_limited_ones_and_state_bounds_memory() -> None:
    search = searched()
    free = search.plan({"dp": 2, "tp": 2}, None)
    assert search.state_bytes / 4 <= search.least({"dp": 2, "tp": 2}) <= free.memory.total
    assert 1.1 * 4 * free.time.step_s >= search.alone_s


def test_few_devices_are_left_out_where_they_cannot_win() -> None:
    """Beyond the first twelve meshes, those of devices that together could not be as fast are neither planned nor listed."""
    search = searched()
    said: list[str] = []
    shapes = [{"dp": 4}, *[{"dp": 2, "tp": 2}] * 12, {"tp": 1}]
    found = replace(search, progress=said.append).candidates(shapes)
    assert len(found) == 13
    assert not any("1 GPU" in words for words in said)


def test_what_is_nearest_is_larger_and_fits() -> None:
    free = searched().least({"dp": 2})
    search = searched(0.6 * free)
    nearest, needed, _ = search.nearest({"dp": 2}, free)
    assert nearest in ({"dp": 4}, {"dp": 8}, {"dp": 16})
    assert needed <= search.limit
    assert search.plan(nearest, search.limit).memory.total <= search.limit
    sentence = str(does_not_fit(search, {"dp": 2}, free, "GiB"))
    assert sentence.count("GiB") + sentence.count("KiB") + sentence.count("MiB") >= 3
    assert f"; dp={nearest['dp']} would do with " in sentence
    nowhere = searched(1000.0)
    assert nowhere.nearest({"dp": 2}, free) == (None, inf, [])
    assert "no larger mesh of this kind was found" in str(does_not_fit(nowhere, {"dp": 2}, free))
    small = searched(0.6 * free, replace(two_per_node(), links=(replace(two_per_node().links[0], devices=2),)))
    assert small.larger({"dp": 2}) == []  # the cluster has no more devices


# From models and the command line


def test_a_plan_for_a_number_of_devices() -> None:
    case = example("mlp", batch=8, dtype=torch.float32)
    plan = autotp.plan(case.model, case.args, gpus=4, cluster=two_per_node())
    assert prod(plan.mesh.values()) == 4
    assert any(f" meshes of 4 GPUs {mesh_name(plan.mesh)} is best with " in note for note in plan.notes)
    if "dp" in plan.mesh:
        assert any("the batch is split over dp" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give either mesh, such as"),
        ({"mesh": 2, "gpus": 2}, "give either mesh, such as"),
        ({"gpus": 0}, "the number of GPUs is 0"),
        ({"gpus": 2, "inputs": {"input": {"dp": 0}}}, "inputs and outputs name axes of a mesh, which gpus leaves open"),
        ({"gpus": 2, "memory": 10.0}, "the memory limit of 10 B per device cannot be kept: the least that would do on 2 GPUs, with "),
    ],
)
def test_wrong_requests(options: dict[str, Any], sentence: str) -> None:
    case = example("mlp", batch=8, dtype=torch.float32)
    with pytest.raises(AutotpError, match=sentence):
        autotp.plan(case.model, case.args, **options)


def test_a_plan_larger_than_the_device_says_so() -> None:
    case = example("mlp", batch=8, dtype=torch.float32)
    cluster = load_cluster("dgx-h100")
    small = replace(cluster, accelerator=replace(cluster.accelerator, memory_bytes=2**12))
    plan = autotp.plan(case.model, case.args, mesh=2, cluster=small)
    assert any(note.startswith("does not fit: it needs ") and " per device; give a memory limit" in note for note in plan.notes)
    assert not any("does not fit" in note for note in autotp.plan(case.model, case.args, mesh=2).notes)


def test_plan_on_says_what_was_tried() -> None:
    plan = plan_on(searched(), 4)
    told = next(note for note in plan.notes if note.startswith("of "))
    for mesh in meshes_on(4, 2, 64):
        assert mesh_name(mesh) in told


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain line now and then."""
    monkeypatch.setattr(cli_common, "QUIET", 0.0)
    with cli_common.progress() as step:
        step("planning m on dp=2")
    assert capsys.readouterr().err == "autotp: planning m on dp=2 …\n"
    monkeypatch.setattr(cli_common, "QUIET", 3600.0)
    with cli_common.progress() as step:
        step("planning m on dp=2")
    assert capsys.readouterr().err == ""

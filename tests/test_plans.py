from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotp.errors import AutotpError
from autotp.layouts import Layout, Segment, Split, plain_cut
from autotp.planning import Request, make_plan
from autotp.plans import Plan, code_of, layout_of, write_whole
from autotp.price.cluster import load_cluster
from autotp.trace import trace
from tests.models import example

CUTS = [(plain_cut(8),), (plain_cut(6), (Segment(1, 3, 2),))]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(("I", "R")),
        Layout(("P", "M")),
        Layout(("S", "I"), (Split(1, (0,), CUTS[1][1]),)),
        Layout(("S", "S"), (Split(0, (1, 0), CUTS[0][0]),)),
        Layout(("S", "S"), (Split(0, (1,), CUTS[0][0]), Split(1, (0,), CUTS[1][0]))),
    ],
)
def test_codes_round_trip(layout: Layout) -> None:
    assert layout_of(code_of(layout, CUTS), CUTS) == layout


@pytest.mark.parametrize("code", ["S7|I", "S0:9|I", "X|I", "S|I"])
def test_bad_codes_are_refused(code: str) -> None:
    with pytest.raises(AutotpError, match="plan this model again"):
        layout_of(code, CUTS)


def made() -> Plan:
    one = example("gpt2")
    program = trace(one.model, one.args, one.kwargs, dynamic=False)
    return make_plan(program, Request({"tp": 4}, inputs={"input_ids": {"tp": 0}}), load_cluster("dgx-h100"), "gpt2")


def test_plans_round_trip_through_yaml(tmp_path: Path) -> None:
    plan = made()
    plan.save(tmp_path / "plan.yaml")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert loaded == plan
    assert loaded.hash == plan.hash
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_every_tensor_has_a_layout() -> None:
    layouts = made().layouts
    assert layouts["input_ids"] == ("S(0)",)
    assert layouts["p_transformer_ln_f_weight"] == ("I",)


def test_the_hash_covers_decisions_and_not_prices() -> None:
    from dataclasses import replace

    plan = made()
    assert replace(plan, time=replace(plan.time, step_s=1.0)).hash == plan.hash
    assert replace(plan, conversions=plan.conversions[1:]).hash != plan.hash
    assert replace(plan, mode="inference").hash != plan.hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not a YAML file"),
        ("hello", "not an autotp plan"),
        ("autotp_plan: 99", "reads format 2"),
        ("autotp_plan: 2", "damaged"),
        ("{autotp_plan: 2, model: m, mode: train, mesh: 3}", "damaged"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(AutotpError, match=message):
        Plan.load(tmp_path / "plan.yaml")


def test_what_is_no_plain_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    write_whole("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_missing_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(AutotpError, match="cannot read the plan"):
        Plan.load(tmp_path / "missing.yaml")
    with pytest.raises(AutotpError, match="cannot write"):
        write_whole(tmp_path / "no" / "folder.yaml", "x")


def test_an_axis_that_splits_nothing_is_said() -> None:
    model, inputs = torch.nn.Linear(2, 2), torch.ones(1, 2)  # too small for communication to pay
    plan = make_plan(trace(model, (inputs,)), Request({"dp": 2, "tp": 2}), load_cluster("dgx-h100"), "tiny")
    assert [note for note in plan.notes if "splits nothing" in note] == [
        f"mesh axis {name} splits nothing here: with 2 times fewer devices a step takes as long." for name in ("dp", "tp")
    ]
    split = make_plan(trace(model, (inputs,)), Request({"tp": 2}, pins={"": "column"}), load_cluster("dgx-h100"), "tiny")
    assert not [note for note in split.notes if "splits nothing" in note]

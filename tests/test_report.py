"""The report: folding layers into rows, the table at several widths, and the JSON keys."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autotp.plans import ConversionPlan, MemoryUse, NodePlan, Plan, RecomputePlan, Solver, Time
from autotp.report import render, to_json
from autotp.report_rows import Row, duration, fold_rows, ranges, rows, size

LAYERS = 4


def node(name: str, op: str, path: str, copies: int = LAYERS, strategy: str = "column", **more: object) -> NodePlan:
    entry = NodePlan(name, op, path, copies, ("o",), ("R", "S0"), ("S2",), ("S(2)",), strategy, 1e-3)
    return replace(entry, **more)  # type: ignore[arg-type]


def weight(path: str, layout: str, copies: int = LAYERS) -> NodePlan:
    return node(f"p_{path}", "parameter", path, copies, "split 0", shows=(layout,), outputs=(layout,), seconds=0.0)


@pytest.fixture
def plan() -> Plan:
    """Four equal layers of a column and a row linear, and a loss without a rule."""
    strategies = {
        f"layers.{i}.{name}": word for i in range(LAYERS) for name, word in (("up", "column"), ("down", "row"))
    }
    return Plan(
        model="small",
        mode="train",
        mesh={"tp": 2},
        cluster="dgx-h100",
        batch=2,
        sequence=16,
        program="0",
        nodes=(
            weight("layers.0.up.weight", "S(0)"),
            weight("layers.0.up.bias", "S(0)"),
            weight("layers.0.down.weight", "S(1)"),
            node("up", "aten.linear.default", "layers.0.up"),
            node("act", "aten.gelu.default", "layers.0.act"),
            node("down", "aten.linear.default", "layers.0.down", strategy="row", shows=("P",)),
            node("loss", "aten.strange.default", "", 1, "replicate", shows=("I",)),
            node("tiny", "aten.neg.default", "nowhere", 1, seconds=0.0),
        ),
        conversions=(
            ConversionPlan("down", 0, LAYERS, ("P", "I"), ("P", "I"), ("all_reduce over tp",), ("",), 2**20, 1e-3),
            ConversionPlan("p_layers.0.up.bias", 0, 4, ("I", "R"), ("I", "R"), ("",), ("all_reduce over tp",), 64, 0.0),
            ConversionPlan("act", 0, 4, ("S2", "P"), ("S(2)", "P"), ("pad over tp",), ("slice over tp",), 64, 0.0),
        ),
        strategies=strategies,
        collectives={"forward": {"all_reduce": LAYERS}, "backward": {"all_reduce": 1}},
        time=Time(5e-3, 4e-3, 1e-3),
        memory=MemoryUse(1e9, 1e9, 6e9, 5e8, 1e8),
        solver=Solver("HiGHS", "optimal", 0.0, 0.5),
        kpi={"communication_to_computation": 0.25, "shard_efficiency": 0.9},
        replicated={"aten.strange.default": 1e-3},
        notes=("Something was assumed.",),
    )


def test_one_row_per_module(plan: Plan) -> None:
    found = {row.path: row for row in rows(plan)}
    assert list(found) == ["layers.0-3.up", "layers.0-3.act", "layers.0-3.down", ""]
    up, down, loss = found["layers.0-3.up"], found["layers.0-3.down"], found[""]
    assert (up.operator, up.strategy, up.weight, up.output) == ("linear", "column", "S(0)", "S(2)")
    assert up.traffic == (("– / all-reduce", "weight grad: 64 B"),)
    assert (down.strategy, down.weight, down.traffic) == ("row", "S(1)", (("all-reduce / –", "summed: 1 MiB"),))
    assert down.seconds == pytest.approx(2e-3)
    assert loss.traffic == (("", "strange: no rule, costs 1.0 ms"),)
    assert found["layers.0-3.act"].traffic == (("", "stays local"),)


@pytest.mark.parametrize("width", [100, 110, 120, 130, 140])
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"dp": 2, "tp": 4}])
def test_table_fits(plan: Plan, width: int, mesh: dict[str, int]) -> None:
    text = render(replace(plan, mesh=mesh), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    for word in ("small", "train", "dgx-h100", "batch 2 × sequence 16", "layers.0-3.up", "optimal", "8.0 GiB", "90%"):
        assert word in text
    assert "no rule: strange is replicated on every rank, which costs 1.0 ms per step; autotp.rule gives it one" in text
    assert "note: Something was assumed." in text
    assert "dp=2 × tp=4" in text or mesh == {"tp": 2}


def test_colors_change_nothing_else(plan: Plan) -> None:
    import re

    colored = render(plan, 140, color=True)
    assert "\x1b[36mcolumn" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored).split() == render(plan, 140).split()
    assert str(plan).splitlines()[0] == render(plan, 140).splitlines()[0]


def test_not_optimal_is_said(plan: Plan) -> None:
    text = render(replace(plan, solver=Solver("HiGHS", "feasible", 0.03, 300.0)))
    assert "solver: feasible, at most 3 % above the optimum (HiGHS, 300.00 s)" in text


@pytest.mark.parametrize("width", [100, 140])
def test_what_is_recomputed_is_shown(plan: Plan, width: int) -> None:
    assert "recomputed" not in render(plan, width)
    found = replace(
        plan,
        recomputed=(
            RecomputePlan("act", 0, "S2", "S(2)", 3, 2e-4, 3 * 2**20),
            RecomputePlan("p_layers.0.up.weight", 0, "R", "R", 2, 1e-4, 2**21),
        ),
    )
    lines = [line.split() for line in render(found, width).splitlines() if "recomputed" in line or " of 4" in line]
    assert [*"layers.*.act gelu 3 of 4 3 MiB 200 µs".split()] in lines
    assert [*"layers.*.up weight → (R) 2 of 4 2 MiB 100 µs".split()] in lines
    assert any("300" in line and "6%" in line for line in lines) and any(line[-2:] == ["5", "MiB"] for line in lines)
    assert to_json(found)["time"]["recomputation_s"] == pytest.approx(3e-4)
    assert [entry["copies"] for entry in to_json(found)["recomputed"]] == [3, 2]


def test_json_keys(plan: Plan) -> None:
    found = json.loads(json.dumps(to_json(plan)))
    assert list(found) == [
        *("model", "mode", "cluster", "mesh", "batch", "sequence", "strategies", "collectives"),
        *("time", "memory", "solver", "kpi", "recomputed", "notes"),
    ]
    assert found["strategies"]["layers.3.down"] == "row"
    assert found["collectives"] == {"forward": {"all_reduce": 4}, "backward": {"all_reduce": 1}}
    assert list(found["time"]) == ["step_s", "compute_s", "communication_s", "recomputation_s"]
    assert list(found["memory"]) == ["parameters", "cache", "gradients", "optimizer", "activations", "transient", "total"]
    assert found["memory"]["total"] == pytest.approx(8.6e9)
    assert list(found["solver"]) == ["status", "gap", "seconds", "unlimited_gap"]
    assert list(found["kpi"]) == ["communication_to_computation", "shard_efficiency"]


def made(path: str, copies: int, operator: str = "linear") -> Row:
    return Row(path, copies, operator, "column", "", "", (("", ""),), 1.0)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([("h.0.a", 6)], ["h.0-5.a"]),
        ([("h.0.a", 1), ("h.1.a", 5)], ["h.0-5.a"]),  # equal content: one row
        ([("h.0.a", 1, "mul"), ("h.1.a", 5)], ["h.0.a", "h.1-5.a"]),
        ([("h.0.a", 3, "mul"), ("h.1.a", 3)], ["h.0,2…4.a", "h.1,3…5.a"]),  # alternating layers
        ([("h.0.a", 1, "sin"), ("h.1.a", 3, "mul"), ("h.2.a", 2)], ["h.0.a", "h.1,3…5.a", "h.2,4.a"]),
        ([("h.0.a", 6), ("h.5.a", 1, "mul")], ["h.0-5.a"]),  # some operators of the last layer stand alone
        ([("h.0.b", 6)], ["h.0-5.b"]),  # a module without weights
        ([("h.0.a", 9)], ["h.0.a ×9"]),  # more copies than layers
        ([("head", 1)], ["head"]),
    ],
)
def test_layers_fold(given: list[tuple[str, int, str]], shown: list[str]) -> None:
    folded = fold_rows([made(*row) for row in given], [f"h.{layer}.a" for layer in range(6)] + ["head"])
    assert [row.path for row in folded] == shown
    assert sum(row.seconds for row in folded) == len(given)


def test_numbers_for_people() -> None:
    assert [ranges(x) for x in ([3], [0, 1, 2], [0, 2, 4], [0, 1, 5])] == ["3", "0-2", "0,2…4", "0-1,5"]
    assert [size(x) for x in (12, 2**20, 1536 * 2**20)] == ["12 B", "1 MiB", "1.5 GiB"]
    assert [duration(x) for x in (2.5, 0.123, 4e-5, 0.0)] == ["2.5 s", "123 ms", "40.0 µs", "0.0 µs"]

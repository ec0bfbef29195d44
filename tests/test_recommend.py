"""`autotp recommend`: meshes, ranking, verdicts, what does not fit, and wrong input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import autotp
from autotp import cli, cli_common
from autotp.errors import AutotpError
from autotp.mesh_shapes import check_devices, mesh_name, meshes_of
from autotp.plans import MemoryUse, Plan, Solver, Time
from autotp.price.cluster import load_cluster
from autotp.recommendation import Candidate, Recommendation, ranked
from autotp.report_recommend import render, to_data
from tests.models import example, splitting_pays

ROOT = Path(__file__).resolve().parent.parent
MLP = f"{ROOT / 'examples' / 'mlp.py'}:mlp"
LLAMA_2_13B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 4,  # of 40: all are equal, and so is what a mesh costs for each
    "num_attention_heads": 40,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def fake(mesh: dict[str, int], step_s: float, communication_s: float = 0.0, words: str = "") -> Candidate:
    plan = Plan(
        model="m", mode="train", mesh=mesh, cluster="c", batch=8, sequence=16, program="", nodes=(), conversions=(),
        strategies={"m": words} if words else {},
        collectives={"forward": {}, "backward": {}}, time=Time(step_s, step_s - communication_s, communication_s),
        memory=MemoryUse(1e9, 0, 0, 0, 0), solver=Solver("HiGHS", "optimal", 0.0, 0.0),
        kpi={"tokens_per_s": 128 / step_s, "samples_per_s": 8 / step_s, "model_flops_utilisation": 0.5},
    )  # fmt: skip
    return Candidate(mesh, plan)


def found(*candidates: Candidate, gpus: int = 8, remedies: tuple[str, ...] = ()) -> Recommendation:
    return Recommendation("m", "train", "c", gpus, 4, 8, 16, 40e9, 80e9, ranked(candidates), remedies)


# Meshes and ranks


def test_meshes() -> None:
    names = [mesh_name(mesh) for mesh in meshes_of(8, 4, 8)]
    assert names == [
        *("dp=2 × tp=4", "dp=4 × tp=2", "dp=8", "tp=8"),  # tensor parallelism inside a node of 4 before across nodes
        *("tp=4", "dp=2 × tp=2", "dp=4", "tp=2", "dp=2", "1 GPU"),
    ]
    assert [mesh_name(mesh) for mesh in meshes_of(3, 8, 6)] == ["tp=3", "dp=3", "1 GPU"]
    assert all("dp" not in mesh for mesh in meshes_of(8, 8, None))  # no batch to split
    assert {mesh.get("dp", 1) for mesh in meshes_of(12, 4, 6)} == {1, 2, 3, 6}  # 4 and 12 do not divide a batch of 6
    assert max(mesh.get("tp", 1) for mesh in meshes_of(64, 4, 64)) == 8  # two nodes
    assert list(meshes_of(8, 4, 8)[0]) == ["dp", "tp"]  # tp innermost


def test_ties_go_to_fewer_gpus_and_simpler_meshes() -> None:
    order = ranked([fake({"dp": 2, "tp": 4}, 1.0), fake({"tp": 8}, 1.01), fake({"tp": 4}, 1.019), fake({"tp": 1}, 1.05)])
    assert [mesh_name(candidate.mesh) for candidate in order] == ["tp=4", "tp=8", "dp=2 × tp=4", "1 GPU"]
    tight = Candidate({"tp": 2}, None, 90e9)
    order = ranked([Candidate({"dp": 2}, None), tight, Candidate({"tp": 4}, None, 50e9), fake({"tp": 8}, 9.0)])
    assert [mesh_name(candidate.mesh) for candidate in order] == ["tp=8", "tp=4", "tp=2", "dp=2"]


@pytest.mark.parametrize(
    ("candidates", "sentence"),
    [
        (
            [fake({"tp": 1}, 1.0), fake({"dp": 2}, 0.99), fake({"tp": 8}, 2.0)],
            "One GPU is best: data parallelism alone (dp=2) takes 0.99× the time per step (within the model's error), "
            "tensor parallelism across nodes (tp=8) takes 2.00× the time per step.",
        ),
        (
            [fake({"dp": 8}, 1.0), fake({"dp": 2, "tp": 4}, 1.5), fake({"tp": 1}, 6.0)],
            "No tensor parallelism is best, but data parallelism over 8 GPUs: tensor parallelism inside a node (dp=2 × tp=4) takes "
            "1.50× the time per step, one GPU takes 6.00× the time per step.",
        ),
        (
            [fake({"dp": 2, "tp": 4}, 1.0), fake({"tp": 8}, 1.2), Candidate({"dp": 8}, None, 60e9)],
            "Tensor parallelism over 4 GPUs inside a node and data parallelism over 2 such groups are best: data parallelism alone does "
            "not fit at batch 8, tensor parallelism across nodes (tp=8) takes 1.20× the time per step.",
        ),
        (
            [fake({"tp": 4}, 1.0), fake({"tp": 8}, 1.2), fake({"tp": 1}, 2.0)],
            "Tensor parallelism over 4 GPUs inside a node is best: tensor parallelism across nodes (tp=8) takes 1.20× the time per step, "
            "one GPU takes 2.00× the time per step; the other 4 GPUs would not help.",
        ),
        (
            [fake({"dp": 2, "tp": 4}, 1.0), fake({"tp": 4, "dp": 2}, 1.3), Candidate({"tp": 1}, None, bound_s=4.0)],
            "Tensor parallelism over 4 GPUs inside a node and data parallelism over 2 such groups are best: tensor parallelism across "
            "nodes (tp=4 × dp=2) takes 1.30× the time per step, one GPU takes at least 4.00× the time per step.",
        ),
        ([fake({"dp": 2, "cp": 4}, 1.0, words="sequence")], "Sequence parallelism over 4 GPUs inside a node and data parallelism over 2"),
        ([fake({"tp": 8}, 1.0), fake({"tp": 1}, 2.0)], "Tensor parallelism over 8 GPUs across nodes is best: one GPU takes 2.00×"),
        ([Candidate({"tp": 8}, None), Candidate({"dp": 8}, None)], "No plan was found in time on up to 8 GPUs at batch 8: raise"),
    ],
)
def test_verdicts(candidates: list[Candidate], sentence: str) -> None:
    assert found(*candidates).verdict.startswith(sentence)
    assert found(*candidates).verdict.count(".") - found(*candidates).verdict.count("×") <= 1


def test_what_does_not_fit_is_marked_and_helped() -> None:
    page = found(Candidate({"tp": 8}, None, 2**36), gpus=8, remedies=("16 GPUs (tp=16)", "batch 2"))
    assert page.best is None
    over = 2**36 - 40e9
    assert page.verdict == (
        "It does not fit on up to 8 GPUs of c at batch 8: it needs at least 64 GiB per device on 8 GPUs, "
        f"{over / 2**30:.1f} GiB too much; what would fit: 16 GPUs (tp=16), or batch 2."
    )
    assert f"does not fit: at least {over / 2**30:.1f} GiB too much" in render(page, 140)
    (entry,) = to_data(page)["candidates"]
    assert (entry["fits"], entry["step_s"], entry["memory_bytes"]) == (False, None, 2**36)


@pytest.mark.parametrize("width", [100, 140])
def test_the_table_fits(width: int) -> None:
    text = render(found(fake({"dp": 2, "tp": 4}, 1.0, 0.25), Candidate({"dp": 8}, None, 60e9)), width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("dp=2 × tp=4", "1.0 s", "128", "25%", "50%", "batch 8 × sequence 16"):
        assert word in text


def test_a_plan_that_is_not_proved_optimal_is_named() -> None:
    candidate = fake({"tp": 2}, 1.0)
    assert candidate.plan is not None
    late = replace(candidate, plan=replace(candidate.plan, solver=Solver("HiGHS", "feasible", 0.1, 60.0)))
    assert "note: The time limit came before the proof that these plans are the fastest: tp=2." in render(found(late), 140)


# From models


def test_one_gpu_is_best_for_a_tiny_model() -> None:
    case = example("mlp", batch=8, dtype=torch.float32)
    advice = autotp.recommend(case.model, case.args, gpus=4, cluster="dgx-h100")
    assert advice.best is not None
    assert advice.best.gpus == 1
    assert advice.verdict.startswith("One GPU is best: ")
    assert (advice.batch, advice.sequence) == (8, None)
    assert {candidate.gpus for candidate in advice.candidates} == {1, 2, 4}
    assert str(advice).startswith("Sequential · train · up to 4 GPUs of dgx-h100 · batch 8 ·")


def test_where_work_is_all_that_counts_all_gpus_are_used() -> None:
    case = example("llama", batch=8, seq=12)
    said: list[str] = []
    advice = autotp.recommend(case.model, kwargs=case.kwargs, gpus=4, cluster=splitting_pays(), progress=said.append)
    assert advice.best is not None
    assert advice.best.gpus == 4
    assert advice.best.plan is not None
    assert said[0] == "planning LlamaForCausalLM on tp=4 at batch 8 (1 of 6)"
    speed = [candidate.plan.kpi["tokens_per_s"] for candidate in advice.candidates if candidate.plan]
    assert speed[0] == pytest.approx(8 * 12 / advice.best.step_s)
    assert advice.best.step_s <= 1.02 * min(candidate.step_s for candidate in advice.candidates)


def test_a_batch_that_does_not_divide_is_said() -> None:
    case = example("mlp", batch=3, dtype=torch.float32)
    advice = autotp.recommend(case.model, case.args, gpus=2)
    assert [mesh_name(candidate.mesh) for candidate in advice.candidates if "dp" in candidate.mesh] == []
    assert "A batch of 3 does not divide into 2: data parallelism of that size is left out." in advice.notes


def test_a_memory_limit_decides_what_fits() -> None:
    case = example("mlp", batch=64, dtype=torch.float32)
    free = autotp.recommend(case.model, case.args, gpus=2, cluster=splitting_pays())
    alone = next(candidate for candidate in free.candidates if candidate.gpus == 1)
    assert alone.plan is not None
    limit = 0.9 * alone.plan.memory.total
    tight = autotp.recommend(case.model, case.args, gpus=2, cluster=splitting_pays(), memory=limit)
    assert tight.best is not None
    assert tight.best.gpus == 2
    last = next(candidate for candidate in tight.candidates if candidate.gpus == 1)
    assert last.plan is None
    assert last.bound_s == pytest.approx(alone.step_s)  # even without a limit one device is slower
    none = autotp.recommend(case.model, case.args, gpus=2, cluster=splitting_pays(), memory=limit / 50)
    assert none.best is None
    assert "It does not fit on up to 2 GPUs" in none.verdict


# The command line


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `autotp recommend` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(cli_common, "QUIET", 3600.0)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(["recommend", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_2_13B))
    return path


@pytest.mark.parametrize(
    "options",
    [["--batch", 8, "--seq", 2048], ["--batch", 1, "--seq", 128, "--mode", "inference"]],
    ids=["training", "latency"],
)
def test_derecho_prefers_tp_4_inside_a_node_to_tp_8_across_nodes(command: Any, llama: Path, options: list[object]) -> None:
    code, out, err = command(llama, "--cluster", "derecho", "--gpus", 8, *options, "--format", "json")
    assert (code, err) == (0, "")
    candidates = json.loads(out)["candidates"]
    inside = next(rank for rank, entry in enumerate(candidates) if entry["mesh"].get("tp") == 4)
    across = next(rank for rank, entry in enumerate(candidates) if entry["mesh"].get("tp") == 8)
    assert inside < across
    assert candidates[inside]["step_s"] < candidates[across]["step_s"]


def test_it_chooses_a_batch_and_writes_a_file(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "advice.yaml"
    assert command(MLP, "--cluster", "dgx-a100", "--gpus", 2, "--output", path) == (0, "", "")
    advice = yaml.safe_load(path.read_text())
    assert advice["batch"] in (2, 4, 8, 16)
    assert [entry["fits"] for entry in advice["candidates"]] == [True] * 3
    assert advice["candidates"][0]["samples_per_s"] == pytest.approx(advice["batch"] / advice["candidates"][0]["step_s"])
    code, out, _ = command(MLP, "--gpus", 2, "--batch", 4)
    assert code == 0
    assert out.startswith("mlp · train · up to 2 GPUs of dgx-h100 · batch 4 ·")
    assert out.endswith("by default: --cluster dgx-h100\n")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cluster", "nosuch"], "unknown cluster 'nosuch'"),
        (["--gpus", 0], "the number of GPUs is 0, but must be a whole number of at least 1"),
        (["--gpus", 4, "--cluster", "pcie-workstation"], "4 GPUs are more than the 2 of pcie-workstation: take fewer, or another cluster"),
        (["--gpus", 12, "--cluster", "dgx-a100"], "12 GPUs are no whole number of nodes: dgx-a100 has 8 in each; take 8 or 16"),
        (["--batch", 0], "batch is 0, but must be at least 1"),
        (["--mode", "infer"], "unknown mode `infer`; choose train or inference"),
        (["--dtype", "int4"], "unknown dtype `int4`"),
        (["--memory", "80XB"], "the memory size '80XB' is not understood"),
        (["--time-limit", 0], "--time-limit is 0, but must be a positive number of seconds"),
        (["--format", "xml"], "unknown format 'xml'; choose table, yaml or json"),
        (["--output", "no/such/directory/x.txt"], "there is no directory no/such/directory"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_built(command: Any, options: list[object], sentence: str) -> None:
    code, out, err = command("hf:nobody/nothing", *options)
    assert (code, out) == (2, "")
    assert err.startswith("autotp: error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_a_model_that_cannot_be_loaded(command: Any, tmp_path: Path) -> None:
    assert "no such model `nosuch`; write hf:ID, a config.json" in command("nosuch")[2]
    broken = tmp_path / "broken.py"
    broken.write_text("def model():\n    raise ValueError('no weights')\n")
    code, _, err = command(f"{broken}:model", "--gpus", 2)
    assert code == 2
    assert "ValueError: no weights" in err
    assert err.count("\n") == 1


def test_devices_of_a_cluster() -> None:
    derecho = load_cluster("derecho")
    for gpus in (1, 2, 3, 4, 8, 64):
        check_devices(derecho, gpus)
    with pytest.raises(AutotpError, match="6 GPUs are no whole number of nodes: derecho has 4 in each; take 4 or 8, or at most 4"):
        check_devices(derecho, 6)

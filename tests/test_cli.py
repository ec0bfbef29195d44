"""The command line: results, and one sentence with an exit code for every kind of wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotp import cli, cli_common
from autotp.errors import AutotpError
from autotp.plans import Plan

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A small Llama's configuration."""
    pytest.importorskip("transformers")
    folder = tmp_path / "little-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


@pytest.fixture
def autotp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "140")  # pytest-xdist sets 80

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def refused(result: tuple[int, str, str]) -> str:
    """The sentence of a refusal: exit code 2, one line on stderr, nothing on stdout."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("autotp: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("autotp: error: ").rstrip("\n")


# Results


def test_help_and_version() -> None:
    runner = CliRunner()
    assert runner.invoke(cli.app, ["--version"]).output.startswith("autotp ")
    for arguments in ([], ["--help"], ["plan", "--help"], ["verify", "-h"], ["clusters", "--help"]):
        result = runner.invoke(cli.app, arguments)
        assert result.exit_code == 0
        assert "Usage" in result.output
    assert "default dgx-h100" in runner.invoke(cli.app, ["plan", "--help"], env={"COLUMNS": "200"}).output


def test_clusters(autotp: Any) -> None:
    from autotp.price.cluster import cluster_names

    code, out, err = autotp("clusters")
    assert (code, err) == (0, "")
    for name in cluster_names():
        assert name in out
    assert out.startswith(" name ")
    assert not out.endswith("\n\n")
    assert "dgx-h100 (default) h100-sxm 8 NVLink 450 GB/s (up to 8), InfiniBand 50 GB/s" in " ".join(out.split())


def test_table(autotp: Any, model: str) -> None:
    code, out, err = autotp("plan", model)
    assert (code, err) == (0, "")
    assert out.startswith("little-llama · train · mesh tp=8 · cluster dgx-h100 · batch 1 × sequence 512\n")
    assert "model.layers.0-2.mlp.up_proj" in out
    assert out.endswith("by default: --cluster dgx-h100 --mesh 8\n")
    assert "\x1b" not in out
    assert "\n\n\n" not in out


def test_phases_of_generation(autotp: Any, model: str) -> None:
    """Prefill and decode are priced apart; both count the cache: keys and values of 3 layers with 8 heads of 128, in bfloat16."""
    found = {}
    for phase in ("prefill", "decode"):
        code, out, _ = autotp(
            "plan", model, "--phase", phase, "--context", 256, "--batch", 1, "--mesh", 4, "--format", "json", "--dtype", "bf16"
        )
        assert code == 0
        found[phase] = json.loads(out)
    assert found["decode"]["mode"] == found["prefill"]["mode"] == "inference"
    assert (found["prefill"]["sequence"], found["decode"]["sequence"]) == (256, 1)
    whole = 2 * 3 * 8 * 128 * 256 * 2
    assert found["decode"]["memory"]["cache"] in (whole, whole / 4)
    assert found["decode"]["time"]["step_s"] < found["prefill"]["time"]["step_s"]
    code, out, _ = autotp("plan", model, "--phase", "prefill", "--seq", 64, "--context", 256, "--batch", 2, "--mesh", 2)
    assert "batch 2 × sequence 64" in out
    assert "Prefill reads 64 tokens of each of 2 sequences; the key/value cache holds 256 of each, 0.00629 GB if it is kept once." in out
    assert "cache" in out
    assert "has no training" in refused(autotp("plan", model, "--phase", "decode", "--mode", "train"))


def test_json_to_a_file(autotp: Any, model: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    options = ["--mesh", "dp=2,tp=2", "--batch", 4, "--seq", 64, "--mode", "inference", "--cluster", "dgx-a100"]
    assert autotp("plan", model, *options, "--format", "json", "--output", path) == (0, "", "")
    found = json.loads(path.read_text())
    assert (found["model"], found["mode"], found["cluster"]) == ("little-llama", "inference", "dgx-a100")
    assert (found["mesh"], found["batch"], found["sequence"]) == ({"dp": 2, "tp": 2}, 4, 64)
    assert found["memory"]["gradients"] == 0
    assert list(tmp_path.glob("*.part")) == []


def test_yaml_loads_again(autotp: Any, model: str, tmp_path: Path) -> None:
    pins = ["--pin", "*.q_proj=column", "--pin", "lm_head=replicate", "--memory", "20GiB", "--dtype", "bf16"]
    code, out, _ = autotp("plan", model, "--mesh", 2, *pins, "--format", "yaml")
    assert code == 0
    path = tmp_path / "plan.yaml"
    path.write_text(out)
    plan = Plan.load(path)
    assert plan.strategies["model.layers.2.self_attn.q_proj"] == "column"
    assert plan.strategies["lm_head"] == "replicate"
    assert plan.memory.total <= 20 * 2**30
    plan.save(path)
    assert path.read_text() == out


def test_callable(autotp: Any) -> None:
    code, out, _ = autotp("plan", f"{ROOT / 'examples' / 'mlp.py'}:mlp", "--batch", 64, "--mesh", 2)
    assert code == 0
    assert "· batch 64\n" in out  # its second dim is no sequence
    assert "0-3.1" in out


@pytest.mark.parametrize(
    ("name", "options", "start"),
    [
        ("p.json", [], "{"),
        ("p.yaml", [], "autotp_plan:"),
        ("p.YML", [], "autotp_plan:"),
        ("p.txt", [], "mlp · train"),
        ("p.json", ["--format", "table"], "mlp · train"),
    ],
)
def test_the_suffix_decides_the_format(autotp: Any, tmp_path: Path, name: str, options: list[str], start: str) -> None:
    path = tmp_path / name
    assert autotp("plan", f"{ROOT / 'examples' / 'mlp.py'}:mlp", "--mesh", 2, "--output", path, *options) == (0, "", "")
    assert path.read_text().startswith(start)


def test_a_model_that_prints_or_exits(autotp: Any, tmp_path: Path) -> None:
    path = tmp_path / "loud.py"
    lines = [
        "import sys, torch",
        "print('importing')",
        "def loud():",
        "    print('building')",
        "    return torch.nn.Linear(8, 8), (torch.zeros(4, 8),)",
        "def leaves():",
        "    sys.exit(3)",
    ]
    path.write_text("\n".join(lines))
    code, out, err = autotp("plan", f"{path}:loud", "--mesh", 2, "--format", "json")
    assert (code, err) == (0, "importing\nbuilding\n")
    assert json.loads(out)["model"] == "loud"
    for command in ("plan", "verify"):
        code, out, err = autotp(command, f"{path}:leaves", "--mesh", 2)
        assert (code, out) == (2, "")
        assert f"autotp: error: the code of {path}:leaves called sys.exit(3); it must return a model" in err


def test_verify(autotp: Any, model: str) -> None:
    code, out, err = autotp("verify", model, "--ranks", 2, "--plans", 1)
    assert (code, err) == (0, "")
    assert "all equal" in out
    assert "random plan 0" in out


def test_a_failed_verification_is_exit_code_1(autotp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from autotp import verify

    checks = (
        verify.Check("the planner's plan", 0.5, "gradient of up.weight"),
        verify.Check("other sizes", None, "fixed"),
    )
    report = verify.VerifyReport("m", 10, {"tp": 2}, 2, None, 1e-9, "float64", checks, ("a note",))
    monkeypatch.setattr(verify, "verify", lambda *args, **kwargs: report)
    code, out, _ = autotp("verify", "m")
    assert code == 1
    assert "DIFFERS" in out
    assert "NOT EQUAL (worst error 5.0e-01; float64; tolerance 1e-09)" in out
    assert "note: a note" in out


# Wrong input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cluster", "dgx-h10"], "unknown cluster 'dgx-h10', did you mean dgx-h100"),
        (["--cluster", "no/such.yaml"], "no cluster file no/such.yaml"),
        (["--mesh", "2xx4"], "the mesh '2xx4' is not understood: write 8, 2x4 or dp=2,tp=4"),
        (["--mesh", "0"], "needs whole sizes of at least 1"),
        (["--mesh", "dp=2,dp=4"], "is not understood"),
        (["--mesh", "4", "--cluster", "pcie-workstation"], "the mesh 4 needs 4 devices, but pcie-workstation has 2"),
        (["--batch", "0"], "batch is 0, but must be at least 1"),
        (["--batch", "many"], "Invalid value for '--batch'"),
        (["--seq", "-1"], "seq is -1, but must be at least 1"),
        (["--dtype", "int4"], "unknown dtype `int4`; choose bfloat16, float16, float32 or float64"),
        (["--mode", "infer"], "unknown mode `infer`; choose train or inference"),
        (["--format", "xml"], "unknown format 'xml'; choose table, yaml or json"),
        (["--memory", "80XB"], "the memory size '80XB' is not understood: write such as 80GB"),
        (["--memory", "0"], "the memory size '0' must be positive"),
        (["--memory", "-8GB"], "the memory size '-8GB' must be positive"),
        (["--pin", "q_proj"], "the pin 'q_proj' is not understood: write PATTERN=WORD"),
        (["--pin", "a=row", "--pin", "a=column"], "'a' is pinned to both 'row' and 'column'; keep one"),
        (["--output", "no/such/directory/plan.txt"], "there is no directory no/such/directory; give another --output"),
        (["--output", "."], "cannot write .: it is a directory"),
        (["--outptu", "x"], "No such option: --outptu"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_built(autotp: Any, options: list[str], sentence: str) -> None:
    assert sentence in refused(autotp("plan", "hf:nobody/nothing", *options))


def test_a_file_that_is_no_cluster(autotp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# Not a cluster\n")
    assert refused(autotp("plan", "hf:nobody/nothing", "--cluster", "README.md")).startswith("the file README.md is no cluster")


def test_unknown_models(autotp: Any) -> None:
    assert refused(autotp("plan")).startswith("Missing argument 'MODEL'")
    assert "no such model `nosuch`; write hf:ID, a config.json" in refused(autotp("plan", "nosuch"))
    assert refused(autotp("plan", "llama-3.1-8B")).endswith("e.g. examples/configs/llama-3.1-8b.")
    assert "No such command 'plna'" in refused(autotp("plna"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seq", "513"], "sequence length 513 is longer than the 512 positions of `little-llama`"),
        (["--pin", "*.nothing=column"], "the pin '*.nothing' matches no module with weights"),
        (["--pin", "*.q_proj=wide"], "the pin '*.q_proj': 'wide' is none of column, row"),
        (["--pin", "*.q_proj=vocab"], "'vocab' is impossible for model.layers.0.self_attn.q_proj"),
        (["--memory", "1MB"], "cannot be kept: the least that would do on this mesh is"),
    ],
)
def test_impossible_plans_leave_no_file(
    autotp: Any, model: str, tmp_path: Path, options: list[str], sentence: str
) -> None:
    path = tmp_path / "plan.yaml"
    result = autotp("plan", model, "--mesh", 2, *options, "--format", "yaml", "--output", path)
    assert sentence in refused(result)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["little-llama"]


def test_verify_options(autotp: Any) -> None:
    assert "--ranks is 0" in refused(autotp("verify", "m", "--ranks", 0))
    assert "--plans is -1" in refused(autotp("verify", "m", "--plans", -1))
    assert "has 4 places, but --ranks is 3" in refused(autotp("verify", "m", "--ranks", 3, "--mesh", "2x2"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AutotpError, match="is not writable"):
        cli_common.check_writable(tmp_path / "plan.yaml")


def test_a_bug_and_an_interruption(autotp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> None:
        def load(name: str) -> None:
            raise error

        monkeypatch.setattr("autotp.price.cluster.load_cluster", load)

    fail(KeyError("depth"))
    code, out, err = autotp("clusters")
    assert (code, out) == (1, "")
    assert err.startswith(
        "autotp: error: this is a bug in autotp: KeyError ('depth'); please report it with your command"
    )
    fail(KeyboardInterrupt())
    code, out, err = autotp("clusters")
    assert code == 130
    assert "Traceback" not in err
    fail(KeyError("depth"))
    monkeypatch.setenv("AUTOTP_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["clusters"])


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GB", 80e9), ("80GiB", 80 * 2**30), ("512mb", 512e6), ("1.5 TB", 1.5e12), ("1000", 1000.0), ("2g", 2e9)],
)
def test_sizes(text: str, count: float) -> None:
    assert cli_common.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "--1GB", "1e9", "12 apples", "0XB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(AutotpError, match="is not understood"):
        cli_common.parse_size(text)


# As a process


def test_process(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autotp", "plan", f"{ROOT / 'examples' / 'mlp.py'}:mlp", "--mesh", "2"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mlp · train")
    wrong = subprocess.run([*command, "--mesh", "x"], env=environment, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "autotp: error: the mesh 'x' is not understood: write 8, 2x4 or dp=2,tp=4\n"


def test_options_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['autotp', 'clusters']\n"
        f"import types; package = types.ModuleType('autotp'); package.__path__ = [{str(ROOT / 'autotp')!r}]\n"
        "sys.modules['autotp'] = package\n"
        "from autotp.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dgx-h100" in done.stdout

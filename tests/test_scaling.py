"""Scaling studies: points, efficiency, table, data, plots, and wrong input."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from autotp import cli, cli_common
from autotp.errors import AutotpError
from autotp.recommendation import Candidate
from autotp.report_scaling import check_plotting, page_of, render, to_data, write
from autotp.scaling import ScalingPoint, ScalingStudy, batch_at, parse_counts, parse_share
from tests.test_recommend import MLP, fake


def study(*points: ScalingPoint, per_gpu: Fraction | None = Fraction(1)) -> ScalingStudy:
    return ScalingStudy("m", 7_000_000_000, "train", "c", per_gpu, 16, 76e9, 80e9, points)


def point(gpus: int, step_s: float, communication_s: float = 0.0) -> ScalingPoint:
    found = fake({"dp": gpus}, step_s, communication_s)
    return ScalingPoint(gpus, 8 * gpus, (found,))


def test_efficiency_is_relative_to_the_first_that_fits() -> None:
    large = ScalingPoint(4, 32, (Candidate({"dp": 4}, None, 100e9),))
    found = study(large, point(8, 1.0), point(16, 1.25), point(32, 2.0))
    assert [found.efficiency(one) for one in found.points] == [None, 1.0, pytest.approx(0.8), pytest.approx(0.5)]
    strong = study(ScalingPoint(8, 64, (fake({"dp": 8}, 1.0),)), ScalingPoint(16, 64, (fake({"dp": 16}, 0.5),)), per_gpu=None)
    assert strong.efficiency(strong.points[1]) == pytest.approx(1.0)


def test_table_and_data() -> None:
    found = study(ScalingPoint(4, 32, (Candidate({"dp": 4}, None, 100e9),)), point(8, 1.0, 0.25))
    text = render(found, 140)
    assert text.startswith("m (7B parameters) · train · c · weak scaling, 1 per GPU · sequence 16")
    for word in ("does not fit", "≥ 93.1 GiB", "dp=8", "25%", "100%", "1.0 s"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 140
    data = json.loads(json.dumps(to_data(found)))
    assert [entry["fits"] for entry in data["points"]] == [False, True]
    assert data["points"][1]["exposed_communication_share"] == 0.25
    assert data["points"][0]["step_s"] is None


def test_batches() -> None:
    assert parse_counts("64,8,8") == [8, 64]
    assert batch_at(64, 16, None) == 16
    assert batch_at(64, None, parse_share("1/8")) == 8
    assert batch_at(64, None, parse_share("0.5")) == 32
    with pytest.raises(AutotpError, match="1/8 samples per GPU are 0.5 on 4 GPUs, which is no whole number: take 8 GPUs"):
        batch_at(4, None, Fraction(1, 8))
    for wrong in ("0", "-1", "x", "1/0"):
        with pytest.raises(AutotpError, match="--batch-per-gpu"):
            parse_share(wrong)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html", ".json", ".yaml", ".txt"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"scaling{suffix}"
    write(study(point(8, 1.0, 0.25), point(64, 1.1, 0.4)), path)
    assert path.stat().st_size > 100
    if suffix == ".html":
        page = path.read_text()
        assert page.count("<svg") == 1
        assert "dp=64" in page
        assert "src=" not in page  # one file is all


def test_names_are_no_markup(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = ScalingStudy("<b>&", 1, "train", "c", None, None, 1.0, 2.0, (point(8, 1.0),))
    assert "<b>" not in page_of(found)


def test_nothing_to_plot_and_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = study(ScalingPoint(4, 32, (Candidate({"dp": 4}, None, 100e9),)))
    with pytest.raises(AutotpError, match="fits on none of these numbers of GPUs"):
        write(nothing, tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AutotpError, match=r"plots need matplotlib, which is not installed: run `pip install 'autotp\[plot\]'`"):
        check_plotting()
    write(study(point(8, 1.0)), tmp_path / "x.json")  # needs none


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `autotp scale` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(cli_common, "QUIET", 3600.0)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(["scale", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def test_the_command(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    code, out, err = command(MLP, "--cluster", "dgx-a100", "--gpus", "2,4", "--batch-per-gpu", 8, "--output", path)
    assert (code, err) == (0, "")
    assert out.startswith("mlp (4.21M parameters) · train · dgx-a100 · weak scaling, 8 per GPU")
    data = json.loads(path.read_text())
    assert [(entry["gpus"], entry["batch"]) for entry in data["points"]] == [(2, 16), (4, 32)]
    for entry in data["points"]:
        assert entry["samples_per_s"] == pytest.approx(entry["batch"] / entry["step_s"])
    code, out, err = command(MLP, "--cluster", "dgx-a100", "--gpus", "2,4", "--batch", 8)
    assert (code, err) == (0, "")
    assert "strong scaling" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpus", "8,x"], "--gpus 8,x is not understood: write numbers of devices such as 8,64,512"),
        (["--gpus", "12"], "12 GPUs are no whole number of nodes"),
        (["--batch", 8, "--batch-per-gpu", 1], "are both given: keep one"),
        (["--gpus", "4", "--batch-per-gpu", "1/8"], "1/8 samples per GPU are 0.5 on 4 GPUs"),
        (["--memory", "80XB"], "the memory size '80XB' is not understood"),
        (["--output", "no/such/directory/x.svg"], "there is no directory no/such/directory"),
    ],
)
def test_wrong_options(command: Any, options: list[object], sentence: str) -> None:
    code, out, err = command("hf:nobody/nothing", *options)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1

"""What users install: the wheel's contents, its metadata, and the commands that the README promises."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"transformers", "matplotlib"}
"""What the package imports only where it is used, and does not depend on."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip builds it but in this process, without a network, from a copy of the sources."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("autotp", "cost_models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return Path(next(WheelBuilder(str(source)).build(directory=str(folder), versions=["standard"])))


def test_wheel_holds_the_package_and_its_cost_models_alone(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"autotp", f"autotp-{PROJECT['version']}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "autotp").rglob("*.py")}
    models = {f"autotp/{path.relative_to(ROOT)}" for path in (ROOT / "cost_models").rglob("*.yaml")}
    assert models
    assert {name for name in names if not name.startswith("autotp-")} == sources | models | {"autotp/py.typed"}


def test_wheel_declares_entry_point_licence_and_requirements(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        info = f"autotp-{PROJECT['version']}.dist-info"
        assert "autotp = autotp.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
        described = archive.read(f"{info}/METADATA").decode()
    assert "Requires-Python: >=3.11" in described
    assert re.search(r"^Requires-Dist: torch<2\.14,>=2\.11$", described, re.MULTILINE)
    for extra in ("hf", "fast", "plot", "test", "dev"):
        assert f"Provides-Extra: {extra}" in described


def test_unpacked_wheel_finds_its_cost_models(wheel: Path, tmp_path: Path) -> None:
    ZipFile(wheel).extractall(tmp_path)
    code = "import autotp.price.cluster as c; print(c.cost_models_dir()); print(c.load_cluster('dgx-h100').name)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == [str(tmp_path.resolve() / "autotp" / "cost_models"), "dgx-h100"], ran.stderr


def imported() -> set[str]:
    """Top-level names of everything that the package imports from outside the standard library."""
    found = set()
    for path in (ROOT / "autotp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"autotp"}


def test_dependencies_are_what_the_package_imports() -> None:
    names = {"pyyaml": "yaml"}
    listed = {re.match(r"[A-Za-z0-9_-]+", line)[0].lower() for line in PROJECT["dependencies"]}  # type: ignore[index]
    assert {names.get(name, name) for name in listed} == imported() - OPTIONAL


def test_constraints_pin_torch_and_whatever_is_installed_with_it() -> None:
    """Every dependency, direct or not; apart from those that a pinned package itself pins (the CUDA libraries of torch)."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert pinned["torch"] == "2.13.0"
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(item for extra in extras.values() for item in extra)]
    seen = {"autotp"}
    while wanted:
        requirement = Requirement(wanted.pop())
        name = canonicalize_name(requirement.name)
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name in seen or not here or any(part.operator == "==" and "*" not in part.version for part in requirement.specifier):
            continue
        seen.add(name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        try:
            wanted += metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an extra that is not installed here
            continue


def test_ci_runs_the_command_of_the_readme() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = re.search(r"python (-m pytest[^\n]*)", readme)
    assert command is not None
    assert f"\npython {command[1]} || status=1\n" in ci
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_files_and_models_that_the_documents_name_exist() -> None:
    """Relative links in the documents, and paths in their commands."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for path in re.findall(r"\b(?:examples|tests|docs)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_who_uses_the_package_first_keeps_no_model_alive() -> None:
    """Not by the traceback of a failed import somewhere, whose frames hold what they were called with."""
    code = """
import gc, weakref, torch, autotp

def first_use():
    model = torch.nn.Linear(4, 4)
    autotp.plan(model, (torch.zeros(2, 4),), mesh=2)
    return weakref.ref(model)

kept = first_use()
gc.collect()
assert kept() is None, gc.get_referrers(kept())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

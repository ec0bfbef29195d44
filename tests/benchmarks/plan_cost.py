"""What planning costs: CPU time against `torch.export` alone, and peak memory, each in cold processes.

    python tests/benchmarks/plan_cost.py --case deepseek-v3
    python tests/benchmarks/plan_cost.py [--mesh 8] [--memory 12GiB] [--batch 32] [--local-batch dp] [--cluster dgx-h100] [MODEL ...]

Per model, one process measures time: it imports everything and exports a toy module first, so that no import is counted;
builds the model and exports it (that is `torch.export` alone), then builds it again and plans it as the command line does.
Another process runs `autotp plan` from the start; its peak resident memory counts imports and all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = [f"examples/configs/llama-3.1-{size}/config.json" for size in ("8b", "70b", "405b")]
RATIOS = {"8b": 2.0, "70b": 1.6, "405b": 1.5}
GIGABYTES = {"8b": 0.8, "70b": 0.9, "405b": 1.1}


@dataclass(frozen=True)
class Case:
    """A named request: each data-parallel rank has sequences of its own; and the ratio and gigabytes that are asked for."""

    model: str
    mesh: str
    batch: int
    memory: str | None
    ratio: float
    gigabytes: float
    local_batch: str = "dp"
    cluster: str = "dgx-h100-superpod"


CASES = {
    "8b-32x8": Case("llama-3.1-8b", "dp=32,tp=8", 32, "12GiB", 4.0, 1.0),
    "70b-32x8": Case("llama-3.1-70b", "dp=32,tp=8", 32, "24GiB", 2.5, 1.0),
    "405b-64x8": Case("llama-3.1-405b", "dp=64,tp=8", 64, "60GiB", 2.0, 1.5),
    "deepseek-v3": Case("deepseek-v3", "dp=8,ep=8,tp=4", 8, None, 3.0, 1.5),
    "deepseek-v3-limit": Case("deepseek-v3", "dp=8,ep=8,tp=4", 8, "70GiB", 3.0, 1.5),
}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of the export alone and of the steps of planning, in this process."""
    import torch
    import transformers  # noqa: F401

    from autotp.batch_axes import batch_border
    from autotp.cli_common import calm_collector, parse_size
    from autotp.mesh import parse_mesh
    from autotp.models import load_model
    from autotp.planning import Request, make_plan
    from autotp.price.cluster import load_cluster
    from autotp.report import render
    from autotp.trace import trace

    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), strict=False)
    model, limit = options.models[0], None if options.memory is None else parse_size(options.memory)
    alone = load_model(model, batch=options.batch)
    marks = [time.process_time()]
    torch.export.export(alone.model, alone.args, alone.kwargs, strict=False)
    marks.append(time.process_time())
    del alone
    start = time.process_time()
    with calm_collector():
        loaded = load_model(model, batch=options.batch)
        build = time.process_time()
        program = trace(loaded.model, loaded.args, loaded.kwargs, dynamic=False)
        traced = time.process_time()
        inputs, outputs = batch_border(program, options.local_batch.split(",")) if options.local_batch else ({}, {})
        request = Request(parse_mesh(options.mesh), memory=limit, inputs=inputs, outputs=outputs, overlap=options.overlap)
        plan = make_plan(program, request, load_cluster(options.cluster), loaded.name)
        planned = time.process_time()
        render(plan)
    end = time.process_time()
    return {
        "export": marks[1] - marks[0],
        "build": build - start,
        "trace": traced - build,
        "plan": planned - traced,
        "print": end - planned,
        "total": end - start,
        "gap": plan.solver.gap,
    }


def flags(options: argparse.Namespace) -> list[str]:
    """The options of the command line that were given."""
    given = {"--mesh": options.mesh, "--memory": options.memory, "--batch": options.batch, "--local-batch": options.local_batch}
    given["--cluster"] = options.cluster
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return [*words, *(["--overlap"] if options.overlap else [])]


def peak_bytes(model: str, options: argparse.Namespace) -> int:
    """Peak resident memory of a fresh `autotp plan`, of which nothing runs before in this process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "autotp", "plan", model, *flags(options), "--output", f"{folder}/plan.txt"]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--mesh", default="8")
    parser.add_argument("--memory", help="peak bytes allowed per device, e.g. 12GiB")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--local-batch", help="mesh axes that split the batch of inputs and outputs")
    parser.add_argument("--cluster", default="dgx-h100")
    parser.add_argument("--overlap", action="store_true", help="price gathers and reductions as hidden by compute")
    parser.add_argument("--case", choices=CASES, help="one of the named requests, in place of models and their options")
    parser.add_argument("--measure", action="store_true", help="measure the one model in this process, print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    case = CASES.get(options.case)
    if case is not None:
        options.models = [f"examples/configs/{case.model}/config.json"]
        options.mesh, options.batch, options.memory = case.mesh, case.batch, case.memory
        options.local_batch, options.cluster = case.local_batch, case.cluster
    print("| model | export alone | build | trace | plan | print | total | ratio (limit) | peak memory (limit) | gap |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    limits = options.mesh == "8"
    for model in options.models:
        command = [sys.executable, __file__, model, *flags(options), "--measure"]
        run = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        found = json.loads(run.stdout.splitlines()[-1])
        name = Path(model).parent.name
        size = name.rpartition("-")[2]
        times = " | ".join(f"{found[key]:.2f} s" for key in ("export", "build", "trace", "plan", "print", "total"))
        most = case.ratio if case is not None else RATIOS.get(size) if limits else None
        largest = case.gigabytes if case is not None else GIGABYTES.get(size) if limits else None
        ratio = f"{found['total'] / found['export']:.2f}×" + (f" (≤ {most}×)" if most else "")
        peak = f"{peak_bytes(model, options) / 1e9:.2f} GB" + (f" (≤ {largest} GB)" if largest else "")
        print(f"| {name} | {times} | {ratio} | {peak} | {100 * found['gap']:.1g} % |", flush=True)


if __name__ == "__main__":
    main()

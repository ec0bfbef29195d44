"""A real small training run, on one device and in parallel: the loss curves lie on each other.

    python -m tests.benchmarks.training_curve --output docs/training_curve.svg

A Llama of 4 layers learns Shakespeare's sonnets (examples/sonnets.txt, public domain) character by character: AdamW with warm-up, cosine
decay and clipping, float32. The same seed and data on one device, on 2 ranks, and on a 2×2 mesh of Gloo ranks whose plan splits the batch
as well. Printed: the largest difference between the losses of a step, and where it is.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import autotp
from tests.models import splitting_pays
from tests.ranks import run_ranks

TEXT = (Path(__file__).resolve().parents[2] / "examples" / "sonnets.txt").read_text()
LETTERS = sorted(set(TEXT))
TOKENS = torch.tensor([LETTERS.index(letter) for letter in TEXT])
ROWS, LENGTH, WARM_UP, PEAK = 16, 64, 20, 3e-3


def model() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS), max_position_embeddings=LENGTH, **sizes)).train()


def batch(step: int) -> Tensor:
    """(ROWS, LENGTH) tokens, from the number of the step alone."""
    starts = torch.randint(len(TOKENS) - LENGTH, (ROWS,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TOKENS[start : start + LENGTH] for start in starts])


def losses_of(trained: nn.Module, steps: int) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=PEAK, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    found = []
    for step in range(steps):
        tokens = batch(step)
        loss = trained(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        found.append(float(loss.detach()))
    return found


def _share(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def on_ranks(mesh: Any, steps: int, file: str) -> None:
    """The same in parallel; rank 0 writes the losses."""
    tokens = batch(0)
    parallel = autotp.parallelize(model(), kwargs={"input_ids": tokens, "labels": tokens}, mesh=mesh, cluster=splitting_pays())
    split = [name for name, value in parallel.named_parameters() if value.to_local().numel() < value.numel()]
    found = losses_of(parallel, steps)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps({"losses": found, "split": len(split)}))


def curves(steps: int) -> dict[str, list[float]]:
    """The losses of every step, by what they were trained on."""
    found = {"one device": losses_of(model(), steps)}
    for name, count, mesh in (("2 ranks", 2, 2), ("2×2 ranks", 4, {"dp": 2, "tp": 2})):
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "losses.json")
            run_ranks(on_ranks, count, mesh, steps, file)
            written = json.loads(Path(file).read_text())
        print(f"{name}: {written['split']} parameters are split")
        found[name] = written["losses"]
    return found


def plot(found: dict[str, list[float]], output: Path) -> None:
    """The curves, and below them how far the parallel ones are from that of one device."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained")
    wanted = found["one device"]
    for (name, losses), style in zip(found.items(), ("-", "--", ":"), strict=True):
        above.plot(losses, style, label=name, linewidth=2.5 if style == ":" else 1.5)
        if losses is not wanted:
            below.semilogy([abs(one - other) + 1e-9 for one, other in zip(losses, wanted, strict=True)], style, label=name)
    above.set_ylabel("loss (nats per character)")
    above.legend()
    below.set_ylabel("|difference|")
    below.set_xlabel("step")
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--output", type=Path)
    asked = options.parse_args()
    found = curves(asked.steps)
    wanted = found["one device"]
    for name, losses in found.items():
        gaps = [abs(one - other) for one, other in zip(losses, wanted, strict=True)]
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        print(f"{name}: loss {losses[0]:.4f} → {losses[-1]:.4f}; largest difference {gaps[worst]:.1e}, at step {worst}")
    if asked.output:
        plot(found, asked.output)


if __name__ == "__main__":
    main()

"""Published times of transformer layers, predicted from micro constants: `python -m tests.benchmarks.layer_accuracy --data FOLDER`.

FOLDER holds `published_figures.yaml`, whose rows of kind `train_layer` are Table 4 of arXiv:2205.05198: one layer of Megatron's 22B
model on eight A100, forward and backward, with and without sequence parallelism, nothing, everything or the attention core
recomputed. Nothing is fitted to them: the constants come from matrix products, collectives and bandwidths.

The layer goes through the whole pipeline: an ordinary module of that time is traced, weights are pinned to column and row, the
residual stream to be whole or split by sequence, the rest is the planner's choice; the middle layer of three is added up. Its scaled
and masked softmax is one kernel with its own backward, as Megatron's; what Megatron fuses by TorchScript (bias, gelu, dropout,
residual) is priced as compiled. Recomputation adds the forward time of what is recomputed, collectives included, to the backward.
Gradient all-reduces of replicated weights are no part of a layer's time.

Below stand, as information, the same in eager and compiled mode with the softmax written out, and the strong scaling of Megatron's
1.2B model on V100 (arXiv:1909.08053, appendix: speedups 1.64, 2.34 and 2.98 on 2, 4 and 8 GPUs).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import autotp
from autotp.describe import conversions
from autotp.formulate import Border, formulate
from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import Cluster, load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.price.work import Seconds, node_seconds
from autotp.program import Program
from autotp.solve import solve
from autotp.strategies import Space, Strategy
from autotp.trace import trace
from autotp.words import apply_pins

PINS = {"*.qkv": "column", "*.projection": "row", "*.up": "column", "*.down": "row"}
LAYER = "layers.1"
"""The layer that is added up: one before it and one after it."""
CORE = f"{LAYER}.attention.core"
MEGATRON = {1: 1.0, 2: 1.64, 4: 2.34, 8: 2.98}
"""Ranks → published speedup of the 1.2B model (arXiv:1909.08053)."""


# ---- the model ------------------------------------------------------------------------------------------------------


class MaskedSoftmax(torch.autograd.Function):
    """Softmax of scaled scores under a causal mask, in one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: float) -> Tensor:
        """Shapes: (batch, heads, queries, keys) → the same."""
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = (scores * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        ctx.save_for_backward(weights)
        ctx.scale = scale
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the scores."""
        (weights,) = ctx.saved_tensors
        product = weights * gradients[0]
        return ctx.scale * (product - weights * product.sum(-1, keepdim=True)), None


autotp.rule(f"{__name__}.MaskedSoftmax", "b h s^ t^ -> b h s^ t^")


class Core(nn.Module):
    """Attention between the projections, as five operators of PyTorch or with the fused softmax."""

    def __init__(self, dropout: float, fused: bool) -> None:
        super().__init__()
        self.dropout, self.fused = dropout, fused

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(batch, heads, sequence, width) each, and (sequence, sequence) → that of q."""
        scores, scale = q @ k.transpose(-1, -2), q.shape[-1] ** -0.5
        if self.fused:
            weights: Tensor = MaskedSoftmax.apply(scores, scale)
        else:
            weights = (scores * scale).masked_fill(mask, -10000.0).softmax(-1)
        return functional.dropout(weights, self.dropout) @ v


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, hidden: int, heads: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.projection = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.core = Core(dropout, fused)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, sequence, hidden) → the same."""
        parts = self.qkv(x).split(x.shape[-1], -1)
        q, k, v = (part.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        return self.projection(self.core(q, k, v, mask).transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """A pre-norm transformer layer with dropout on attention and on both branches."""

    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads, dropout, fused)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, sequence, hidden) → the same."""
        x = x + functional.dropout(self.attention(self.norm_1(x), mask), self.dropout)
        return x + functional.dropout(self.down(functional.gelu(self.up(self.norm_2(x)))), self.dropout)


class Decoder(nn.Module):
    """Layers between an embedding and the logits of the same table, and the mean loss."""

    def __init__(
        self, layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, sequence: int, fused: bool, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(vocabulary, hidden), nn.Embedding(sequence, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, ffn, dropout, fused) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.register_buffer("mask", torch.ones(sequence, sequence, dtype=torch.bool).triu(1))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """(batch, sequence) each → the loss."""
        x = self.table(ids) + self.positions.weight
        for layer in self.layers:
            x = layer(x, self.mask)
        logits = functional.linear(self.norm(x), self.table.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def traced(batch: int, sequence: int, dtype: torch.dtype = torch.half, **sizes: Any) -> Program:
    """The traced model, without weights; `sizes` are those of `Decoder`."""
    with torch.device("meta"):
        model = Decoder(sequence=sequence, **sizes).to(dtype)
        ids = torch.zeros(batch, sequence, dtype=torch.long)
    return trace(model, (ids, ids), dynamic=False)


# ---- one layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer, forward and backward, and the forward seconds of its attention core."""

    forward: float
    backward: float
    core: float

    def recomputed(self, what: str) -> Seconds:
        """With "none", "full" or "selective" recomputation."""
        return Seconds(self.forward, self.backward + {"none": 0.0, "full": self.forward, "selective": self.core}[what])


@dataclass(frozen=True)
class Planned:
    """A model planned in Megatron's way, and the seconds of a step."""

    space: Space
    border: Border
    prices: ConversionPrices
    chosen: dict[int, Strategy]
    step: float

    def seconds(self, module: str) -> Seconds:
        """Time of all operators in a module, and of the conversions of their results."""
        program, forward, backward = self.space.program, 0.0, 0.0
        for node in program.nodes:
            if node.kind == "op" and _inside(node.path, module):
                owner = self.space.folding.representative[node.index]
                found = node_seconds(program, node, self.space.rules[owner], self.chosen[owner], self.prices)
                forward, backward = forward + found.forward, backward + found.backward
        for conversion in conversions(self.space, self.chosen, self.border, self.prices):
            node = program.nodes[conversion.ref.node]
            if node.kind == "op" and _inside(node.path, module):
                ways = [self.prices.traffic(move, program.type_of(conversion.ref)) for move in conversion.path]
                forward += sum(self.prices.seconds(way[0]) for way in ways)
                backward += sum(self.prices.seconds(way[1]) for way in ways)
        return Seconds(forward, backward)


def planned(program: Program, cluster: Cluster, ranks: int, sequence_parallel: bool, compiled: bool) -> Planned:
    """The cheapest plan that keeps to Megatron's pattern."""
    request = Request({"tp": ranks}, compiled=compiled)
    space, border = prepare(program, request)
    prices = ConversionPrices(cluster, request.mesh, True, traced_sizes(program), compiled=compiled)
    allowed = apply_pins(space, PINS) | _stream(space, sequence_parallel) if ranks > 1 else None
    formulation = formulate(space, prices, border, allowed)
    solution = solve(formulation.problem)
    chosen = {
        node: space.strategies[node][strategy]
        for node, strategy in zip(formulation.nodes, solution.chosen, strict=False)
        if node is not None
    }
    return Planned(space, border, prices, chosen, solution.seconds)


def layer_time(program: Program, cluster: Cluster, ranks: int, sequence_parallel: bool, compiled: bool) -> LayerTime:
    """The middle layer of the planned model."""
    plan = planned(program, cluster, ranks, sequence_parallel, compiled)
    whole = plan.seconds(LAYER)
    return LayerTime(whole.forward, whole.backward, plan.seconds(CORE).forward)


def _stream(space: Space, sequence_parallel: bool) -> dict[int, tuple[int, ...]]:
    """Norms, dropout and sums of the residual stream, whole on every rank or split by sequence."""
    program = space.program
    found = {}
    for index, options in space.strategies.items():
        node = program.nodes[index]
        if node.kind == "op" and node.op.split(".")[1] in ("layer_norm", "dropout", "add") and ".attention" not in node.path:
            kept = [number for number, option in enumerate(options) if _is_so(option, sequence_parallel)]
            found[index] = tuple(kept)
    return found


def _is_so(option: Strategy, sequence_parallel: bool) -> bool:
    dims = [split.dim for split in option.outputs[0].splits]
    return dims == [1] if sequence_parallel else not dims and "P" not in option.outputs[0].kinds


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


# ---- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """One published time in seconds, and the run that it is of."""

    way: str
    recompute: str
    sequence_parallel: bool
    seconds: float


def published(rows: Iterable[Mapping[str, Any]]) -> list[Published]:
    """The forward and backward times of the 22B layer."""
    return [
        Published(
            "forward" if row["metric"] == "layer_fwd_time" else "backward", row["recompute"], row["sp"], 1e-3 * row["value"]
        )
        for row in rows
        if row["kind"] == "train_layer" and row["metric"] in ("layer_fwd_time", "layer_bwd_time") and row["model"] == "gpt_22b"
    ]


def layer_table(figures: Sequence[Published], times: Mapping[str, Mapping[bool, LayerTime]]) -> Table:
    """Measured against predicted milliseconds; the first of `times` is the one to judge, the others are information."""
    table = Table(title="Megatron 22B, one layer, 8 A100 80 GB (arXiv:2205.05198, Table 4), ms")
    for name in ("pass", "recompute", "sequence parallel", "measured", *times):
        table.add_column(name, justify="right")
    worst = 0.0
    for figure in figures:
        cells = []
        for place, kind in enumerate(times):
            found = getattr(times[kind][figure.sequence_parallel].recomputed(figure.recompute), figure.way)
            error = found / figure.seconds - 1
            worst = max(worst, abs(error)) if place == 0 else worst
            cells.append(f"{1e3 * found:.2f} ({error:+.1%})")
        row = (figure.way, figure.recompute, "yes" if figure.sequence_parallel else "no", f"{1e3 * figure.seconds:.1f}")
        table.add_row(*row, *cells)
    table.caption = f"largest error of the first column: {worst:.1%}"
    return table


def scaling_table() -> Table:
    """Strong scaling of Megatron's 1.2B model: 40 layers of 1536, 16 heads, batch 8 of 1024 tokens, each layer recomputed.

    In 2019 no kernel of it was fused but the optimizer.
    """
    program = traced(8, 1024, layers=40, hidden=1536, heads=16, ffn=6144, vocabulary=51200, fused=False)
    table = Table(title="Megatron 1.2B on V100, speedup over one GPU (arXiv:1909.08053)")
    for name in ("ranks", "measured", "predicted", "step, ms"):
        table.add_column(name, justify="right")
    alone = 0.0
    for ranks, measured in MEGATRON.items():
        plan = planned(program, load_cluster("dgx-2"), ranks, sequence_parallel=False, compiled=False)
        seconds = plan.step + plan.seconds("layers").forward
        alone = alone or seconds
        table.add_row(str(ranks), f"{measured:.2f}", f"{alone / seconds:.2f}", f"{1e3 * seconds:.0f}")
    return table


def main(
    data: Annotated[Path, typer.Option(help="Folder with published_figures.yaml.")],
    scaling: Annotated[bool, typer.Option(help="Also the 1.2B model on V100.")] = True,
) -> None:
    """Print the tables."""
    figures = published(yaml.safe_load((data / "published_figures.yaml").read_text())["rows"])
    cluster, console = load_cluster("dgx-a100"), Console(width=140)
    sizes: dict[str, Any] = {"layers": 3, "hidden": 6144, "heads": 64, "ffn": 24576, "vocabulary": 51200}
    programs = {fused: traced(4, 2048, fused=fused, **sizes) for fused in (True, False)}
    kinds = {"predicted": (True, True), "eager, fused softmax": (True, False), "eager": (False, False), "compiled": (False, True)}
    times = {
        kind: {split: layer_time(programs[fused], cluster, 8, split, compiled) for split in (False, True)}
        for kind, (fused, compiled) in kinds.items()
    }
    console.print(layer_table(figures, times))
    if scaling:
        console.print(scaling_table())


if __name__ == "__main__":
    typer.run(main)

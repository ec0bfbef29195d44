"""What the emitted module costs beside hand-written parallel code: `python -m tests.benchmarks.step_overhead [--pairs 40]`.

Two Gloo ranks run forward and backward of one pre-norm transformer block (attention and MLP, float32, one thread each) in
three ways, with equal weights and inputs (the input requires grad, as inside a model):

    autotp    the module that `autotp.parallelize` emits; pins fix Megatron's pattern (q, k, v, up column; o, down row)
    by hand   the same pattern written out: plain local parameters, two autograd functions around `dist.all_reduce`
    DTensor   `parallelize_module` with `ColwiseParallel` and `RowwiseParallel`

Outputs and gradients are compared with the single device first. Then the ways take turns in one run, in changing order; the
ranks meet at a barrier before every step, and a step lasts as long as on the slower rank. Shown are the median of the ratios
of neighbours and its 95 % bootstrap interval. The sizes are small, so that overhead shows.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

import autotp
from tests.ranks import run_ranks

RANKS = 2
BATCH, SEQ, HEADS = 4, 32, 4
COLUMN, ROW = ("q", "k", "v", "up"), ("o", "down")


class Block(nn.Module):
    """The block as one device runs it; `width` of a head is fixed, so that it also runs on this rank's heads alone."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.width = hidden // HEADS
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def heads(self, x: Tensor) -> Tensor:
        """[batch, sequence, heads × width] → [batch, heads, sequence, width]."""
        return x.view(x.shape[0], x.shape[1], -1, self.width).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, sequence, hidden]."""
        y = self.norm_1(x)
        mixed = scaled_dot_product_attention(self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y)), is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm_2(x))))


class F(torch.autograd.Function):
    """Megatron's f: nothing forward, an all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class G(torch.autograd.Function):
    """Megatron's g: an all-reduce forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class ByHand(nn.Module):
    """The block written for this rank: its rows of the column-parallel weights, its columns of the row-parallel ones."""

    def __init__(self, block: Block, rank: int) -> None:
        super().__init__()
        self.width = block.width
        for name, full in block.named_parameters():
            key = name.replace(".", "_")
            self.register_parameter(key, nn.Parameter(local_part(name, full, rank).detach().clone()))

    def heads(self, x: Tensor) -> Tensor:
        """As in `Block`, on this rank's heads."""
        return x.view(x.shape[0], x.shape[1], -1, self.width).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, sequence, hidden], the same on every rank."""
        shape = x.shape[-1:]
        y = F.apply(layer_norm(x, shape, self.norm_1_weight, self.norm_1_bias))
        q = self.heads(linear(y, self.q_weight, self.q_bias))
        k = self.heads(linear(y, self.k_weight, self.k_bias))
        v = self.heads(linear(y, self.v_weight, self.v_bias))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + (G.apply(linear(mixed, self.o_weight)) + self.o_bias)
        y = F.apply(layer_norm(x, shape, self.norm_2_weight, self.norm_2_bias))
        inner = gelu(linear(y, self.up_weight, self.up_bias))
        return x + (G.apply(linear(inner, self.down_weight)) + self.down_bias)


def local_part(name: str, full: Tensor, rank: int) -> Tensor:
    """What `rank` holds of a parameter, or of its gradient, in Megatron's pattern."""
    module, kind = name.split(".")
    if module in COLUMN:
        return full.chunk(RANKS)[rank]
    return full.chunk(RANKS, 1)[rank] if module in ROW and kind == "weight" else full


def three_ways(hidden: int) -> tuple[Block, dict[str, nn.Module], Tensor]:
    """The block on one device, the same on this rank in the three ways, and an input."""
    torch.manual_seed(0)
    block, x = Block(hidden), torch.randn(BATCH, SEQ, hidden, requires_grad=True)
    pins = {**dict.fromkeys(COLUMN, "column"), **dict.fromkeys(ROW, "row"), "norm_1": "replicate", "norm_2": "replicate"}
    style = {**{name: ColwiseParallel() for name in COLUMN}, **{name: RowwiseParallel() for name in ROW}}
    tensors = Block(hidden)
    tensors.load_state_dict(block.state_dict())
    return (
        block,
        {
            "autotp": autotp.parallelize(block, (x,), mesh=RANKS, pins=pins),
            "by hand": ByHand(block, dist.get_rank()),
            "DTensor": parallelize_module(tensors, init_device_mesh("cpu", (RANKS,)), style),
        },
        x,
    )


def check_equal(block: Block, ways: dict[str, nn.Module], x: Tensor) -> dict[str, str]:
    """Every way gives the block's output and gradients; the collectives of each, forward and backward together."""
    wanted = block(x)
    wanted.sum().backward()
    gradients = [x.grad, *(local_part(name, weight.grad, dist.get_rank()) for name, weight in block.named_parameters())]
    counts = {}
    near = {"rtol": 1e-4, "atol": 1e-4}
    for name, way in ways.items():
        x.grad = None
        with CommDebugMode() as comm:
            output = way(x)
            output.sum().backward()
        torch.testing.assert_close(output, wanted, **near, msg=lambda text, name=name: f"output of {name}: {text}")
        found = [x.grad, *(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in way.parameters())]
        names = ["the input", *(key for key, _ in block.named_parameters())]
        for key, mine, theirs in zip(names, found, gradients, strict=True):
            say = f"gradient of {key} in {name}"
            torch.testing.assert_close(mine, theirs, **near, msg=lambda text, say=say: f"{say}: {text}")
        kinds: Counter[str] = Counter()
        for op, count in comm.get_comm_counts().items():
            kinds[str(op).rsplit(".", 1)[-1].strip("_")] += count
        counts[name] = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return counts


def step_time(way: nn.Module, x: Tensor, gradient: Tensor) -> float:
    """Seconds of one forward and backward on this rank."""
    way.zero_grad()
    x.grad = None
    dist.barrier()
    start = time.perf_counter()
    way(x).backward(gradient)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Measured:
    """Seconds per step of each way, one entry per turn."""

    hidden: int
    seconds: dict[str, list[float]]
    collectives: dict[str, str]

    def ratio(self, other: str) -> tuple[float, float, float]:
        """Median of autotp's time over that of `other`, and the ends of its 95 % bootstrap interval."""
        ratios = [a / b for a, b in zip(self.seconds["autotp"], self.seconds[other], strict=True)]
        draw = random.Random(0)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
        return statistics.median(ratios), medians[49], medians[-50]


def measure(hidden: int, pairs: int, steps: int) -> Measured:
    """`pairs` turns; in each, every way takes `steps` steps, of which the median counts."""
    block, ways, x = three_ways(hidden)
    counts = check_equal(block, ways, x)
    gradient = torch.randn_like(x)
    names = list(ways)
    for way in ways.values():
        for _ in range(10):
            step_time(way, x, gradient)
    mine: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(pairs):
        order = names[turn % 3 :] + names[: turn % 3]
        for name in order if turn % 2 else reversed(order):
            mine[name].append([step_time(ways[name], x, gradient) for _ in range(steps)])
    slowest = torch.tensor([mine[name] for name in names], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    medians = slowest.median(-1).values.tolist()
    return Measured(hidden, dict(zip(names, medians, strict=True)), counts)


def report(sizes: Sequence[int], pairs: int, steps: int) -> None:
    """Measure and print, on every rank; rank 0 prints."""
    say: Callable[..., None] = print if dist.get_rank() == 0 else lambda *_: None
    say(f"torch {torch.__version__}, {RANKS} Gloo ranks, batch {BATCH} × sequence {SEQ}, {HEADS} heads, {pairs} pairs of {steps} steps\n")
    say("| hidden | autotp ms | by hand ms | DTensor ms | autotp / by hand (95 %) | autotp / DTensor (95 %) |")
    say("|---|---|---|---|---|---|")
    for hidden in sizes:
        found = measure(hidden, pairs, steps)
        times = " | ".join(f"{1e3 * statistics.median(seconds):.2f}" for seconds in found.seconds.values())
        ratios = ("{:.3f} ({:.3f}–{:.3f})".format(*found.ratio(other)) for other in ("by hand", "DTensor"))
        say(f"| {hidden} | {times} | {' | '.join(ratios)} |")
    say("\nCollectives of one step:")
    for name, text in found.collectives.items():
        say(f"- {name}: {text}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40, help="turns in which every way is measured (default 40)")
    parser.add_argument("--steps", type=int, default=5, help="steps of every way in a turn; the median counts (default 5)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256, 512], help="hidden sizes (default 64 256 512)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    run_ranks(report, RANKS, options.hidden, options.pairs, options.steps)
    sys.stdout.flush()


if __name__ == "__main__":
    main()

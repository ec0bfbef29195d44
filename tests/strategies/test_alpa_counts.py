"""The counts of collectives that Alpa's tests assert (Zheng et al. 2022), on four devices, for a train step, reproduced or beaten.

Counted as there: gradients of weights that are reduced over the same mesh axis are one collective for the whole model (XLA merges
them; the emitted module has one bucket for each repeated block and one for the rest), gathers and reduce-scatters of weights too
(here they are one per weight), and the loss, a number that Alpa's step does not return, is left out. Nothing overlaps.

Prices are Alpa's: bytes over bandwidth, with links of bandwidth 1, or 1 across and 10 inside for its mesh costs [1, 0.1], a small
start-up time, and products that are much dearer than communication, so that nothing is computed twice (Alpa forbids that instead).
Messages below 1 KiB cost as much as 1 KiB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp.layouts import COLLECTIVES
from autotp.price.cluster import KINDS, Cluster, Link, Sweep
from autotp.price.communication import Group, collective_seconds
from tests.models import TOLERANCE
from tests.strategies.models import Block, Experts, Sizes
from tests.strategies.search import Found, prices, search, worst_at

ONE = {"m": 4}
TWO = {"slow": 2, "fast": 2}


def links(count: int, flops: float = 1e10) -> Cluster:
    bandwidth = {1: (1e9,), 2: (1e9, 1e8)}[count]
    return prices(bandwidth, (None,) if count == 1 else (2, None), latency=1e-6, flops=flops)


class SquareError(nn.Module):
    """The mean square difference of a model's output from a target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x) - y).square().mean()


def counts(found: Found) -> Counter[str]:
    """Kind of collective → how often, of activations each, of weights merged by kind, mesh axis and direction."""
    total: Counter[str] = Counter()
    merged: set[tuple[str, str]] = set()
    gathers = {(entry.node, entry.layouts[-1]): [word for word in entry.forward if word] for entry in found.plan.conversions}
    for entry in found.plan.conversions:
        for way in ("forward", "backward"):
            for word in getattr(entry, way):
                kind = word.partition(" ")[0].removesuffix("_max")
                if kind not in COLLECTIVES or entry.bytes <= 8:
                    continue
                if entry.node in found.weights:
                    merged.add((way, word))
                else:
                    total[kind] += entry.copies
    again = {word for entry in found.plan.recomputed for word in gathers.get((entry.node, entry.layout), ())}
    total.update(word.partition(" ")[0] for word in (*(word for _, word in merged), *again))
    return total


Examples = tuple[Tensor, Tensor]


def like(*shape: int) -> Examples:
    return torch.zeros(shape), torch.zeros(shape)


def random(*shape: int) -> Examples:
    x, y = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, y


# ---- MLP


class Layers(nn.Module):
    """Linear layers of one width, with ReLU between them."""

    def __init__(self, width: int, depth: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


def mlp(width: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: SquareError(Layers(width, bias=bias))


def test_mlp_data_parallel() -> None:
    """Batch 256, width 32. Alpa: 1 all-reduce."""
    found = search(mlp(32), like(256, 32), ONE, links(1))
    assert counts(found) == {"all_reduce": 1}
    assert set(found.plan.strategies.values()) == {"batch"} and set(found.weights.values()) == {"I"}
    assert worst_at(found, mlp(8), random(8, 8)) < TOLERANCE


def test_mlp_zero_2() -> None:
    """The same with Adam's update priced, which split state makes four times shorter. Alpa: 1 reduce-scatter + 1 all-gather.

    Biases are left out: of 64 bytes, the update of a piece is not worth a collective's start.
    """
    found = search(mlp(32, bias=False), like(256, 32), ONE, prices((1e9,), (None,), latency=1e-7, flops=1e10, memory=5e8))
    assert counts(found) == {"reduce_scatter": 1, "all_gather": 1}
    assert set(found.plan.strategies.values()) == {"batch"}
    assert all(layout.startswith("S") for layout in found.weights.values())
    assert worst_at(found, mlp(8, bias=False), random(8, 8)) < TOLERANCE


def test_mlp_zero_3() -> None:
    """The same in 5 % less memory: gathered again in backward. Alpa: 1 reduce-scatter + 2 all-gathers."""
    asked = mlp(32, bias=False), like(256, 32), ONE, prices((1e9,), (None,), latency=1e-7, flops=1e10, memory=5e8)
    found = search(*asked, memory=0.95 * search(*asked).plan.memory.total)
    assert counts(found) == {"reduce_scatter": 1, "all_gather": 2}
    assert {(entry.node in found.weights, entry.layout) for entry in found.plan.recomputed} == {(True, "R")}
    assert worst_at(found, mlp(8, bias=False), random(8, 8)) < TOLERANCE


def test_mlp_model_parallel() -> None:
    """Batch 32, width 256. Alpa: 5 all-reduces, weights column- and row-parallel in turn."""
    found = search(mlp(256), like(32, 256), ONE, links(1))
    assert counts(found) == {"all_reduce": 5}
    assert list(found.plan.strategies.values()) == ["column", "row"] * 3
    assert worst_at(found, mlp(8), random(8, 8)) < TOLERANCE


def test_mlp_model_parallel_with_reduce_scatters() -> None:
    """The same, where an all-reduce is dearer than its two halves. Alpa: all-reduces + reduce-scatters = 5, as many all-gathers."""
    cluster = links(1)
    found = search(mlp(256), like(32, 256), ONE, replace(cluster, links=(dear_all_reduce(cluster),)))
    total = counts(found)
    assert total["all_reduce"] + total["reduce_scatter"] == 5
    assert total["reduce_scatter"] == total["all_gather"] > 0
    assert not set(total) - {"all_reduce", "reduce_scatter", "all_gather"}
    assert worst_at(found, mlp(8), random(8, 8)) < TOLERANCE


def dear_all_reduce(cluster: Cluster) -> Link:
    """The link with measured all-reduces of twice the time, and the other kinds as they were."""
    sizes = [1024.0 * 2**power for power in range(12)]
    sweeps = []
    for kind in KINDS:
        factor = 2.0 if kind == "all_reduce" else 1.0
        points = tuple((size, factor * collective_seconds(cluster, kind, size, Group(4))) for size in sizes)
        sweeps.append(Sweep(kind, 4, 1, points))
    return replace(cluster.links[0], sweeps=tuple(sweeps))


def test_mlp_two_axes() -> None:
    """2 × 2, batch 256, width 32, links [1, 0.1]. Alpa: 6 all-reduces, batch across, column and row inside.

    Without biases: those of row-parallel layers are summands on one rank of the fast axis, and their gradients owe a reduction over the
    slow one that no bucket merges; with them, the search gathers inputs instead, and reduce-scatters their gradients.
    """
    found = search(mlp(32, bias=False), like(256, 32), TWO, links(2, 1e9))
    assert counts(found) == {"all_reduce": 6}
    assert list(found.plan.strategies.values()) == ["batch+column", "batch+row"] * 3
    assert worst_at(found, mlp(8, bias=False), random(8, 8)) < TOLERANCE


# ---- BERT


def bert(width: int, bias: bool = True) -> Callable[[], nn.Module]:
    """Two layers of the BERT encoder with eight heads; without biases for the mesh of two axes, as above."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=8,
                hidden_dropout_prob=0, attention_probs_dropout_prob=0, attn_implementation="sdpa",
            )  # fmt: skip
            self.encoder = BertEncoder(config)
            for module in self.modules():
                if isinstance(module, nn.Linear) and not bias:
                    module.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x).last_hidden_state

    return lambda: SquareError(Encoder())


def test_bert_model_parallel() -> None:
    """Batch 8, sequence 8, width 128. Alpa: 4n - 1 = 7 all-reduces (the first layer's input needs no gradient)."""
    found = search(bert(128), like(8, 8, 128), ONE, links(1))
    assert counts(found) == {"all_reduce": 7}
    for layer in (0, 1):
        words = [found.plan.strategies[f"model.encoder.layer.{layer}.{path}"] for path in BERT_DENSE]
        assert words == ["column", "column", "column", "row", "column", "row"]
    assert worst_at(found, bert(32), random(8, 4, 32)) < TOLERANCE


BERT_DENSE = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense", "intermediate.dense", "output.dense"
)  # fmt: skip


def test_bert_two_axes() -> None:
    """2 × 2, links [1, 0.1]. Alpa: 4n = 8 all-reduces, batch across and Megatron inside, as the search finds with batch across.

    Free to choose, it does better: tensor parallelism on both axes in the order of the links, a reduce-scatter inside, an all-reduce
    of the half across, an all-gather inside. More collectives, but a fifth of the time: activations are smaller than weights here.
    """
    asked = like(8, 8, 128), TWO, links(2, 1e9)
    across = search(bert(128, bias=False), *asked, data=("slow",))
    assert counts(across) == {"all_reduce": 8}
    assert worst_at(across, bert(32, bias=False), random(8, 4, 32)) < TOLERANCE
    free = search(bert(128, bias=False), *asked)
    assert free.plan.time.communication_s < 0.25 * across.plan.time.communication_s
    assert free.plan.time.step_s < across.plan.time.step_s


def test_bert_data_parallel() -> None:
    """Batch 64, sequence 64, width 32. Alpa: 1 all-reduce."""
    found = search(bert(32), like(64, 64, 32), ONE, links(1))
    assert counts(found) == {"all_reduce": 1}
    assert {word for module, word in found.plan.strategies.items()} == {"batch"}
    assert worst_at(found, bert(32), random(4, 4, 32)) < TOLERANCE


# ---- convolutions


class Convolutions(nn.Module):
    """Convolution of stride 2, batch norm, ReLU and max pooling, repeated."""

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = functional.relu(norm(layer(x)))
            x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 2, stride=1)
        return x


def images(batch: int, channels: int, size: int, depth: int) -> Examples:
    out = size // 2**depth
    return torch.zeros(batch, channels, size, size), torch.zeros(batch, channels, out, out)


def random_images(*sizes: int) -> Examples:
    x, y = images(*sizes)
    random = torch.Generator().manual_seed(4)
    return torch.randn(x.shape, dtype=torch.float64, generator=random), torch.randn(y.shape, dtype=torch.float64, generator=random)


def test_convolutions_model_parallel() -> None:
    """Four layers, 256 channels, batch 8. Alpa: n - 1 = 3 all-reduces.

    Here: 3 too, of which those in the middle are a reduce-scatter forward and an all-gather backward, as many bytes, on the smaller
    side of each stride; and six gathers of 256 numbers, since running statistics rest whole on every rank.
    """
    found = search(lambda: SquareError(Convolutions(4, 256)), images(8, 256, 16, 4), ONE, links(1))
    total = counts(found)
    statistics = 2 * sum("variance" in entry.node for entry in found.plan.conversions)
    assert total["all_reduce"] + total["reduce_scatter"] == 3
    assert total["all_gather"] == total["reduce_scatter"] + statistics
    assert set(total) <= {"all_reduce", "reduce_scatter", "all_gather"}
    assert worst_at(found, lambda: SquareError(Convolutions(4, 8)), random_images(8, 8, 16, 4)) < TOLERANCE


def test_convolutions_with_batch_norm() -> None:
    """Three layers of 4 channels, batch 16. Alpa, data parallel: 1 + 2n = 7. Here 5: channels are split before, and tensors are so small
    that statistics of whole batches on every rank are cheaper than their reductions."""
    found = search(lambda: SquareError(Convolutions(3, 4)), images(16, 4, 16, 3), ONE, links(1, 1e8))
    assert sum(counts(found).values()) <= 7
    assert worst_at(found, lambda: SquareError(Convolutions(3, 4)), random_images(16, 4, 16, 3)) < TOLERANCE


class Depthwise(nn.Module):
    """A convolution to eight times the channels, a depthwise one, and one back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        many = 8 * channels
        self.wide = nn.Conv2d(channels, many, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(many, many, 3, padding=1, groups=many, bias=False)
        self.back, self.norm = nn.Conv2d(many, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.relu(self.back(self.depthwise(self.wide(x)))))


def test_depthwise_convolutions() -> None:
    """256 channels, batch 4. Alpa: 1 all-reduce."""
    found = search(lambda: SquareError(Depthwise(256)), images(4, 256, 8, 0), ONE, links(1))
    assert counts(found) == {"all_reduce": 1}
    assert [found.plan.strategies[f"model.{name}"] for name in ("wide", "depthwise", "back")] == ["column", "column", "row"]
    assert worst_at(found, lambda: SquareError(Depthwise(4)), random_images(4, 4, 8, 0)) < TOLERANCE


# ---- a mixture of experts


def mixture(width: int) -> Callable[[], nn.Module]:
    sizes = Sizes(1, width, heads=16, groups=16, inner=2 * width)
    return lambda: SquareError(nn.Sequential(Block(sizes), Experts(width, 4 * width, 16)))


def test_mixture_of_experts() -> None:
    """A decoder block and a layer of 16 experts, batch 64, sequence 16, width 64. Alpa: 1 all-reduce + 4 all-to-alls.

    And one gather of the experts that tokens chose (integers): Alpa's capacity per group of tokens needs none, and drops tokens.
    """
    found = search(mixture(64), like(64, 16, 64), ONE, links(1))
    assert counts(found) == {"all_reduce": 1, "all_to_all": 4, "all_gather": 1}
    assert {layout for name, layout in found.weights.items() if name.endswith(("1_up", "1_down"))} == {"S(0)"}
    assert worst_at(found, mixture(32), random(8, 4, 32)) < TOLERANCE


def test_mixture_of_experts_on_two_axes() -> None:
    """2 × 2, equal links. Alpa: 2 all-reduces + all-to-alls, experts on one axis, whose gradients are all-reduced over the other.

    Here experts are split over both axes in order, their weights are never reduced, and tokens come and go in two steps: more
    collectives than Alpa's, in less time than its experts' gradients and four all-to-alls alone would take.
    """
    cluster = links(1)
    found = search(mixture(64), like(64, 16, 64), TWO, cluster)
    experts = {name: layout for name, layout in found.weights.items() if name.endswith(("1_up", "1_down"))}
    assert set(experts.values()) == {"S(0; 1 of 2), S(0; 2 of 2)"}
    assert all(found.used(name) == {layout} for name, layout in experts.items())
    assert found.moved("forward", weights=False)["all_to_all over fast"] > 0
    gradients, rows = 2 * 16 * 64 * 256 * 2 / 2, 2 * 64 * 16 * 64 * 2 / 4  # bytes per device
    alpa = collective_seconds(cluster, "all_reduce", gradients, Group(2)) + 4 * collective_seconds(cluster, "all_to_all", rows, Group(2))
    assert found.plan.time.communication_s < alpa
    assert worst_at(found, mixture(32), random(8, 4, 32)) < TOLERANCE

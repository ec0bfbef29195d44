"""Plain PyTorch models of the families of the literature, at any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers.integrations.moe  # noqa: F401 - registers a grouped product that has float64
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder: `groups` key and value heads for `heads` query heads, MLPs of `inner` features."""

    layers: int = 2
    width: int = 32
    heads: int = 8
    groups: int = 8
    inner: int = 64
    vocabulary: int = 64


class Block(nn.Module):
    """A pre-norm decoder block: causal attention with grouped heads, and a gated MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head = sizes.width // sizes.heads
        self.norm1, self.norm2 = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.q = nn.Linear(sizes.width, sizes.width, bias=False)
        self.k = nn.Linear(sizes.width, sizes.groups * self.head, bias=False)
        self.v = nn.Linear(sizes.width, sizes.groups * self.head, bias=False)
        self.o = nn.Linear(sizes.width, sizes.width, bias=False)
        self.gate = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.up = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.width, bias=False)
        self.grouped = sizes.groups != sizes.heads

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (proj(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head (which may share the embedding's weight); returns the mean loss."""

    def __init__(self, sizes: Sizes, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embedding(ids))))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Experts(nn.Module):
    """A residual mixture: every token goes to `chosen` of `experts` gated MLPs of `inner` features."""

    def __init__(self, width: int, inner: int, experts: int, chosen: int = 2) -> None:
        super().__init__()
        self.experts, self.chosen = experts, chosen
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner))
        self.down = nn.Parameter(torch.randn(experts, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(self.chosen, -1)
        keys = chosen.flatten()
        slots = torch.argsort(keys, stable=True)
        counts = (keys.unsqueeze(1) == torch.arange(self.experts, device=x.device)).sum(0)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        rows = functional.silu(product(tokens[slots // self.chosen], self.up, ends))
        rows = product(rows, self.down, ends) * weights.flatten()[slots].unsqueeze(-1)
        rows = rows[torch.argsort(slots)].unflatten(0, (-1, self.chosen)).sum(1)
        return x + rows.view_as(x)


class MixtureModel(nn.Module):
    """Layers of `Experts`; returns the mean square of what they make of the inputs."""

    def __init__(self, layers: int, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Experts(width, inner, experts) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class MLP(nn.Module):
    """Two linear layers without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.relu(self.up(x)))

"""Small models in plain torch, as a user might bring them: transformers, recurrent, graphs, odd inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model with the positional and keyword arguments of one step."""

MODELS: dict[str, Callable[[], Made]] = {}
"""Name → how to make it; random numbers come from the caller's generator."""


def model(make: Callable[[], Made]) -> Callable[[], Made]:
    """Enter a function into `MODELS` under its own name."""
    MODELS[make.__name__] = make
    return make


def tokens(*shape: int, below: int = 37) -> Tensor:
    """Random token ids."""
    return torch.randint(0, below, shape)


# ---- transformers of torch.nn ------------------------------------------------------------------------------------------


@model
def transformer() -> Made:
    net = nn.Transformer(24, 3, 2, 2, 40, dropout=0.0, batch_first=True)
    return net, (torch.randn(2, 7, 24), torch.randn(2, 5, 24)), {}


@model
def transformer_sequence_first() -> Made:
    net = nn.Transformer(24, 3, 1, 1, 40, dropout=0.0, norm_first=True, activation="gelu")
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    return net, (torch.randn(7, 2, 24), torch.randn(5, 2, 24)), {"tgt_mask": mask}


@model
def transformer_encoder() -> Made:
    layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return net, (torch.randn(3, 6, 24),), {}


@model
def transformer_encoder_padded() -> Made:
    layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return net, (torch.randn(3, 6, 24),), {"src_key_padding_mask": padding}


@model
def transformer_decoder() -> Made:
    layer = nn.TransformerDecoderLayer(24, 3, 40, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 2), (torch.randn(3, 6, 24), torch.randn(3, 8, 24)), {}


@model
def attention_with_weights() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 3, batch_first=True, kdim=16, vdim=20)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            mixed, weights = self.attention(query, key, value, need_weights=True)
            return mixed, weights

    return Net(), (torch.randn(2, 5, 24), torch.randn(2, 7, 16), torch.randn(2, 7, 20)), {}


# ---- recurrent ---------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Embedding → recurrent layers → vocabulary → loss; `cell` is `nn.LSTM`, `nn.GRU` or `nn.RNN`."""

    def __init__(self, cell: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        width = 20 * (2 if options.get("bidirectional") else 1)
        self.embedding = nn.Embedding(37, 16)
        self.cell = cell(16, 20, num_layers=2, batch_first=True, **options)
        self.head = nn.Linear(width, 37)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.cell(self.embedding(ids))[0])
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@model
def lstm() -> Made:
    return Recurrent(nn.LSTM), (tokens(2, 6), tokens(2, 6)), {}


@model
def lstm_bidirectional() -> Made:
    return Recurrent(nn.LSTM, bidirectional=True), (tokens(2, 6), tokens(2, 6)), {}


@model
def gru() -> Made:
    return Recurrent(nn.GRU), (tokens(2, 6), tokens(2, 6)), {}


@model
def rnn() -> Made:
    return Recurrent(nn.RNN, nonlinearity="relu"), (tokens(2, 6), tokens(2, 6)), {}


@model
def lstm_cell_loop() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(12, 20), nn.Linear(20, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            hidden = cell = x.new_zeros(x.shape[0], 20)
            for step in x.unbind(1):
                hidden, cell = self.cell(step, (hidden, cell))
            return self.head(hidden), (hidden, cell)

    return Net(), (torch.randn(3, 5, 12),), {}


# ---- others ------------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """One MLP-Mixer block: an MLP across patches, then one across channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm_one, self.norm_two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across_patches = nn.Sequential(nn.Linear(patches, 20), nn.GELU(), nn.Linear(20, patches))
        self.across_channels = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across_patches(self.norm_one(x).transpose(1, 2)).transpose(1, 2)
        return x + self.across_channels(self.norm_two(x))


@model
def mlp_mixer() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.blocks = nn.Conv2d(3, 24, 4, 4), nn.Sequential(Mixer(16, 24), Mixer(16, 24))
            self.head = nn.Linear(24, 10)

        def forward(self, image: Tensor) -> Tensor:
            return self.head(self.blocks(self.patches(image).flatten(2).transpose(1, 2)).mean(1))

    return Net(), (torch.randn(2, 3, 16, 16),), {}


@model
def graph() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.update, self.head = nn.Linear(32, 24), nn.Linear(40, 16), nn.Linear(16, 3)

        def forward(self, nodes: Tensor, source: Tensor, target: Tensor) -> Tensor:
            for _ in range(2):
                messages = functional.relu(self.message(torch.cat([nodes[source], nodes[target]], -1)))
                gathered = nodes.new_zeros(nodes.shape[0], 24).index_add(0, target, messages)
                nodes = torch.tanh(self.update(torch.cat([nodes, gathered], -1)))
            return self.head(nodes)

    return Net(), (torch.randn(9, 16), tokens(20, below=9), tokens(20, below=9)), {}


@model
def graph_scatter() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, nodes: Tensor, source: Tensor, target: Tensor) -> Tensor:
            messages = self.message(nodes).index_select(0, source)
            index = target[:, None].expand_as(messages)
            total = torch.zeros_like(nodes).scatter_add(0, index, messages)
            count = torch.zeros_like(nodes[:, 0]).index_add(0, target, torch.ones_like(target, dtype=nodes.dtype))
            return functional.log_softmax(self.head(total / count.clamp(min=1)[:, None]), -1)

    return Net(), (torch.randn(9, 16), tokens(20, below=9), tokens(20, below=9)), {}


@model
def recommender() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(size, 12) for size in (50, 31, 17))
            self.bag = nn.EmbeddingBag(40, 12, mode="sum")
            self.bottom = nn.Sequential(nn.Linear(7, 24), nn.ReLU(), nn.Linear(24, 12))
            self.top = nn.Sequential(nn.Linear(22, 16), nn.ReLU(), nn.Linear(16, 1))

        def forward(self, dense: Tensor, sparse: Tensor, history: Tensor, clicked: Tensor) -> Tensor:
            features = [self.bottom(dense), self.bag(history), *(table(sparse[:, n]) for n, table in enumerate(self.tables))]
            stacked = torch.stack(features, 1)
            pairs = torch.bmm(stacked, stacked.transpose(1, 2))
            row, column = torch.tril_indices(5, 5, -1)
            logit = self.top(torch.cat([features[0], pairs[:, row, column]], 1)).squeeze(1)
            return functional.binary_cross_entropy_with_logits(logit, clicked)

    return Net(), (torch.randn(6, 7), tokens(6, 3, below=17), tokens(6, 4, below=40), torch.rand(6)), {}


@model
def mixture_of_experts() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.head = nn.Linear(16, 6), nn.Linear(16, 5)
            self.up, self.down = nn.Parameter(torch.randn(6, 16, 24) / 4), nn.Parameter(torch.randn(6, 24, 16) / 5)

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.router(x).softmax(-1).topk(2, -1)
            gate = torch.zeros_like(self.router(x)).scatter(-1, chosen, weights)
            hidden = functional.gelu(torch.einsum("btd,edh->beth", x, self.up))
            mixed = torch.einsum("beth,ehd->betd", hidden, self.down)
            return self.head(x + torch.einsum("betd,bte->btd", mixed, gate))

    return Net(), (torch.randn(2, 5, 16),), {}


@dataclass
class Nested:
    """An output that is a dataclass with a dict in it."""

    loss: Tensor
    parts: dict[str, Any]


torch.utils._pytree.register_dataclass(Nested)


@model
def nested_output() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, batch: dict[str, Any], *, scale: Tensor) -> Nested:
            hidden = functional.silu(self.one(batch["x"]))
            found = self.two(hidden) * scale
            loss = functional.mse_loss(found, batch["more"][0]) + functional.smooth_l1_loss(found, batch["more"][1])
            return Nested(loss, {"hidden": (hidden, [found]), "none": None, "name": 3})

    batch = {"x": torch.randn(4, 12), "more": [torch.randn(4, 12), torch.randn(4, 12)]}
    return Net(), (batch,), {"scale": torch.randn(12)}


@model
def shared_and_tied() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(37, 16), nn.Linear(16, 37, bias=False)
            self.head.weight = self.embedding.weight
            self.block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            self.again = self.block
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embedding(ids)
            for _ in range(2):
                x = x + self.scale * self.again(self.block(x))
            logits = self.head(x)
            return functional.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.1), logits

    return Net(), (tokens(2, 6), tokens(2, 6)), {}


@model
def changing_buffers() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(12, 16), nn.Linear(16, 12)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.register_buffer("mean", torch.zeros(16))
            self.register_buffer("code", torch.randn(8, 16))
            self.register_buffer("used", torch.zeros(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.encode(x)
            nearest = torch.cdist(hidden.detach(), self.code).argmin(-1)
            with torch.no_grad():
                self.steps += 1
                self.mean.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
                self.used += functional.one_hot(nearest, 8).to(self.used.dtype).sum(0)
            quantised = hidden + (self.code[nearest] - hidden).detach()
            return self.decode(quantised - self.mean)

    return Net(), (torch.randn(5, 12),), {}


@model
def frozen_and_adapted() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(24, 36)
            self.base.requires_grad_(False)
            self.down, self.up, self.head = nn.Linear(24, 4, bias=False), nn.Linear(4, 36, bias=False), nn.Linear(36, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(functional.relu(self.base(x) + self.up(self.down(x))))

    return Net(), (torch.randn(3, 7, 24),), {}


@model
def contrastive() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(12, 20), nn.Linear(9, 20)
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            one, other = functional.normalize(self.left(one), dim=-1), functional.normalize(self.right(other), dim=-1)
            logits = self.temperature.exp() * one @ other.t()
            target = torch.arange(logits.shape[0], device=logits.device)
            return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.t(), target)) / 2

    return Net(), (torch.randn(5, 12), torch.randn(5, 9)), {}


@model
def variational() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(14, 2 * 6), nn.Sequential(nn.Linear(6, 20), nn.Softplus(), nn.Linear(20, 14))

        def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            mean, spread = self.encode(x).chunk(2, -1)
            found = self.decode(mean + noise * (0.5 * spread).exp())
            divergence = -0.5 * (1 + spread - mean**2 - spread.exp()).sum(-1).mean()
            return functional.binary_cross_entropy_with_logits(found, x.sigmoid()) + divergence, found

    return Net(), (torch.randn(4, 14), torch.randn(4, 6)), {}

"""A plain MLP, the smallest model to plan: `autotp plan examples/mlp.py:mlp`.

Each layer is LayerNorm, Linear and GELU. Wide layers and few rows favour tensor parallelism (weights cut column, row,
column, row); narrow layers and many rows favour data parallelism.
"""

import torch
from torch import nn


def mlp(batch: int = 32, width: int = 1024, layers: int = 4) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """An MLP of `layers` layers that keep the shape (batch, width), and an example input of that shape."""
    blocks = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(layers)]
    return nn.Sequential(*blocks), (torch.randn(batch, width),)

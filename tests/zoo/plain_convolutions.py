"""Small convolutional models in plain torch: residual, U-shaped, grouped, transposed, normed weights, one to three dims."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.zoo.plain import Made, model


class Residual(nn.Module):
    """Two 3 × 3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.two, self.norm_two = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm_one(self.one(x)))
        return functional.relu(self.norm_two(self.two(y)) + self.shortcut(x))


@model
def resnet() -> Made:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 7, 2, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Residual(12, 12), Residual(12, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    return net, (torch.randn(3, 3, 32, 32),), {}


class UNet(nn.Module):
    """Two levels down and up, with skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()

        def block(inside: int, outside: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.SiLU())

        self.down, self.middle, self.bottom = block(3, 8), block(8, 16), block(16, 32)
        self.up_one, self.join_one = nn.ConvTranspose2d(32, 16, 2, 2), block(32, 16)
        self.up_two, self.join_two = nn.Upsample(scale_factor=2, mode="bilinear"), block(24, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down(x)
        two = self.middle(functional.max_pool2d(one, 2))
        three = self.bottom(functional.avg_pool2d(two, 2))
        two = self.join_one(torch.cat([self.up_one(three), two], 1))
        return self.out(self.join_two(torch.cat([self.up_two(two), one], 1)))


@model
def u_net() -> Made:
    return UNet(), (torch.randn(2, 3, 16, 16),), {}


@model
def mobile_conv() -> Made:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.Hardswish(), nn.Conv2d(12, 12, 5, padding=2, groups=12), nn.InstanceNorm2d(12, affine=True),
        nn.Conv2d(12, 18, 3, dilation=2, groups=3), nn.PReLU(18), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(72, 7),
    )  # fmt: skip
    return net, (torch.randn(2, 3, 12, 12),), {}


@model
def conv_1d() -> Made:
    net = nn.Sequential(nn.Conv1d(5, 12, 3, 2), nn.BatchNorm1d(12), nn.ELU(), nn.Conv1d(12, 9, 3, padding="same"), nn.AvgPool1d(2))
    return net, (torch.randn(3, 5, 21),), {}


@model
def conv_3d() -> Made:
    net = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.LeakyReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(64, 5))
    return net, (torch.randn(2, 2, 4, 4, 4),), {}


@model
def autoencoder() -> Made:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip
    return net, (torch.rand(3, 1, 16, 16),), {}


@model
def discriminator_spectral() -> Made:
    normed = parametrizations.spectral_norm
    net = nn.Sequential(
        normed(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2), normed(nn.Conv2d(8, 16, 4, 2, 1)), nn.LeakyReLU(0.2),
        nn.Flatten(), normed(nn.Linear(256, 1)),
    )  # fmt: skip
    return net, (torch.randn(3, 3, 16, 16),), {}


@model
def discriminator_weight_norm() -> Made:
    normed = parametrizations.weight_norm
    net = nn.Sequential(
        normed(nn.Conv1d(2, 12, 5, 2)), nn.LeakyReLU(0.2), normed(nn.Conv1d(12, 24, 5, 2)), nn.LeakyReLU(0.2),
        nn.Flatten(), normed(nn.Linear(120, 4)),
    )  # fmt: skip
    return net, (torch.randn(3, 2, 32),), {}

"""The next token from logits: the most probable one, or one that is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotp.errors import AutotpError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the words are those of transformers' `generate`.

    Attributes:
        do_sample: draw from the distribution; otherwise the most probable token is taken (greedy decoding).
        temperature: logits are divided by it.
        top_k: draw among the k most probable tokens only; None or 0: among all.
        top_p: draw among the fewest most probable tokens whose probabilities add up to at least this (nucleus sampling, Holtzman et al.
            2020, arXiv:1904.09751); None or 1: among all.

    Raises:
        AutotpError: a number that is out of its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if not self.temperature > 0:
            raise AutotpError(f"temperature is {self.temperature}; it must be above 0 (for the most probable token: do_sample=False)")
        if self.top_k is not None and self.top_k < 0:
            raise AutotpError(f"top_k is {self.top_k}; give the number of tokens to draw among, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise AutotpError(f"top_p is {self.top_p}; it is a probability above 0 and at most 1")


def next_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token for each row: (batch, vocabulary) → (batch,), int64.

    Temperature, top-k and top-p are applied in this order, in float32, and one number is drawn for each row, so that tokens equal those of
    transformers' `generate` under the same seed.
    """
    if not sampling.do_sample:
        return logits.argmax(-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = scores.sort()
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False  # the most probable token stays
        scores = scores.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)

"""A `KeyValueCache` as transformers' models see a cache: this file imports transformers, and is imported only where a model runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from autotp.key_value_cache import KeyValueCache


class StepCache(Cache):  # type: ignore[misc]
    """The cache during one step, at given positions.

    Prefill attends to the prompt itself, whose keys and values it has at hand, under a plain causal mask; decode attends to the whole
    cache, under a mask that ends at the token's position.

    Args:
        cache: where keys and values are written.
        positions: of the tokens of this step, (tokens,).
        decodes: whether this is decode.
    """

    is_compileable = True  # of one token, transformers leaves the mask away otherwise, as if the cache were full

    def __init__(self, cache: KeyValueCache, positions: Tensor, decodes: bool) -> None:
        super().__init__(layers=[])
        self.cache, self.positions, self.decodes = cache, positions, decodes

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; what its attention is to read."""
        held = self.cache.write(layer_idx, self.positions, key_states, value_states)
        return held if self.decodes else (key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The position of the first token of this step."""
        return self.positions if self.decodes else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many keys attention reads, and the position of the first of them."""
        return (self.cache.context if self.decodes else query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that the cache holds."""
        return self.cache.context

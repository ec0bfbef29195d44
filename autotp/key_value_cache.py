"""A decoder with a static key/value cache: the two steps of generation, prefill and decode, as ordinary modules to plan.

The cache is a set of buffers that the forward updates, so that everything about it is found by the search: it rests split (by heads, or
by batch) if that is cheaper, it is written in place, and it counts as memory. Prefill reads a whole prompt and fills the cache; decode
reads one token at a position, and attends to all that the cache holds up to there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autotp import _torch
from autotp.errors import AutotpError
from autotp.loading import LoadedModel, Phase, explained
from autotp.trace_helpers import prepared

NAME = "key_value_cache"
"""Under which name a cached decoder holds its cache."""


@dataclass(frozen=True)
class CacheShape:
    """The keys and values of one token in one layer.

    Attributes:
        heads: key/value heads.
        key, value: elements of a key, and of a value, per head.
        dtype: of both.
    """

    heads: int
    key: int
    value: int
    dtype: torch.dtype

    def bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return tokens * self.heads * (self.key + self.value) * self.dtype.itemsize


class KeyValueCache(nn.Module):
    """Keys and values of `context` tokens for each of `batch` sequences, as buffers on `meta`: `keys_0`, `values_0`, `keys_1`, …

    Their shape is (batch, heads, context, elements per head). Layers without keys and values have no buffers.
    """

    def __init__(self, shapes: Mapping[int, CacheShape], batch: int, context: int) -> None:
        super().__init__()
        self.context = context
        for layer, shape in shapes.items():
            for name, width in (("keys", shape.key), ("values", shape.value)):
                buffer = torch.empty(batch, shape.heads, context, width, dtype=shape.dtype, device="meta")
                self.register_buffer(f"{name}_{layer}", buffer, persistent=False)

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values, each (batch, heads, tokens, elements), at `positions` (tokens,); returns the whole cache of the layer."""
        try:
            held = self.get_buffer(f"keys_{layer}"), self.get_buffer(f"values_{layer}")
        except AttributeError:
            raise AutotpError(f"layer {layer} has no place in the key/value cache: its first forward gave no keys and values") from None
        held[0].index_copy_(2, positions, keys)
        held[1].index_copy_(2, positions, values)
        return held


def cache_shapes(model: nn.Module) -> dict[int, CacheShape]:
    """Layer → the shape of its keys and values, found by running the model once on two tokens without values.

    Raises:
        AutotpError: the model is no decoder of transformers, or its layers keep something else than keys and values.
    """
    check_decoder(model)
    from transformers import DynamicCache

    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    mode = _torch.fake_mode_of(tensor for _, tensor in state) or _torch.new_fake_mode()
    fakes = {name: _torch.to_fake(tensor.detach(), mode) for name, tensor in state}
    found = DynamicCache()
    refusal = f"{type(model).__name__} cannot be run with a key/value cache: ERROR"
    with prepared(model, []), _torch.with_state(model, fakes), mode, torch.no_grad(), explained(refusal):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=found, use_cache=True)
    shapes = {}
    for number, layer in enumerate(found.layers):
        if getattr(layer, "keys", None) is not None:
            (_, heads, _, key), value = layer.keys.shape, layer.values.shape[-1]
            shapes[number] = CacheShape(heads, key, value, layer.keys.dtype)
    if not shapes:
        raise AutotpError(f"{type(model).__name__} puts nothing into a key/value cache; plan its forward without --phase")
    return shapes


def check_decoder(model: nn.Module) -> None:
    """Raise AutotpError unless the model is a decoder of transformers that reads token ids and gives logits."""
    config, accepted = getattr(model, "config", None), inspect.signature(model.forward).parameters
    if config is None or not {"input_ids", "past_key_values"} <= accepted.keys():
        raise AutotpError(
            f"{type(model).__name__} is no decoder with a key/value cache: prefill and decode need a transformers model whose forward "
            "takes `input_ids` and `past_key_values`"
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise AutotpError(f"{type(model).__name__} is no decoder that predicts the next token; give a model such as a ...ForCausalLM")


def with_cache(model: nn.Module, phase: Phase, *, batch: int, context: int, shapes: Mapping[int, CacheShape] | None = None) -> nn.Module:
    """The model with a key/value cache as a further submodule, and a forward that is one step of generation.

    - prefill: `forward(input_ids)` with ids (batch, tokens) puts the prompt into the cache, from position 0 on.
    - decode: `forward(input_ids, position)` with ids (batch, 1) and position (1,), an int64, adds one token at that position.

    Both return the logits (batch, vocabulary) of the last token. The result shares the parameters of `model`, under their names; the
    cache has no memory of its own (it is on `meta`), so that this is for planning and tracing.

    Args:
        model: a decoder of transformers; it is left as it was.
        batch: sequences; context: tokens of each, prompt and generated ones together.
        shapes: of the cache, if they are known already (`cache_shapes`).

    Raises:
        AutotpError: the model has no such cache.
    """
    if min(batch, context) < 1:
        raise AutotpError(f"a key/value cache of {context} tokens for {batch} sequences is empty; both must be at least 1")
    cache = KeyValueCache(cache_shapes(model) if shapes is None else shapes, batch, context)
    forward, accepted = type(model).forward, inspect.signature(model.forward).parameters
    cached = copy.copy(model)
    cached._modules = {**model._modules, NAME: cache}

    def step(input_ids: Tensor, positions: Tensor, decodes: bool) -> Tensor:
        from autotp.huggingface_cache import StepCache

        kwargs: dict[str, Any] = {"input_ids": input_ids, "past_key_values": StepCache(cache, positions, decodes), "use_cache": True}
        if "position_ids" in accepted:
            kwargs["position_ids"] = positions.unsqueeze(0)
        if "logits_to_keep" in accepted:
            kwargs["logits_to_keep"] = 1
        logits: Tensor = forward(cached, **kwargs).logits
        return logits[:, -1]

    def prefill(input_ids: Tensor) -> Tensor:
        return step(input_ids, torch.arange(input_ids.shape[1], device=input_ids.device), False)

    def decode(input_ids: Tensor, position: Tensor) -> Tensor:
        return step(input_ids, position, True)

    vars(cached)["forward"] = prefill if phase == "prefill" else decode
    return cached


def step_inputs(phase: Phase, batch: int, tokens: int) -> dict[str, Tensor]:
    """Example inputs of a step: a prompt of so many tokens, or one token."""
    if phase == "prefill":
        return {"input_ids": torch.zeros(batch, tokens, dtype=torch.long)}
    return {"input_ids": torch.zeros(batch, 1, dtype=torch.long), "position": torch.zeros(1, dtype=torch.long)}


def in_phase(loaded: LoadedModel, phase: Phase, *, seq: int | None) -> LoadedModel:
    """A decoder as one of the two steps of generation, with a cache of `loaded.seq` tokens.

    Args:
        seq: tokens of the prompt that prefill reads; by default as many as the cache holds.

    Raises:
        AutotpError: the model is no decoder with a key/value cache.
    """
    check_decoder(loaded.model)
    batch, context = loaded.batch, loaded.seq
    if batch is None or context is None:
        raise AutotpError(f"`{loaded.name}` chose its own inputs, so that --phase does not know their sizes; return the model alone")
    shapes = cache_shapes(loaded.model)
    model = with_cache(loaded.model, phase, batch=batch, context=context, shapes=shapes)
    size = sum(shape.bytes(batch * context) for shape in shapes.values())
    tokens = (seq or context) if phase == "prefill" else 1
    read = f"Prefill reads {tokens} tokens" if phase == "prefill" else "Decode reads one token"
    note = f"{read} of each of {batch} sequences; the key/value cache holds {context} of each, {size / 1e9:.3g} GB if it is kept once."
    kept = [note for note in loaded.notes if "labels" not in note]
    return replace(loaded, model=model, args=(), kwargs=step_inputs(phase, batch, tokens), seq=tokens, notes=(*kept, note))
